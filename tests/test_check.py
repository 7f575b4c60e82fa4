"""The offline verdict on manifests."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from session_proxy import check
from session_proxy.check import run_check
from session_proxy.policy import Level, PolicySettings

SETTINGS = PolicySettings(level=Level.BASELINE)

GOOD_SPEC = {"automountServiceAccountToken": False, "containers": [{"name": "workspace", "image": "busybox"}]}
BAD_SPEC = {**GOOD_SPEC, "hostNetwork": True}


class Result(NamedTuple):
    status: int
    out: str
    err: str


def run(*paths: str | Path, text: str = "", settings: PolicySettings = SETTINGS) -> Result:
    out, err = io.StringIO(), io.StringIO()
    names = [str(path) for path in paths] or ["-"]
    status = run_check(names, settings, stdin=io.StringIO(text), stdout=out, stderr=err)
    return Result(status, out.getvalue(), err.getvalue())


def pod(spec: object = None, name: str = "workspace") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": GOOD_SPEC if spec is None else spec}


def nested(path: str, value: object) -> Any:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_a_good_pod_is_ok(tmp_path: Path) -> None:
    file = tmp_path / "pod.json"
    file.write_text(json.dumps(pod()))
    assert run(file) == Result(0, f"{file}: Pod/workspace: ok\n", "")


def test_a_violation_says_where_it_is_what_it_is_and_what_it_must_be() -> None:
    assert run(text=json.dumps(pod(BAD_SPEC))) == Result(
        1,
        "<stdin>: Pod/workspace: 1 violation\n"
        "  spec.hostNetwork: is true, must be false or unset [hostNamespaces]\n"
        "    host namespaces (hostNetwork=true)\n",
        "",
    )


def test_the_settings_decide() -> None:
    result = run(text=json.dumps(pod()), settings=PolicySettings())
    assert result.status == 1
    assert result.out.startswith("<stdin>: Pod/workspace: 4 violations\n")


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", "spec.template"),
        ("ReplicaSet", "spec.template"),
        ("StatefulSet", "spec.template"),
        ("DaemonSet", "spec.template"),
        ("Job", "spec.template"),
        ("ReplicationController", "spec.template"),
        ("CronJob", "spec.jobTemplate.spec.template"),
        ("PodTemplate", "template"),
    ],
)
def test_a_pod_template_is_evaluated_with_paths_from_the_document(kind: str, path: str) -> None:
    good = {"kind": kind, "metadata": {"name": "x"}, **nested(path, {"spec": GOOD_SPEC})}
    assert run(text=json.dumps(good)) == Result(0, f"<stdin>: {kind}/x: ok\n", "")
    bad = {"kind": kind, "metadata": {"generateName": "x-"}, **nested(path, {"spec": BAD_SPEC})}
    result = run(text=json.dumps(bad))
    assert result.status == 1
    assert result.out.startswith(f"<stdin>: {kind}/x-: 1 violation\n  {path}.spec.hostNetwork: is true")


@pytest.mark.parametrize(
    "document", [{"kind": "Deployment"}, {"kind": "Deployment", "spec": []}, {"kind": "Job", "spec": {"template": 7}}]
)
def test_a_kind_without_its_pod_template_cannot_be_read(document: object) -> None:
    result = run(text=json.dumps(document))
    assert result.status == 2
    assert "(unnamed): spec.template is not a pod template" in result.err


def test_the_items_of_a_list_are_evaluated() -> None:
    document = {"kind": "List", "items": [pod(), {"kind": "List", "items": [pod(BAD_SPEC, "second")]}]}
    result = run(text=json.dumps(document))
    assert result.status == 1
    assert "Pod/workspace: ok\n" in result.out
    assert "Pod/second: 1 violation\n  items[1].items[0].spec.hostNetwork: is true" in result.out


def test_the_items_of_a_pod_list_need_no_kind() -> None:
    result = run(text=json.dumps({"kind": "PodList", "items": [{"metadata": {"name": 7}, "spec": GOOD_SPEC}]}))
    assert result == Result(0, "<stdin>: Pod/(unnamed): ok\n", "")


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([], "not a Kubernetes object"),
        ("text", "not a Kubernetes object"),
        ({}, "not a Kubernetes object: it has no kind"),
        ({"kind": 7}, "not a Kubernetes object: it has no kind"),
        ({"kind": "List"}, "List without a list of items"),
        ({"kind": "List", "items": {}}, "List without a list of items"),
        ({"kind": "List", "items": [pod(), 7]}, "items[1]: not a Kubernetes object"),
        ({"kind": "List", "items": [{}]}, "items[0]: not a Kubernetes object: it has no kind"),
    ],
)
def test_what_is_no_kubernetes_object_cannot_be_read(document: object, problem: str) -> None:
    result = run(text=json.dumps(document))
    assert (result.status, result.err) == (2, f"<stdin>: {problem}\n")


def test_a_malformed_pod_is_a_violation() -> None:
    result = run(text="kind: Pod\nspec: []\n")
    assert result.status == 1
    assert "  spec: is [], must be an object [malformed]\n" in result.out


def test_several_files_and_documents_are_all_evaluated(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(f"---\n{json.dumps(pod())}\n---\n---\n# nothing\n---\n{json.dumps(pod(name='second'))}\n")
    second.write_text("kind: Service\nmetadata: {name: s}\n---\n" + json.dumps(pod(BAD_SPEC, "third")))
    result = run(first, "-", second, text=json.dumps(pod(name="fourth")))
    assert result.status == 1
    assert [line for line in result.out.splitlines() if not line.startswith(" ")] == [
        f"{first}: Pod/workspace: ok",
        f"{first}: Pod/second: ok",
        "<stdin>: Pod/fourth: ok",
        f"{second}: Pod/third: 1 violation",
    ]
    assert result.err == f"{second}: Service/s: skipped, it has no pod template\n"


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "null"])
def test_nothing_to_evaluate_is_no_success(text: str) -> None:
    assert run(text=text) == Result(2, "", "no pod and no pod template found\n")


def test_only_other_kinds_are_no_success() -> None:
    result = run(text="kind: ConfigMap\nmetadata: {name: c}\n")
    assert result.status == 2
    assert result.err.endswith("ConfigMap/c: skipped, it has no pod template\nno pod and no pod template found\n")


def test_a_missing_file_cannot_be_read_and_the_others_are_evaluated(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text(json.dumps(pod(BAD_SPEC)))
    result = run(tmp_path / "missing.yaml", tmp_path, good)
    assert result.status == 2
    assert f"{tmp_path / 'missing.yaml'}: cannot be read: No such file or directory\n" in result.err
    assert f"{tmp_path}: cannot be read: Is a directory\n" in result.err
    assert "Pod/workspace: 1 violation" in result.out


def test_what_comes_before_an_error_is_evaluated() -> None:
    result = run(text=json.dumps(pod()) + "\n---\n[\n")
    assert result.status == 2
    assert result.out == "<stdin>: Pod/workspace: ok\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kind: Pod\nspec: [\n", ":3: expected the node content, but found '<stream end>'"),
        ("kind: Pod\nspec:\n\t- x\n", ":3: found character '\\t' that cannot start any token"),
        ("kind: Pod\nkind: Pod\n", ':2: the key "kind" is given twice'),
        ("kind: Pod\non: 1\n'true': 2\n", ':3: the key "true" is given twice'),
        ("kind: Pod\n? [a]\n: b\n", ":2: a key is not a string"),
        ("kind: Pod\nx: *nowhere\n", ":2: found undefined alias 'nowhere'"),
        ("kind: Pod\nx: !!python/name:os.system\n", ":2: could not determine a constructor for the tag"),
        ("kind: Pod\nx: !!binary aGk=\n", ":2: tag:yaml.org,2002:binary has no place in a manifest"),
        ("kind: Pod\nx: !!set {a}\n", ":2: tag:yaml.org,2002:set has no place in a manifest"),
        ("kind: Pod\nx: !!int no\n", ":2: not a value of tag:yaml.org,2002:int"),
        ("kind: Pod\nx: !!int ''\n", ":2: not a value of tag:yaml.org,2002:int"),
        ("kind: Pod\nx: !!bool maybe\n", ":2: not a value of tag:yaml.org,2002:bool"),
        ("kind: Pod\n<<: 7\n", ":2: expected a mapping or list of mappings for merging"),
        ("kind: Pod\nx: \x00\n", ":2: special characters are not allowed"),
        ("kind: Pod\nx: &a [*a]\n", ":2: an alias contains itself"),
        ("kind: Pod\nx: &a {y: *a}\n", ":2: an alias contains itself"),
        ('{"kind": "Pod"\n', ":2: expected ',' or '}', but got '<stream end>'"),
        ('{"kind": "Pod", "kind": "Pod"}', ': cannot be read: the key "kind" is given twice'),
        ('{"kind": "Pod", "x": NaN}', ": cannot be read: NaN is not JSON"),
        ('{"kind": "Pod", "x": ' + "9" * 5000 + "}", ": cannot be read: Exceeds the limit"),
        ("[" * 5000, ": nested too deeply"),
        ('{"x":' * 100_000, ": nested too deeply"),
    ],
)
def test_what_is_no_yaml_is_refused_with_file_and_line(text: str, problem: str) -> None:
    result = run(text=text)
    assert result.status == 2
    assert result.err.startswith(f"<stdin>{problem}")


def test_an_alias_bomb_is_refused() -> None:
    lines = ["kind: Pod", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    result = run(text="\n".join(lines))
    assert (result.status, result.err) == (2, "<stdin>:1: aliases expand to more than 1000000 values\n")


def test_aliases_and_merges_are_read() -> None:
    text = """
        kind: List
        items:
          - {kind: ConfigMap, data: {nested: &second {<<: &first {hostPID: true, hostIPC: true}, hostIPC: false}}}
          - kind: Pod
            metadata: {name: merged, creationTimestamp: 2026-01-01}
            spec:
              <<: *second
              automountServiceAccountToken: false
              containers:
                - &one {name: a, image: busybox}
                - {<<: *one, name: b}
    """
    result = run(text=text)
    assert result.status == 1
    assert result.out.startswith("<stdin>: Pod/merged: 1 violation\n  items[1].spec.hostPID: is true")


def test_a_merge_is_read_before_what_it_merges() -> None:
    text = """
        kind: ConfigMap
        data: {deep: {deeper: &b {<<: {x: 1}, x: 2}}}
        more: {<<: *b, x: 3}
    """
    assert "given twice" not in run(text=text).err


def test_the_size_of_a_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_FILE_BYTES", 1000)
    file = tmp_path / "big.yaml"
    file.write_bytes(b"\xff" * 1001)
    assert run(file) == Result(2, "", f"{file}: cannot be read: it is larger than 1000 bytes\n")
    assert run(text=" " * 1001) == Result(2, "", "<stdin>: cannot be read: it is larger than 1000 bytes\n")
    text = json.dumps(pod())
    file.write_text(text + " " * (1000 - len(text)))
    assert run(file).status == 0


def test_a_file_that_is_not_utf_8_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"kind: \xff")
    result = run(file)
    assert result.status == 2
    assert result.err.startswith(f"{file}: cannot be read: 'utf-8' codec")


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "bom.json"
    file.write_text(json.dumps(pod()), encoding="utf-8-sig")
    assert run(file).status == 0


def test_a_manifest_cannot_steer_the_terminal() -> None:
    result = run(text=json.dumps(pod({**BAD_SPEC, "volumes": [{"name": "\x1b[2J"}]}, "a\x1b]0;x\n\u202e\ud800")))
    assert result.out.startswith("<stdin>: Pod/a\\x1b]0;x\\n\\u202e\\ud800: 1 violation\n")
    assert all(line.isprintable() for line in result.out.splitlines())
