"""deploy/kubernetes: what is rendered is valid, is what ``session up`` creates, and grants and admits what it says."""

import asyncio
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import OWNER, PATIENCE, Daemon, StartDaemon
from kustomize import COMPONENTS, DEPLOY, REPOSITORY, Manifest, Objects, build, by_name, installed, overlay
from prometheus_client.parser import text_string_to_metric_families

from session_proxy import session_spec
from session_proxy.check import run_check
from session_proxy.devcluster import DevCluster
from session_proxy.policy import PolicySettings, evaluate
from session_proxy.readiness import NEEDED

OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
"""The releases that the manifests are written for."""
ADMISSION_SINCE = "1.30"

WORKSPACE = PolicySettings(container="workspace")
"""What the sidecar demands of its workspace by default."""
RUNNER = PolicySettings(session_rules=False)
"""What a namespace that enforces ``restricted`` demands of the runner pod."""

COMBINATIONS = (
    (),
    *((component,) for component in COMPONENTS),
    ("admission", "egress-lockdown", "gvisor", "network-policy", "persistent-workspace"),
    ("kata", "network-policy", "openshift", "persistent-workspace"),
)
every_combination = pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)


def runner_of(objects: Objects) -> Manifest:
    return objects["Pod", "demo-runner"]


def workspace_of(objects: Objects) -> Manifest:
    return objects["Pod", "demo-workspace"]


def adopted(objects: Objects, uid: str = OWNER) -> Manifest:
    """The workspace as ``adopt.sh`` leaves it."""
    pod = workspace_of(objects)
    reference = session_spec.owner_reference(session_spec.SessionName("demo"), uid, controller=True)
    pod["metadata"]["ownerReferences"] = [reference]
    return pod


# --- rendering --------------------------------------------------------------------------------------------------------


def test_the_components_are_the_ones_that_are_documented() -> None:
    directories = {path.name for path in (DEPLOY / "components").iterdir() if path.is_dir()}
    assert directories == set(COMPONENTS) >= {"admission", "egress-lockdown", "gvisor", "kata", "network-policy"}
    assert {path.parent.name for path in DEPLOY.glob("components/*/README.md")} == directories


def namespaces_of(objects: Objects) -> set[str]:
    cluster_wide = ("Namespace", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "ConfigMap")
    named = {
        each["metadata"].get("namespace", "unset") for (kind, _), each in objects.items() if kind not in cluster_wide
    }
    return named | {name for kind, name in objects if kind == "Namespace"}


@every_combination
def test_everything_lies_in_one_namespace(components: tuple[str, ...]) -> None:
    objects = overlay(*components)
    assert namespaces_of(objects) == {"session-proxy"}
    parameters = [each["metadata"]["namespace"] for (kind, _), each in objects.items() if kind == "ConfigMap"]
    assert parameters == ["kube-system"] * ("admission" in components)


def test_an_overlay_can_move_everything_to_another_namespace() -> None:
    everything = set(COMPONENTS) - {"admission", "openshift"}
    objects = overlay(*sorted(everything), namespace="example")
    assert namespaces_of(objects) == {"example"}
    assert objects["RoleBinding", "demo-proxy"]["subjects"][0]["namespace"] == "example"


def test_an_overlay_that_moves_everything_would_move_the_admission_parameters_away() -> None:
    # Which is why the README says not to; should kustomize ever spare it, the README can say so.
    moved = overlay("admission", namespace="example")
    assert moved["ConfigMap", "session-proxy-admission"]["metadata"]["namespace"] == "example"
    reference = moved["ValidatingAdmissionPolicyBinding", "session-proxy-identity"]["spec"]["paramRef"]
    assert reference["namespace"] == "kube-system"


def test_the_admission_component_can_be_applied_by_itself() -> None:
    kinds = sorted(each["kind"] for each in build(DEPLOY / "components" / "admission"))
    assert kinds == [
        "ConfigMap",
        *["ValidatingAdmissionPolicy"] * 4,
        *["ValidatingAdmissionPolicyBinding"] * 4,
    ]


def test_the_example_overlay_sets_what_it_says() -> None:
    objects = by_name(build(DEPLOY / "overlays" / "example"))
    images = [
        container["image"]
        for pod in (runner_of(objects), workspace_of(objects))
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"])
    ]
    assert images[0] == f"registry.example/platform/session-proxy@sha256:{'0' * 64}"
    assert images[1:] == ["registry.example/agents/runner:1.0", "registry.example/workspaces/python:3.13"]
    assert ("PersistentVolumeClaim", "demo-workspace") in objects
    assert objects["NetworkPolicy", "runner"]["spec"]["egress"][0] == {
        "to": [{"ipBlock": {"cidr": "203.0.113.10/32"}}],
        "ports": [{"protocol": "TCP", "port": 443}],
    }
    (sidecar,) = runner_of(objects)["spec"]["initContainers"]
    assert {"name": "ALLOWED_IMAGES", "value": "registry.example/workspaces"} in sidecar["env"]
    settings = PolicySettings(container="workspace", allowed_images=("registry.example/workspaces",))
    assert evaluate(adopted(objects), settings) == ()
    for each in objects.values():
        validate(each, NEWEST)


@pytest.mark.parametrize("component", COMPONENTS)
def test_what_the_example_overlay_has_in_comments_can_be_switched_on(component: str, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "kubernetes")
    example = tmp_path / "kubernetes" / "overlays" / "example"
    file = example / "kustomization.yaml"
    text = file.read_text(encoding="utf-8")
    assert (component == "admission") == (f"components/{component}\n" not in text)
    text = text.replace(f"# - ../../components/{component}\n", f"- ../../components/{component}\n")
    if component == "egress-lockdown":
        text = text.replace("/initContainers/0/", "/initContainers/1/")  # as its comment says
    file.write_text(text, encoding="utf-8")
    objects = by_name(build(example))
    first = runner_of(objects)["spec"]["initContainers"][0]["name"]
    assert first == ("network-init" if component == "egress-lockdown" else "session-proxy")


# --- schemas ----------------------------------------------------------------------------------------------------------


@functools.cache
def _validate(text: str, release: str) -> None:
    kubernetes_validate.validate(json.loads(text), release, strict=True)


def validate(manifest: Manifest, release: str) -> None:
    """Hold an object against the schemas of a release. Most objects are the same in every combination: once each."""
    _validate(json.dumps(manifest, sort_keys=True), release)


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
@every_combination
def test_what_is_rendered_is_valid(components: tuple[str, ...], release: str) -> None:
    for (kind, _), each in overlay(*components).items():
        if release == OLDEST and kind.startswith("ValidatingAdmissionPolicy"):
            with pytest.raises(kubernetes_validate.SchemaNotFoundError):
                validate(each, release)
            validate(each, ADMISSION_SINCE)
        else:
            validate(each, release)


@pytest.mark.parametrize("component", ["gvisor", "kata"])
def test_the_runtime_classes_are_valid_and_named_as_the_pods_name_them(component: str) -> None:
    runtime_class = yaml.safe_load((DEPLOY / "components" / component / "runtimeclass.yaml").read_text("utf-8"))
    for release in (OLDEST, NEWEST):
        validate(runtime_class, release)
    assert workspace_of(overlay(component))["spec"]["runtimeClassName"] == runtime_class["metadata"]["name"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [("Pod", ("spec", "containers", 0)), ("NetworkPolicy", ("spec", "egress", 0, "to", 0)), ("Role", ("rules", 0))],
)
def test_the_schemas_see_a_misspelt_field_deep_inside(kind: str, path: tuple[str | int, ...]) -> None:
    objects = overlay("network-policy")
    broken: Any = objects[kind, {"Pod": "demo-runner", "NetworkPolicy": "runner", "Role": "demo-proxy"}[kind]]
    inside = broken
    for step in path:
        inside = inside[step]
    inside["misspelt"] = True
    for release in (OLDEST, NEWEST):
        with pytest.raises(kubernetes_validate.ValidationError, match="misspelt"):
            validate(broken, release)


# --- one truth with `session up` --------------------------------------------------------------------------------------


def test_the_base_is_what_session_up_creates() -> None:
    rendered = overlay()
    del rendered["Namespace", "session-proxy"]
    sidecar, runner = (
        runner_of(rendered)["spec"]["initContainers"][0]["image"],
        runner_of(rendered)["spec"]["containers"][0]["image"],
    )
    spec = session_spec.parse_spec(
        {
            "name": "demo",
            "proxy_image": sidecar,
            "runner_image": runner,
            "workspace_image": workspace_of(rendered)["spec"]["containers"][0]["image"],
        }
    )
    created = (
        session_spec.service_account(spec.name),
        session_spec.runner_pod(spec),
        *session_spec.manifests(spec, runner_uid=OWNER),
    )
    expected = by_name(created)
    for each in expected.values():
        each["metadata"].pop("ownerReferences", None)  # adopt.sh writes the workspace's, when the UID is known
    for each in rendered.values():
        assert each["metadata"].pop("namespace") == "session-proxy"
        for subject in each.get("subjects", ()):
            assert subject.pop("namespace") == "session-proxy"
    assert rendered == expected


def test_adopt_writes_the_owner_that_session_up_writes(tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\ncase $1 in get) printf u-1 ;; *) printf "%s\\n" "$@" >"$CALLED" ;; esac\n')
    kubectl.chmod(0o755)
    called = tmp_path / "called"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLED": str(called)}
    subprocess.run([str(DEPLOY / "adopt.sh"), "somewhere"], env=environment, check=True, timeout=30)
    arguments = called.read_text().splitlines()
    assert arguments[:5] == ["patch", "pod", "demo-workspace", "--namespace", "somewhere"]
    name = session_spec.SessionName("demo")
    expected = [session_spec.owner_reference(name, "u-1", controller=True)]
    assert json.loads(arguments[-1]) == {"metadata": {"ownerReferences": expected}}


# --- the Role ---------------------------------------------------------------------------------------------------------

Grants = set[tuple[str, str]]


def granted(objects: Objects) -> Grants:
    rules = objects["Role", "demo-proxy"]["rules"]
    assert all(rule["apiGroups"] == [""] and rule["resourceNames"] == ["demo-workspace"] for rule in rules)
    return {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}


def settings_of(pod: Manifest, uid: str) -> dict[str, str]:
    """The sidecar's settings as the kubelet would fill them in."""
    fields = {"metadata.name": pod["metadata"]["name"], "metadata.uid": uid}
    (sidecar,) = [each for each in pod["spec"]["initContainers"] if each["name"] == "session-proxy"]
    return {
        each["name"]: each.get("value") or fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in sidecar["env"]
    }


async def test_the_role_grants_what_the_daemon_asks_for_and_nothing_else(
    cluster: DevCluster, start: StartDaemon
) -> None:
    base = overlay()
    cluster.add_pod(adopted(base, OWNER) | {"metadata": adopted(base)["metadata"] | {"namespace": "default"}})
    daemon = await start(cluster, OWNER_UID="", **settings_of(runner_of(base), OWNER))

    verdict, stream = await daemon.run("echo", "hello")
    assert (verdict["outcome"], stream.data("stdout")) == ("exited", b"hello\n")
    running = await daemon.open("sh", "-c", "echo up; sleep 1000")
    await running.until("stdout", b"up\n")
    async with asyncio.timeout(PATIENCE):
        while ("watch", "pods") not in cluster.requests:
            await asyncio.sleep(0.01)
    async with daemon.http.delete(f"{daemon.url}/execs/{running.id}") as response:
        assert response.status == 202
    assert (await running.rest())["reaped"] is True
    assert (await daemon.get("/readyz"))[0] == 200
    assert (await daemon.get("/workspace"))[0] == 200

    asked = set(cluster.requests)
    assert asked == await calls(daemon), "what the stand-in saw, and what the daemon says that it did"
    asked.remove(("create", "selfsubjectaccessreviews"))  # open to every authenticated user (system:basic-user)
    assert asked <= granted(base), "a verb is missing"
    # The same websocket is "create" to Kubernetes 1.35 and later, and readiness asks beforehand for what may be needed.
    wanted = asked | {("create", "pods/exec")} | {(verb, f"pods/{sub}" if sub else "pods") for verb, sub in NEEDED}
    assert granted(base) == wanted


async def calls(daemon: Daemon) -> Grants:
    """What the daemon's own metrics say that it asked of the API server."""
    async with daemon.http.get(f"{daemon.url}/metrics") as response:
        text = await response.text()
    return {
        (sample.labels["verb"], sample.labels["resource"])
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "session_proxy_kube_requests_total"
    }


@pytest.mark.parametrize("components", [("egress-lockdown",), ("network-policy", "openshift", "persistent-workspace")])
def test_no_component_grants_more(components: tuple[str, ...]) -> None:
    with_them, base = overlay(*components), overlay()
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        assert [each for (k, _), each in with_them.items() if k == kind] == [
            each for (k, _), each in base.items() if k == kind
        ]


# --- the project's own policy -----------------------------------------------------------------------------------------


@every_combination
def test_the_workspace_is_what_its_sidecar_demands(components: tuple[str, ...]) -> None:
    assert evaluate(adopted(overlay(*components)), WORKSPACE) == ()


@every_combination
def test_the_runner_pod_meets_restricted_but_for_the_container_that_closes_the_network(
    components: tuple[str, ...],
) -> None:
    runner = runner_of(overlay(*components))
    found = evaluate(runner, RUNNER)
    if "egress-lockdown" not in components:
        assert found == ()
        return
    assert runner["spec"]["initContainers"][0]["name"] == "network-init"
    context = "spec.initContainers[0].securityContext"
    assert sorted((violation.field, violation.value) for violation in found) == [
        (f"{context}.capabilities.add", '["NET_ADMIN"]'),
        (f"{context}.runAsNonRoot", "false"),
        (f"{context}.runAsUser", "0"),
    ]


@every_combination
def test_the_namespace_enforces_what_its_pods_meet(components: tuple[str, ...]) -> None:
    objects = overlay(*components)
    (labels,) = [each["metadata"]["labels"] for (kind, _), each in objects.items() if kind == "Namespace"]
    enforced = "privileged" if "egress-lockdown" in components else "restricted"
    assert labels["pod-security.kubernetes.io/enforce"] == enforced
    assert labels["pod-security.kubernetes.io/warn"] == labels["pod-security.kubernetes.io/audit"] == "restricted"
    assert (labels.get("session-proxy/admission") == "enforced") == ("admission" in components)


def test_check_finds_nothing_in_the_base_but_the_sidecars_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = overlay()
    files = {"workspace": workspace_of(base), "runner": runner_of(base)}
    for name, pod in files.items():
        (tmp_path / name).write_text(json.dumps(pod), encoding="utf-8")
    arguments = {"stdin": sys.stdin, "stdout": sys.stdout, "stderr": sys.stderr}
    assert run_check([str(tmp_path / "workspace")], WORKSPACE, **arguments) == 0
    assert run_check([str(tmp_path / "runner")], PolicySettings(), **arguments) == 1
    printed = capsys.readouterr().out
    rules = re.findall(r"\[(\w+)\]$", printed, re.MULTILINE)
    assert rules == ["session_token", "session_token"], printed  # the volume, and that the sidecar mounts it


@every_combination
def test_no_container_but_the_sidecar_can_read_the_token(components: tuple[str, ...]) -> None:
    objects = overlay(*components)
    for pod in (runner_of(objects), workspace_of(objects)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not spec.get("shareProcessNamespace")
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert ("session-proxy-token" in mounted) == (container["name"] == "session-proxy")
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


# --- single components ------------------------------------------------------------------------------------------------


def security_contexts(pod: Manifest) -> list[dict[str, Any]]:
    spec = pod["spec"]
    contexts = [spec["securityContext"]]
    return contexts + [each["securityContext"] for each in (*spec.get("initContainers", ()), *spec["containers"])]


def test_on_openshift_no_id_is_fixed() -> None:
    for objects, fixed in ((overlay("openshift"), False), (overlay(), True)):
        for pod in (runner_of(objects), workspace_of(objects)):
            found = {key for context in security_contexts(pod) for key in context}
            assert bool(found & {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups"}) is fixed


@pytest.mark.parametrize("component", ["gvisor", "kata"])
def test_a_runtime_class_is_all_that_a_sandbox_changes(component: str) -> None:
    base, changed = overlay(), overlay(component)
    assert workspace_of(changed)["spec"].pop("runtimeClassName") == component
    assert changed == base


def test_a_persistent_workspace_changes_the_volume_alone() -> None:
    base, changed = overlay(), overlay("persistent-workspace")
    claim = changed.pop(("PersistentVolumeClaim", "demo-workspace"))
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    before = workspace_of(base)["spec"]["volumes"].pop(0)
    after = workspace_of(changed)["spec"]["volumes"].pop(0)
    assert before == {"name": "workspace", "emptyDir": {"sizeLimit": "2Gi"}}
    assert after == {"name": "workspace", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    assert changed == base
    (mount,) = [m for m in workspace_of(base)["spec"]["containers"][0]["volumeMounts"] if m["name"] == "workspace"]
    assert mount["mountPath"] == "/workspace"


def selects(policy: Manifest, pod: Manifest) -> bool:
    selector = policy["spec"]["podSelector"]
    assert set(selector) <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= pod["metadata"]["labels"].items())


def test_by_network_policy_nothing_comes_in_and_only_the_runner_goes_out() -> None:
    objects = overlay("network-policy")
    found = {name: each for (kind, name), each in objects.items() if kind == "NetworkPolicy"}
    assert all(set(each["spec"]["policyTypes"]) == {"Ingress", "Egress"} for each in found.values())
    assert found["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert not any(each["spec"].get("ingress") for each in found.values())

    def ways_out(pod: Manifest) -> list[Any]:
        return [rule for each in found.values() if selects(each, pod) for rule in each["spec"].get("egress", ())]

    assert ways_out(workspace_of(objects)) == []
    api_server, names = ways_out(runner_of(objects))
    # RFC 5737: nobody's address, until an overlay names the API server's.
    assert api_server == {"to": [{"ipBlock": {"cidr": "192.0.2.1/32"}}], "ports": [{"protocol": "TCP", "port": 6443}]}
    assert [(port["protocol"], port["port"]) for port in names["ports"]] == [("UDP", 53), ("TCP", 53)]
    (peer,) = names["to"]
    assert set(peer) == {"namespaceSelector", "podSelector"}, "both in one peer: the DNS pods, in kube-system alone"


# --- shell ------------------------------------------------------------------------------------------------------------


def scripts() -> list[Path]:
    """Every file of the project that begins with the name of a shell, or ends as such files do."""
    files = [
        path
        for top in (".ci", "deploy", "session_proxy", "tests")
        for path in (REPOSITORY / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return sorted(
        path
        for path in files
        if path.suffix == ".sh" or path.read_bytes()[:64].partition(b"\n")[0].rstrip().endswith((b"sh", b"sh -e"))
    )


def test_the_shell_scripts_are_found() -> None:
    names = {str(path.relative_to(REPOSITORY)) for path in scripts()}
    assert {".ci/run", "deploy/kubernetes/adopt.sh"} <= names


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run(
        [installed("shellcheck"), "--norc", "--severity=style", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.access(script, os.X_OK)
