"""What `session up` would create, and every reason not to."""

import re
import string
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from session_proxy.config import SETTINGS, Wrapper, parse_config
from session_proxy.errors import ConfigError
from session_proxy.ownership import OwnerMode, check_ownership
from session_proxy.policy import Level, PolicySettings, evaluate
from session_proxy.readiness import NEEDED
from session_proxy.session_spec import (
    IDLE,
    MAX_NAME,
    PROXY_UID,
    ROLE_VERBS,
    SETTINGS_OF_UP,
    UP_OPTIONS,
    Option,
    SessionSpec,
    Sidecar,
    manifests,
    parse_name,
    parse_quantity,
    parse_spec,
    role,
    role_binding,
    runner_pod,
    service_account,
    workspace_pod,
)

UID = "0f0e0d0c-1111-4222-8333-444444444444"
IMAGES = {
    "proxy_image": "registry.example/session-proxy:1",
    "runner_image": "registry.example/runner:2",
    "workspace_image": "registry.example/workspace:3",
}
Json = dict[str, Any]


def spec_of(**values: Any) -> SessionSpec:
    return parse_spec({"name": "demo", **IMAGES, **values})


def problems_of(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        spec_of(**values)
    return list(error.value.problems)


def containers_of(pod: Json) -> dict[str, Json]:
    spec = pod["spec"]
    return {item["name"]: item for item in (*spec.get("initContainers", ()), *spec["containers"])}


# --- quantities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("1", "1"),
        ("+1", "1"),
        ("100m", "0.1"),
        ("1.5", "1.5"),
        (".5", "0.5"),
        ("5.", "5"),
        ("1n", "1e-9"),
        ("1u", "1e-6"),
        ("2k", "2000"),
        ("3M", "3e6"),
        ("1E", "1e18"),
        ("1e3", "1000"),
        ("1E3", "1000"),
        ("1e-3", "0.001"),
        ("12E+2", "1200"),
        ("1Ki", "1024"),
        ("1.5Gi", str(3 << 29)),
        ("7Ei", str(7 << 60)),
        ("9223372036854775807", "9223372036854775807"),
    ],
)
def test_a_quantity_has_the_value_that_kubernetes_gives_it(text: str, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        # Kubernetes' own examples of what is none.
        *("1.1.M", "1+1.0M", "0.1mi", "0.1am", "aoeu", ".5i", "1i", "-3.01i", "-3.01e-", " 1", "1 "),
        *(
            "",
            "-1",
            ".",
            "+",
            "k",
            "1K",
            "1KI",
            "1ki",
            "1mM",
            "1e",
            "1e+",
            "1e1.5",
            "1 Gi",
            "1\n",
            "1,5",
            "0x10",
            "\u0661",
        ),
        *("9223372036854775808", "8Ei", "1e99"),
    ],
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_quantity(text)


def value_by_kubernetes(text: str) -> Decimal | None:
    """Return what apimachinery's ParseQuantity would, by its scanner, step by step; None for an error.

    Without its quirk that what has no digit at all is 0.
    """
    digits, position = string.digits, 0
    if text[:1] in ("+", "-"):
        position = 1
    start = position
    while position < len(text) and text[position] in digits:
        position += 1
    if position < len(text) and text[position] == ".":
        position += 1
        while position < len(text) and text[position] in digits:
            position += 1
    number, suffix_start = text[start:position], position
    while position < len(text) and text[position] in "eEinumkKMGTP":
        position += 1
    if position < len(text) and text[position] in "+-":
        position += 1
    while position < len(text) and text[position] in digits:
        position += 1
    suffix = text[suffix_start:position]
    if position < len(text) or not re.search("[0-9]", number):
        return None
    binary = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
    decimal = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
    sign = -1 if text.startswith("-") else 1
    if suffix in binary:
        return sign * Decimal(number) * Decimal(2) ** binary[suffix]
    if suffix in decimal:
        return sign * Decimal(number) * Decimal(10) ** decimal[suffix]
    if suffix[0] in "eE" and re.fullmatch("[+-]?[0-9]+", suffix[1:]):
        return sign * Decimal(number) * Decimal(10) ** int(suffix[1:])
    return None


quantity_like = st.one_of(
    st.text(alphabet="0123456789.+-eEinumkKMGTP", max_size=8),
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["", "+", "-"]),
        st.from_regex(r"[0-9]{1,12}(\.[0-9]{0,3})?|\.[0-9]{1,3}", fullmatch=True),
        st.sampled_from(["", *"numkMGTPEKi", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "e3", "E-2", "e+1", "e", "E9"]),
    ),
)


@given(quantity_like)
def test_quantities_are_read_as_kubernetes_reads_them(text: str) -> None:
    expected = value_by_kubernetes(text)
    try:
        value: Decimal | None = parse_quantity(text)
    except ValueError:
        value = None
    if expected is None or text.startswith("-") or expected > 2**63 - 1:
        assert value is None
    elif not re.search(r"[eE][+-]?[0-9]{3,}", text):  # which is read as no quantity here; nobody means it
        assert value == expected


# --- names ----------------------------------------------------------------------------------------------------------


def is_dns_label(text: str, longest: int) -> bool:
    letters = set(string.ascii_lowercase + string.digits)
    return 0 < len(text) <= longest and set(text) <= letters | {"-"} and text[0] in letters and text[-1] in letters


@given(st.one_of(st.text(alphabet="ab9-.A_é\n", min_size=1, max_size=6), st.from_regex(r"[a-z0-9-]{50,66}")))
def test_a_sessions_name_is_a_dns_label_short_enough_for_its_objects(text: str) -> None:
    if is_dns_label(text, MAX_NAME):
        spec = spec_of(name=text)
        names = (spec.name.runner, spec.name.workspace, spec.name.access)
        assert all(is_dns_label(name, 63) for name in names)
        assert len(set(names)) == 3
    else:
        (problem,) = problems_of(name=text)
        assert problem.startswith("NAME is ")
        assert "; it must be a DNS label: at most 53 lower-case" in problem


@given(st.one_of(st.text(alphabet="ab9-.A_é\n", min_size=1, max_size=8), st.from_regex(r"[a-z.]{250,256}")))
def test_an_objects_name_is_dns_labels_joined_by_dots(text: str) -> None:
    good = len(text) <= 253 and all(is_dns_label(label, 253) for label in text.split("."))
    if good:
        assert spec_of(runtime_class=text).runtime_class == text
    else:
        (problem,) = problems_of(runtime_class=text)
        assert "; it must be an object's name: at most 253 characters" in problem


def test_status_and_down_need_a_name_and_take_a_namespace_and_a_timeout() -> None:
    name, namespace, timeout = parse_name({"name": "demo"})
    assert (name.session, namespace, timeout) == ("demo", None, 120)
    assert parse_name({"name": "demo", "namespace": "n", "timeout": "5"})[1:] == ("n", 5)
    with pytest.raises(ConfigError) as error:
        parse_name({"name": "-", "namespace": "N", "timeout": "soon"})
    assert [problem.split(" is ")[0] for problem in error.value.problems] == ["NAME", "--namespace", "--timeout"]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("--namespace", "a.b", "a DNS label: at most 63"),
        ("--namespace", "a" * 64, "a DNS label: at most 63"),
        ("--proxy-image", "registry.example//x", "an image reference such as"),
        ("--runner-image", "Runner", "an image reference such as"),
        ("--workspace-image", "x@sha256:12", "its digest is not sha256:<64"),
        ("--workspace-image", "x:" + "t" * 129, "its tag is not 1 to 128"),
        ("--runner-command", "sh -c 'never closed", "words, quoted as for a shell (No closing quotation)"),
        ("--runner-command", " ", "of which the first is the program"),
        ("--runner-command", "'' x", "of which the first is the program"),
        ("--runner-uid", "0", "a numeric user id from 1 to 2147483647"),
        ("--runner-uid", "-1", "a numeric user id"),
        ("--runner-uid", "2147483648", "a numeric user id"),
        ("--runner-uid", str(PROXY_UID), "other than the sidecar's 65532"),
        ("--workspace-uid", "root", "a numeric user id"),
        ("--workspace-uid", "\u0661", "a numeric user id"),
        ("--runner-cpu", "0", "a quantity of CPU, at least 1m"),
        ("--runner-cpu", "500u", "a quantity of CPU, at least 1m"),
        ("--workspace-cpu", "one", "a quantity of CPU"),
        ("--workspace-cpu", "-1", "a quantity of CPU"),
        ("--runner-memory", "512m", "a quantity of bytes, at least 4Mi"),
        ("--workspace-memory", "1GB", "a quantity of bytes"),
        ("--workspace-memory", "4095Ki", "a quantity of bytes"),
        ("--workspace-storage", "10Ei", "a quantity of bytes"),
        ("--workspace-claim", "Data", "an object's name"),
        ("--runtime-class", "a..b", "an object's name"),
        ("--node-name", "node/1", "an object's name"),
        ("--node-name", "../../nodes", "an object's name"),
        ("--image-pull-policy", "always", "Always, IfNotPresent or Never"),
        ("--image-pull-secret", "-", "an object's name"),
        ("--sidecar", "init", "native, or container for Kubernetes before 1.29"),
        ("--timeout", "0", "a number of seconds from 1 to 3600"),
        ("--timeout", "3601", "a number of seconds"),
        ("--timeout", "nan", "a number of seconds"),
        ("--timeout", "2m", "a number of seconds"),
    ],
)
def test_a_wrong_value_is_refused_with_its_option_and_what_would_be_right(flag: str, value: str, wanted: str) -> None:
    option = next(option for option in UP_OPTIONS if option.flag == flag)
    (problem,) = problems_of(**{option.field: value})
    shown = value if len(value) <= 60 else value[:60] + "…"
    assert problem.startswith(f"{flag} is {shown!r}; it must be ")
    assert wanted in problem


@pytest.mark.parametrize("option", [option for option in UP_OPTIONS if option.required], ids=lambda option: option.flag)
def test_what_is_required_must_be_given(option: Option) -> None:
    for nothing in (None, ""):
        (problem,) = problems_of(**{option.field: nothing})
        assert problem == f"{option.flag} is not given; it must be the {option.help}"


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_of(
        name="Demo",
        proxy_image="",
        workspace_memory="1",
        workspace_storage="1Gi",
        workspace_claim="data",
        settings=["EXEC_BURST=many", "NOSUCH=1"],
    )
    assert [re.split(" is | and ", problem)[0] for problem in problems] == [
        "NAME",
        "--proxy-image",
        "--workspace-memory",
        "--workspace-storage",
        "--set 'NOSUCH'",
        "--set EXEC_BURST",
    ]


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("LOG_LEVEL", "--set is 'LOG_LEVEL'; it must be SETTING=VALUE"),
        ("log_level=info", "--set 'log_level' is no setting of session-proxy"),
        ("=x", "--set '' is no setting of session-proxy"),
        ("PATH=/bin", "--set 'PATH' is no setting of session-proxy"),
        ("LOG_LEVEL=loud", "--set LOG_LEVEL is 'loud'; it must be one of debug"),
        ("EXEC_TIMEOUT_SECONDS=7200", "--set EXEC_TIMEOUT_SECONDS is 7200; it must be at most"),
        *((f"{name}=x", f"--set {name} is not possible") for name in sorted(SETTINGS_OF_UP)),
    ],
)
def test_a_setting_of_the_sidecar_is_checked_as_the_sidecar_will(assignment: str, problem: str) -> None:
    (found,) = problems_of(settings=[assignment])
    assert found.startswith(problem)


def test_the_settings_that_up_decides_are_settings() -> None:
    assert {setting.variable for setting in SETTINGS} > SETTINGS_OF_UP


def test_an_image_that_the_sidecar_would_refuse_is_refused_at_once() -> None:
    problems = problems_of(settings=["ALLOWED_IMAGES=other.example/team", "REQUIRE_IMAGE_DIGEST=true"])
    assert len(problems) == 2
    assert all(problem.startswith("--workspace-image gives spec.containers[0].image ") for problem in problems)
    assert "registry.example/workspace:3" in problems[0]
    assert "other.example/team" in problems[0]
    assert "@sha256:" in problems[1]
    pinned = "other.example/team/ws@sha256:" + "0" * 64
    assert spec_of(
        workspace_image=pinned, settings=["ALLOWED_IMAGES=other.example/team", "REQUIRE_IMAGE_DIGEST=true"]
    ).settings == {"ALLOWED_IMAGES": "other.example/team", "REQUIRE_IMAGE_DIGEST": "true"}


@given(st.dictionaries(st.sampled_from([option.field for option in UP_OPTIONS]), st.text(max_size=20)))
def test_whatever_is_given_is_a_spec_or_problems_in_one_line_each(values: dict[str, str]) -> None:
    try:
        spec = spec_of(**values)
    except ConfigError as error:
        problems: tuple[str, ...] = error.problems
    else:
        assert not evaluate(workspace_pod(spec, UID), PolicySettings(container="workspace"))
        return
    assert problems
    assert all(problem.isprintable() for problem in problems)


# --- manifests ------------------------------------------------------------------------------------------------------

VARIANTS = [
    pytest.param({}, id="defaults"),
    pytest.param({"sidecar": "container"}, id="sidecar as a container"),
    pytest.param({"workspace_claim": "data", "runtime_class": "gvisor"}, id="claim and runtime class"),
    pytest.param({"settings": ["WRAPPER=none"], "node_name": "n1", "image_pull_policy": "Never"}, id="no shell"),
]


@pytest.mark.parametrize("values", VARIANTS)
def test_the_projects_own_policy_accepts_both_pods(values: Json) -> None:
    spec = spec_of(**values)
    assert evaluate(workspace_pod(spec, UID), PolicySettings(container="workspace")) == ()
    # The runner pod holds a token on purpose; the Pod Security Standard is what namespaces enforce.
    assert evaluate(runner_pod(spec), PolicySettings(level=Level.RESTRICTED, session_rules=False)) == ()


@pytest.mark.parametrize("values", VARIANTS)
def test_the_token_is_in_the_sidecar_alone(values: Json) -> None:
    runner, workspace = runner_pod(spec_of(**values)), workspace_pod(spec_of(**values), UID)
    assert runner["spec"]["automountServiceAccountToken"] is False
    assert workspace["spec"]["automountServiceAccountToken"] is False
    assert service_account(spec_of().name)["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in workspace["spec"]
    mounts = {name: [m["name"] for m in item["volumeMounts"]] for name, item in containers_of(runner).items()}
    assert mounts == {"session-proxy": ["session-proxy-token"], "runner": ["tmp"]}
    users = {item["securityContext"]["runAsUser"] for item in containers_of(runner).values()}
    assert len(users) == 2
    assert not {"shareProcessNamespace", "hostPID"} & set(runner["spec"])


@pytest.mark.parametrize("values", VARIANTS)
def test_the_sidecar_accepts_the_settings_that_it_is_given(values: Json) -> None:
    sidecar = containers_of(runner_pod(spec_of(**values)))["session-proxy"]
    pod_fields = {"metadata.uid": UID, "metadata.name": "demo-runner"}
    config = parse_config(
        {
            item["name"]: item["value"] if "value" in item else pod_fields[item["valueFrom"]["fieldRef"]["fieldPath"]]
            for item in sidecar["env"]
        }
    )
    assert (config.session_name, config.workspace_pod, config.workspace_container) == (
        "demo",
        "demo-workspace",
        "workspace",
    )
    assert config.owner_mode is OwnerMode.SELF
    assert config.pod_uid == UID
    pod = runner_pod(spec_of(**values))
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.drain_seconds
    runner = containers_of(pod)["runner"]
    host, port = config.listen_addr
    assert runner["env"] == [{"name": "SESSION_PROXY_URL", "value": f"http://{host}:{port}"}]


def test_everything_but_the_service_account_belongs_to_the_runner_pod() -> None:
    spec = spec_of()
    owned = manifests(spec, UID)
    assert [item["kind"] for item in owned] == ["Role", "RoleBinding", "Pod"]
    for item in owned:
        (reference,) = item["metadata"]["ownerReferences"]
        assert {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")} == {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": "demo-runner",
            "uid": UID,
        }
    assert check_ownership(owned[2], mode=OwnerMode.SELF, own_pod_uid=UID) is None
    assert check_ownership(owned[2], mode=OwnerMode.SELF, own_pod_uid="other") is not None
    assert owned[2]["metadata"]["ownerReferences"][0]["controller"] is True


def test_the_role_allows_what_the_sidecar_asks_for_on_the_one_pod_and_nothing_else() -> None:
    name = spec_of().name
    rules = role(name)["rules"]
    allowed = {(verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert allowed == {(verb, "pods" + "/" * bool(sub) + sub) for verb, sub in NEEDED}
    assert allowed == {(verb, resource) for resource, verbs in ROLE_VERBS for verb in verbs}
    assert all(rule["resourceNames"] == ["demo-workspace"] and rule["apiGroups"] == [""] for rule in rules)
    binding = role_binding(name)
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "demo-proxy"}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "demo-proxy"}]
    assert runner_pod(spec_of())["spec"]["serviceAccountName"] == "demo-proxy"


def test_the_native_sidecar_is_an_init_container_that_stays_and_otherwise_it_comes_first() -> None:
    native = runner_pod(spec_of())["spec"]
    assert [item["name"] for item in native["containers"]] == ["runner"]
    assert [(item["name"], item["restartPolicy"]) for item in native["initContainers"]] == [("session-proxy", "Always")]
    plain = runner_pod(spec_of(sidecar="container"))["spec"]
    assert [item["name"] for item in plain["containers"]] == ["session-proxy", "runner"]
    assert "initContainers" not in plain
    assert "restartPolicy" not in plain["containers"][0]
    assert spec_of().sidecar is Sidecar.NATIVE


def test_a_claim_takes_the_place_of_the_empty_directory() -> None:
    def storage(**values: Any) -> Json:
        volumes: list[Json] = workspace_pod(spec_of(**values), UID)["spec"]["volumes"]
        return next(volume for volume in volumes if volume["name"] == "workspace")

    assert storage() == {"name": "workspace", "emptyDir": {"sizeLimit": "2Gi"}}
    assert storage(workspace_storage="5Gi") == {"name": "workspace", "emptyDir": {"sizeLimit": "5Gi"}}
    assert storage(workspace_claim="data") == {"name": "workspace", "persistentVolumeClaim": {"claimName": "data"}}
    assert workspace_pod(spec_of(workspace_uid="7"), UID)["spec"]["securityContext"]["fsGroup"] == 7


def test_every_option_reaches_the_manifests() -> None:
    spec = spec_of(
        runner_uid="11",
        workspace_uid="12",
        runner_cpu="1",
        runner_memory="64Mi",
        workspace_cpu="2",
        workspace_memory="128Mi",
        runtime_class="gvisor",
        node_name="n1",
        image_pull_policy="IfNotPresent",
        image_pull_secret="registry",
        settings=["EXEC_TIMEOUT_SECONDS=60"],
    )
    runner, workspace = runner_pod(spec), workspace_pod(spec, UID)
    for pod in (runner, workspace):
        assert pod["spec"]["nodeName"] == "n1"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        assert {item["imagePullPolicy"] for item in containers_of(pod).values()} == {"IfNotPresent"}
        assert pod["metadata"]["labels"]["session"] == "demo"
    assert "runtimeClassName" not in runner["spec"]
    assert workspace["spec"]["runtimeClassName"] == "gvisor"
    assert {item["name"]: item["image"] for pod in (runner, workspace) for item in containers_of(pod).values()} == {
        "session-proxy": IMAGES["proxy_image"],
        "runner": IMAGES["runner_image"],
        "workspace": IMAGES["workspace_image"],
    }
    limits = {"requests": {"cpu": "1", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "64Mi"}}
    assert containers_of(runner)["runner"]["resources"] == limits
    limits = {"requests": {"cpu": "2", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": "128Mi"}}
    assert containers_of(workspace)["workspace"]["resources"] == limits
    assert containers_of(runner)["runner"]["securityContext"]["runAsUser"] == 11
    assert containers_of(workspace)["workspace"]["securityContext"]["runAsUser"] == 12
    assert {"name": "EXEC_TIMEOUT_SECONDS", "value": "60"} in containers_of(runner)["session-proxy"]["env"]


def test_a_command_arrives_word_by_word_past_the_expansion_of_kubernetes() -> None:
    assert "command" not in containers_of(runner_pod(spec_of()))["runner"]
    spec = spec_of(runner_command="""sh -c 'echo "$(id)" $$ $HOME' "a b" ''""")
    assert spec.runner_command == ("sh", "-c", 'echo "$(id)" $$ $HOME', "a b", "")
    command = containers_of(runner_pod(spec))["runner"]["command"]
    # Kubernetes makes one $ of two, and leaves $( alone only behind one that was doubled.
    assert [word.replace("$$", "$") for word in command] == list(spec.runner_command)
    assert "$$(id)" in command[2]


@pytest.mark.parametrize("value", ["none", "NONE", " none "])
def test_without_a_shell_the_workspace_runs_its_images_own_command(value: str) -> None:
    def container(**values: Any) -> Json:
        return containers_of(workspace_pod(spec_of(**values), UID))["workspace"]

    assert container()["command"] == ["/bin/sh", "-c", IDLE]
    assert spec_of(settings=[f"WRAPPER={value}"]).wrapper is Wrapper.NONE
    assert "command" not in container(settings=[f"WRAPPER={value}"])
