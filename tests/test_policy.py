"""The Pod Security Standards (cases after the fixtures of admission's own tests), session rules and image rules."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from session_proxy.errors import Violation
from session_proxy.policy import (
    ImageReference,
    Level,
    PolicySettings,
    evaluate,
    parse_image,
    validate_image_prefix,
)

Pod = dict[str, Any]
Path = tuple[str | int, ...]

KINDS = ("containers", "initContainers", "ephemeralContainers")
BASELINE = PolicySettings(level=Level.BASELINE, session_rules=False)
RESTRICTED = PolicySettings(level=Level.RESTRICTED, session_rules=False)
SESSION = PolicySettings(container="workspace")
DIGEST = "sha256:" + "a1" * 32


def container(name: str) -> Pod:
    return {
        "name": name,
        "image": "registry.example.com/team/workspace:1",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def good_pod() -> Pod:
    """Acceptable at every level and under the session rules, with one container of every kind."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "workspace", "annotations": {"example.com/purpose": "test"}},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "initContainers": [container("init")],
            "containers": [container("workspace")],
            "ephemeralContainers": [container("debug")],
            "volumes": [{"name": "work", "emptyDir": {}}],
        },
    }


def put(pod: Pod, path: str, value: object) -> Pod:
    """Return the pod with the dotted path set; list indices are numbers, what is missing is made."""
    result = copy.deepcopy(pod)
    node: Any = result
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        node = node.setdefault(key, {}) if isinstance(key, str) else node[key]
    node[last] = value
    return result


def drop(pod: Pod, path: str) -> Pod:
    """Return the pod without what is at the dotted path."""
    parent, _, last = path.rpartition(".")
    result = copy.deepcopy(pod)
    node: Any = result
    for key in parent.split("."):
        node = node[int(key) if key.isdigit() else key]
    del node[last]
    return result


def found(pod: object, policy: PolicySettings) -> list[tuple[str, str]]:
    return [(violation.rule, violation.field) for violation in evaluate(pod, policy)]  # type: ignore[arg-type]


def only(pod: object, policy: PolicySettings) -> Violation:
    violations = evaluate(pod, policy)  # type: ignore[arg-type]
    assert len(violations) == 1, violations
    return violations[0]


@pytest.mark.parametrize("level", Level)
def test_a_good_pod_is_accepted_at_every_level(level: Level) -> None:
    assert evaluate(good_pod(), PolicySettings(level=level, container="workspace")) == ()


@pytest.mark.parametrize("policy", [BASELINE, PolicySettings(level=Level.PRIVILEGED, session_rules=False)])
def test_a_bare_pod_is_accepted_below_restricted(policy: PolicySettings) -> None:
    assert evaluate({"spec": {"containers": [{"name": "a"}]}}, policy) == ()


# ---------------------------------------------------------------------------------------------------------------------
# Container fields, for every kind of container.


class Case(NamedTuple):
    """Values of a field that a check allows, and those it denies, with the words for the first of these."""

    rule: str
    path: str
    allowed: list[Any]
    denied: list[Any]
    message: str
    field: str | None = None


def handlers(rule_path: str) -> list[Case]:
    return [
        Case(
            "hostProbesAndHostLifecycle",
            f"{rule_path}.{action}.host",
            ["", None],
            ["bad.host", "127.0.0.1", "::1", 7],
            'container "{name}" uses probe or lifecycle host "bad.host"',
        )
        for action in ("httpGet", "tcpSocket")
    ]


BASELINE_CONTAINER_CASES = [
    Case(
        "privileged",
        "securityContext.privileged",
        [False, None],
        [True, "false", 0, 1, [], {}],
        'container "{name}" must not set securityContext.privileged=true',
    ),
    Case(
        "windowsHostProcess",
        "securityContext.windowsOptions.hostProcess",
        [False, None],
        [True, "true", 1],
        'container "{name}" must not set securityContext.windowsOptions.hostProcess=true',
    ),
    Case(
        "capabilities_baseline",
        "securityContext.capabilities.add",
        [
            None,
            [],
            ["AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"],
            ["SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"],
        ],
        [["NET_RAW", "CHOWN", "BPF"], ["ALL"], ["CAP_CHOWN"], ["chown"], [""], [7]],
        'container "{name}" must not include "BPF", "NET_RAW" in securityContext.capabilities.add',
    ),
    Case(
        "hostPorts",
        "ports",
        [None, [], [{"containerPort": 80}], [{"hostPort": 0}], [{"hostPort": None}]],
        [[{"hostPort": 12345}], [{"hostPort": "0"}], [{"hostPort": False}], [{"hostPort": 0.0}], [{"hostPort": -1}]],
        'container "{name}" uses hostPort 12345',
        field="ports[0].hostPort",
    ),
    Case(
        "appArmorProfile",
        "securityContext.appArmorProfile",
        [None, {"type": "RuntimeDefault"}, {"type": "Localhost", "localhostProfile": "x"}],
        [{"type": "Unconfined"}, {"type": ""}, {}, {"type": None}, {"type": "runtimedefault"}],
        'container "{name}" must not set AppArmor profile type to "Unconfined"',
        field="securityContext.appArmorProfile.type",
    ),
    Case(
        "seLinuxOptions",
        "securityContext.seLinuxOptions.type",
        [None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"],
        ["spc_t", "container_t ", 7],
        'container "{name}" set forbidden securityContext.seLinuxOptions: type "spc_t"',
    ),
    Case(
        "seLinuxOptions",
        "securityContext.seLinuxOptions.user",
        [None, ""],
        ["system_u", 0],
        'container "{name}" set forbidden securityContext.seLinuxOptions: user may not be set',
    ),
    Case(
        "seLinuxOptions",
        "securityContext.seLinuxOptions.role",
        [None, ""],
        ["system_r"],
        'container "{name}" set forbidden securityContext.seLinuxOptions: role may not be set',
    ),
    Case(
        "procMount",
        "securityContext.procMount",
        [None, "Default"],
        ["Unmasked", "", "default", True],
        'container "{name}" must not set securityContext.procMount to "Unmasked"',
    ),
    Case(
        "seccompProfile_baseline",
        "securityContext.seccompProfile",
        [None, {"type": "RuntimeDefault"}, {"type": "Localhost", "localhostProfile": "x"}],
        [{"type": "Unconfined"}, {}, {"type": "unknown"}],
        'container "{name}" must not set securityContext.seccompProfile.type to "Unconfined"',
        field="securityContext.seccompProfile.type",
    ),
    *handlers("livenessProbe"),
    *handlers("readinessProbe"),
    *handlers("startupProbe"),
    *handlers("lifecycle.postStart"),
    *handlers("lifecycle.preStop"),
]
RESTRICTED_CONTAINER_CASES = [
    Case(
        "allowPrivilegeEscalation",
        "securityContext.allowPrivilegeEscalation",
        [False],
        [True, None, "false", 0],
        'container "{name}" must set securityContext.allowPrivilegeEscalation=false',
    ),
    Case(
        "capabilities_restricted",
        "securityContext.capabilities.drop",
        [["ALL"], ["NET_RAW", "ALL"]],
        [None, [], ["NET_RAW", "CHOWN", "SYS_ADMIN"], ["all"], "ALL", {"ALL": True}],
        'container "{name}" must set securityContext.capabilities.drop=["ALL"]',
    ),
    Case(
        "capabilities_restricted",
        "securityContext.capabilities.add",
        [None, [], ["NET_BIND_SERVICE"]],
        [["NET_BIND_SERVICE", "CHOWN"], ["ALL"], ["NET_RAW"]],
        'container "{name}" must not include "CHOWN" in securityContext.capabilities.add',
    ),
    Case(
        "runAsNonRoot",
        "securityContext.runAsNonRoot",
        [True, None],
        [False, "true", 1],
        'container "{name}" must not set securityContext.runAsNonRoot=false',
    ),
    Case(
        "runAsUser",
        "securityContext.runAsUser",
        [None, 1, 1000],
        [0, "0", "1000", False, 0.0],
        'container "{name}" must not set runAsUser=0',
    ),
    Case(
        "seccompProfile_restricted",
        "securityContext.seccompProfile",
        [None, {"type": "RuntimeDefault"}, {"type": "Localhost", "localhostProfile": "x"}],
        [{"type": "Unconfined"}, {}],
        'container "{name}" must not set securityContext.seccompProfile.type to "Unconfined"',
        field="securityContext.seccompProfile.type",
    ),
]
# At restricted these replace the check of that field at baseline.
RESTRICTED_IDS = {
    "capabilities_baseline": "capabilities_restricted",
    "procMount": "procMount_restricted",
    "seccompProfile_baseline": "seccompProfile_restricted",
}


def each(cases: list[Case], which: Callable[[Case], list[Any]]) -> list[Any]:
    return [
        pytest.param(case, value, index == 0, id=f"{case.rule}-{case.path}-{value!r}")
        for case in cases
        for index, value in enumerate(which(case))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "value", "_first"), each(BASELINE_CONTAINER_CASES, lambda case: case.allowed))
def test_an_allowed_container_field_is_accepted_at_baseline(case: Case, value: Any, _first: bool, kind: str) -> None:
    assert evaluate(put(good_pod(), f"spec.{kind}.0.{case.path}", value), BASELINE) == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "value", "first"), each(BASELINE_CONTAINER_CASES, lambda case: case.denied))
def test_a_denied_container_field_is_refused_at_baseline(case: Case, value: Any, first: bool, kind: str) -> None:
    pod = put(good_pod(), f"spec.{kind}.0.{case.path}", value)
    field = f"spec.{kind}[0].{case.field or case.path}"
    assert (case.rule, field) in found(pod, BASELINE)
    if first:
        name = pod["spec"][kind][0]["name"]
        assert only(pod, BASELINE).message == case.message.format(name=name)
    assert (RESTRICTED_IDS.get(case.rule, case.rule), field) in found(pod, RESTRICTED)
    assert not {rule for rule, _ in found(pod, RESTRICTED)} & set(RESTRICTED_IDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "value", "_first"), each(RESTRICTED_CONTAINER_CASES, lambda case: case.allowed))
def test_an_allowed_container_field_is_accepted_at_restricted(case: Case, value: Any, _first: bool, kind: str) -> None:
    assert evaluate(put(good_pod(), f"spec.{kind}.0.{case.path}", value), RESTRICTED) == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "value", "first"), each(RESTRICTED_CONTAINER_CASES, lambda case: case.denied))
def test_a_denied_container_field_is_refused_at_restricted(case: Case, value: Any, first: bool, kind: str) -> None:
    pod = put(good_pod(), f"spec.{kind}.0.{case.path}", value)
    assert (case.rule, f"spec.{kind}[0].{case.field or case.path}") in found(pod, RESTRICTED)
    if first:
        name = pod["spec"][kind][0]["name"]
        assert only(pod, RESTRICTED).message == case.message.format(name=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["allowPrivilegeEscalation", "capabilities_restricted"])
def test_a_container_without_a_security_context_is_refused_under_restricted(rule: str, kind: str) -> None:
    pod = drop(good_pod(), f"spec.{kind}.0.securityContext")
    assert rule in {found_rule for found_rule, _ in found(pod, RESTRICTED)}
    assert found(pod, BASELINE) == []


@pytest.mark.parametrize(
    "case", [case for case in RESTRICTED_CONTAINER_CASES if case.rule not in RESTRICTED_IDS.values()], ids=str
)
def test_baseline_does_not_ask_what_only_restricted_asks(case: Case) -> None:
    pod = put(good_pod(), f"spec.containers.0.{case.path}", case.denied[0])
    assert found(pod, BASELINE) == []


# ---------------------------------------------------------------------------------------------------------------------
# Pod fields, and what containers inherit from them.


@pytest.mark.parametrize("key", ["hostNetwork", "hostPID", "hostIPC"])
@pytest.mark.parametrize("value", [False, None])
def test_a_pod_with_namespaces_of_its_own_is_accepted(key: str, value: object) -> None:
    assert evaluate(put(good_pod(), f"spec.{key}", value), RESTRICTED) == ()


@pytest.mark.parametrize("key", ["hostNetwork", "hostPID", "hostIPC"])
@pytest.mark.parametrize("value", [True, "false", 1, 0, {}])
@pytest.mark.parametrize("policy", [BASELINE, RESTRICTED])
def test_a_host_namespace_is_refused(policy: PolicySettings, value: object, key: str) -> None:
    violation = only(put(good_pod(), f"spec.{key}", value), policy)
    assert violation == Violation(
        field=f"spec.{key}",
        value=json.dumps(value),
        expected="false or unset",
        rule="hostNamespaces",
        message=f"host namespaces ({key}={json.dumps(value)})",
    )


POD_CONTEXT_CASES = [
    ("windowsHostProcess", "windowsOptions.hostProcess", True, "hostProcess=true"),
    ("appArmorProfile", "appArmorProfile.type", "Unconfined", 'AppArmor profile type to "Unconfined"'),
    ("seLinuxOptions", "seLinuxOptions.type", "spc_t", 'type "spc_t"'),
    ("seLinuxOptions", "seLinuxOptions.user", "u", "user may not be set"),
    ("seLinuxOptions", "seLinuxOptions.role", "r", "role may not be set"),
    ("seccompProfile_baseline", "seccompProfile.type", "Unconfined", 'seccompProfile.type to "Unconfined"'),
]


@pytest.mark.parametrize(("rule", "path", "value", "words"), POD_CONTEXT_CASES)
def test_a_denied_pod_field_is_refused(rule: str, path: str, value: object, words: str) -> None:
    pod = put(good_pod(), f"spec.securityContext.{path}", value)
    violation = only(pod, BASELINE)
    assert (violation.rule, violation.field) == (rule, f"spec.securityContext.{path}")
    assert violation.message.startswith("pod ")
    assert words in violation.message
    assert found(pod, RESTRICTED) == [(RESTRICTED_IDS.get(rule, rule), f"spec.securityContext.{path}")]


@pytest.mark.parametrize(
    ("rule", "path", "value"), [("runAsNonRoot", "runAsNonRoot", False), ("runAsUser", "runAsUser", 0)]
)
def test_a_root_pod_is_refused_under_restricted(rule: str, path: str, value: object) -> None:
    pod = put(good_pod(), f"spec.securityContext.{path}", value)
    assert found(pod, RESTRICTED) == [(rule, f"spec.securityContext.{path}")]
    assert found(pod, BASELINE) == []


def test_a_root_container_is_refused_under_restricted_though_the_pod_is_not_root() -> None:
    pod = put(good_pod(), "spec.containers.0.securityContext.runAsNonRoot", False)
    violation = only(pod, RESTRICTED)
    assert (violation.value, violation.expected) == ("false", "true")


INHERITED = [
    ("runAsNonRoot", "runAsNonRoot", True, "runAsNonRoot", "pod or {} must set securityContext.runAsNonRoot=true"),
    (
        "seccompProfile_restricted",
        "seccompProfile",
        {"type": "Localhost", "localhostProfile": "x"},
        "seccompProfile.type",
        'pod or {} must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"',
    ),
]


@pytest.mark.parametrize(("rule", "key", "good", "field", "words"), INHERITED)
def test_what_neither_pod_nor_container_sets_is_refused_for_each_container(
    rule: str, key: str, good: object, field: str, words: str
) -> None:
    pod = drop(good_pod(), f"spec.securityContext.{key}")
    violations = evaluate(pod, RESTRICTED)
    order = ("initContainers", "containers", "ephemeralContainers")
    assert [(v.rule, v.field) for v in violations] == [
        (rule, f"spec.{kind}[0].securityContext.{field}") for kind in order
    ]
    assert violations[1].value == "unset"
    assert violations[1].message == words.format('container "workspace"')
    for kind in ("initContainers", "ephemeralContainers"):
        pod = put(pod, f"spec.{kind}.0.securityContext.{key}", good)
    assert found(pod, RESTRICTED) == [(rule, f"spec.containers[0].securityContext.{field}")]
    assert found(put(pod, f"spec.containers.0.securityContext.{key}", good), RESTRICTED) == []


def test_two_bad_containers_give_two_violations() -> None:
    pod = good_pod()
    pod["spec"]["containers"].append(container("second"))
    for index in (0, 1):
        pod = put(pod, f"spec.containers.{index}.securityContext.privileged", True)
    assert found(pod, BASELINE) == [
        ("privileged", f"spec.containers[{index}].securityContext.privileged") for index in (0, 1)
    ]


def test_a_pod_in_a_user_namespace_is_not_let_off() -> None:
    pod = put(good_pod(), "spec.hostUsers", False)
    pod = put(pod, "spec.containers.0.securityContext.procMount", "Unmasked")
    assert [rule for rule, _ in found(pod, BASELINE)] == ["procMount"]
    pod = put(pod, "spec.containers.0.securityContext.runAsUser", 0)
    pod = put(pod, "spec.containers.0.securityContext.runAsNonRoot", False)
    assert [rule for rule, _ in found(pod, RESTRICTED)] == ["runAsNonRoot", "runAsUser", "procMount_restricted"]


SAFE_SYSCTLS = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
]


def test_the_safe_sysctls_are_accepted() -> None:
    sysctls = [{"name": name, "value": "0"} for name in SAFE_SYSCTLS]
    assert evaluate(put(good_pod(), "spec.securityContext.sysctls", sysctls), RESTRICTED) == ()


@pytest.mark.parametrize(
    ("name", "shown"), [("kernel.msgmax", "kernel.msgmax"), ("a\n", "a\\n"), ("", ""), (None, ""), (7, "")]
)
def test_any_other_sysctl_is_refused(name: object, shown: str) -> None:
    pod = put(good_pod(), "spec.securityContext.sysctls", [{"name": SAFE_SYSCTLS[0]}, {"name": name}])
    violation = only(pod, BASELINE)
    assert (violation.rule, violation.field) == ("sysctls", "spec.securityContext.sysctls[1].name")
    assert violation.message == f"forbidden sysctls ({shown})"


APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


@pytest.mark.parametrize("value", ["runtime/default", "localhost/profile", "", None])
def test_a_confining_apparmor_annotation_is_accepted(value: object) -> None:
    pod = good_pod()
    pod["metadata"]["annotations"][f"{APPARMOR}workspace"] = value
    assert evaluate(pod, RESTRICTED) == ()


@pytest.mark.parametrize("value", ["unconfined", "unknown", "localhost", 7, ["runtime/default"]])
@pytest.mark.parametrize("name", ["workspace", "no-such-container", ""])
def test_any_other_apparmor_annotation_is_refused(name: str, value: object) -> None:
    pod = good_pod()
    pod["metadata"]["annotations"][f"{APPARMOR}{name}"] = value
    violation = only(pod, BASELINE)
    assert (violation.rule, violation.field) == ("appArmorProfile", f"metadata.annotations[{APPARMOR}{name}]")
    assert violation.message == (
        f'annotation must not set AppArmor profile type to "{APPARMOR}{name}={json.dumps(value)}"'
    )


def test_the_old_seccomp_annotations_are_not_looked_at() -> None:
    pod = good_pod()
    pod["metadata"]["annotations"] = {
        "seccomp.security.alpha.kubernetes.io/pod": "unconfined",
        "container.seccomp.security.alpha.kubernetes.io/workspace": "unconfined",
    }
    assert evaluate(pod, RESTRICTED) == ()


# ---------------------------------------------------------------------------------------------------------------------
# Volumes.

VOLUMES = ["configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "secret"]
RESTRICTED_VOLUMES = [
    "awsElasticBlockStore",
    "azureDisk",
    "azureFile",
    "cephfs",
    "cinder",
    "fc",
    "flexVolume",
    "flocker",
    "gcePersistentDisk",
    "gitRepo",
    "glusterfs",
    "hostPath",
    "iscsi",
    "nfs",
    "photonPersistentDisk",
    "portworxVolume",
    "quobyte",
    "rbd",
    "scaleIO",
    "storageos",
    "vsphereVolume",
    "somethingNew",
    "EmptyDir",
]


def with_volume(volume: object) -> Pod:
    return put(good_pod(), "spec.volumes", [{"name": "work", "emptyDir": {}}, volume])


@pytest.mark.parametrize("source", VOLUMES)
def test_a_harmless_volume_is_accepted(source: str) -> None:
    assert evaluate(with_volume({"name": "v", source: {}, "hostPath": None}), RESTRICTED) == ()


def test_a_projected_volume_without_a_credential_is_accepted() -> None:
    sources: list[Pod] = [{"configMap": {}}, {"secret": {}}, {"downwardAPI": {}}, {"clusterTrustBundle": {}}]
    assert evaluate(with_volume({"name": "v", "projected": {"sources": sources}}), SESSION) == ()


@pytest.mark.parametrize("source", RESTRICTED_VOLUMES)
def test_any_other_volume_is_refused_under_restricted(source: str) -> None:
    pod = with_volume({"name": "v", source: {}})
    violation = only(pod, RESTRICTED)
    assert (violation.rule, violation.field) == ("restrictedVolumes", f"spec.volumes[1].{source}")
    assert violation.message == f'volume "v" uses restricted volume type "{source}"'
    assert bool(found(pod, BASELINE)) is (source == "hostPath")


def test_a_directory_of_the_node_is_refused_at_baseline() -> None:
    violation = only(with_volume({"name": "v", "hostPath": {"path": "/"}}), BASELINE)
    assert (violation.rule, violation.field) == ("hostPathVolumes", "spec.volumes[1].hostPath")
    assert violation.message == 'hostPath volumes (volume "v")'
    assert violation.value == '{"path": "/"}'


@pytest.mark.parametrize("volume", [{"name": "v"}, {"name": "v", "secret": None}, {}])
def test_a_volume_without_a_source_is_refused_under_restricted(volume: Pod) -> None:
    violation = only(with_volume(volume), RESTRICTED)
    assert (violation.rule, violation.field) == ("restrictedVolumes", "spec.volumes[1]")
    assert violation.message.endswith('uses restricted volume type "unknown"')


def test_a_volume_with_two_sources_is_refused_under_restricted() -> None:
    violation = only(with_volume({"name": "v", "secret": {}, "configMap": {}}), RESTRICTED)
    assert (violation.rule, violation.field) == ("restrictedVolumes", "spec.volumes[1]")
    assert violation.message == 'volume "v" uses more than one volume type "configMap", "secret"'


def test_a_harmless_source_does_not_hide_a_directory_of_the_node() -> None:
    pod = with_volume({"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}})
    assert found(pod, RESTRICTED) == [("restrictedVolumes", "spec.volumes[1].hostPath")]


# ---------------------------------------------------------------------------------------------------------------------
# Windows.


def windows_pod(name: object = "windows") -> Pod:
    context = {"windowsOptions": {"runAsUserName": "ContainerUser"}, "runAsNonRoot": True}
    return {
        "spec": {"os": {"name": name}, "securityContext": context, "containers": [{"name": "a"}]},
    }


def test_a_windows_pod_is_excused_from_escalation_capabilities_and_seccomp() -> None:
    assert evaluate(windows_pod(), RESTRICTED) == ()


@pytest.mark.parametrize("name", ["linux", "Windows", None, ["windows"]])
def test_a_pod_that_is_not_windows_is_not_excused(name: object) -> None:
    rules = {rule for rule, _ in found(windows_pod(name), RESTRICTED)}
    assert rules - {"malformed"} == {
        "allowPrivilegeEscalation",
        "capabilities_restricted",
        "seccompProfile_restricted",
    }


def test_a_windows_pod_is_excused_from_nothing_else() -> None:
    pod = put(windows_pod(), "spec.securityContext", {"windowsOptions": {"hostProcess": True}, "runAsUser": 0})
    assert [rule for rule, _ in found(pod, RESTRICTED)] == ["windowsHostProcess", "runAsNonRoot", "runAsUser"]


# ---------------------------------------------------------------------------------------------------------------------
# Session rules.

EVERY_LEVEL = [PolicySettings(level=level, container="workspace") for level in Level]


@pytest.mark.parametrize("policy", EVERY_LEVEL)
@pytest.mark.parametrize(("value", "shown"), [(True, "true"), (None, "unset"), (0, "0"), ("false", '"false"')])
def test_a_pod_that_may_have_a_token_mounted_is_refused(policy: PolicySettings, value: object, shown: str) -> None:
    violation = only(put(good_pod(), "spec.automountServiceAccountToken", value), policy)
    assert (violation.rule, violation.field) == ("session_token", "spec.automountServiceAccountToken")
    assert (violation.value, violation.expected) == (shown, "false")


@pytest.mark.parametrize("policy", EVERY_LEVEL)
@pytest.mark.parametrize("key", ["serviceAccountToken", "podCertificate"])
def test_a_projected_credential_is_refused(policy: PolicySettings, key: str) -> None:
    sources = [{"configMap": {}}, {key: {"path": "token"}}]
    violation = only(with_volume({"name": "v", "projected": {"sources": sources}}), policy)
    assert (violation.rule, violation.field) == ("session_token", f"spec.volumes[1].projected.sources[1].{key}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mount_path",
    [
        "/var/run/secrets/kubernetes.io/serviceaccount",
        "/var/run/secrets/kubernetes.io/serviceaccount/",
        "/var/run/secrets/kubernetes.io/serviceaccount/token",
        "/run/secrets/kubernetes.io/serviceaccount",
        "//var/run/../run/./secrets//kubernetes.io/serviceaccount",
        "var/run/secrets/kubernetes.io/serviceaccount",
        r"C:\var\run\secrets\kubernetes.io\serviceaccount",
    ],
)
def test_a_volume_mounted_where_tokens_are_is_refused(mount_path: str, kind: str) -> None:
    mounts = [{"name": "work", "mountPath": "/work"}, {"name": "work", "mountPath": mount_path}]
    pod = put(good_pod(), f"spec.{kind}.0.volumeMounts", mounts)
    assert found(pod, SESSION) == [("session_token", f"spec.{kind}[0].volumeMounts[1].mountPath")]


@pytest.mark.parametrize("mount_path", ["/", "/var/run/secrets/kubernetes.io/serviceaccount2", "/work", ""])
def test_a_volume_mounted_elsewhere_is_accepted(mount_path: str) -> None:
    pod = put(good_pod(), "spec.containers.0.volumeMounts", [{"name": "work", "mountPath": mount_path}])
    assert evaluate(pod, SESSION) == ()


@pytest.mark.parametrize("policy", EVERY_LEVEL)
@pytest.mark.parametrize("value", [True, "false", 1])
def test_a_shared_process_namespace_is_refused(policy: PolicySettings, value: object) -> None:
    pod = put(good_pod(), "spec.shareProcessNamespace", value)
    assert found(pod, policy) == [("session_process_namespace", "spec.shareProcessNamespace")]
    assert found(put(pod, "spec.shareProcessNamespace", False), policy) == []


def test_without_session_rules_only_the_standards_count() -> None:
    pod = put(drop(good_pod(), "spec.automountServiceAccountToken"), "spec.shareProcessNamespace", True)
    policy = PolicySettings(container="x", allowed_images=("other",), require_image_digest=True, session_rules=False)
    assert evaluate(pod, policy) == ()


@pytest.mark.parametrize("policy", EVERY_LEVEL)
def test_a_pod_without_the_workspace_container_is_refused(policy: PolicySettings) -> None:
    pod = put(good_pod(), "spec.containers.0.name", "other")
    violation = only(pod, policy)
    assert (violation.rule, violation.field, violation.value) == ("session_container", "spec.containers", '["other"]')


@pytest.mark.parametrize("name", ["init", "debug"])
def test_an_init_or_ephemeral_container_is_no_workspace(name: str) -> None:
    assert found(good_pod(), PolicySettings(container=name)) == [("session_container", "spec.containers")]


# ---------------------------------------------------------------------------------------------------------------------
# Images.


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest"),
    [
        ("busybox", "docker.io", "library/busybox", None, None),
        ("busybox:1.37", "docker.io", "library/busybox", "1.37", None),
        ("foo/bar", "docker.io", "foo/bar", None, None),
        ("docker.io/busybox", "docker.io", "library/busybox", None, None),
        ("index.docker.io/busybox", "docker.io", "library/busybox", None, None),
        ("DOCKER.io/foo/bar", "docker.io", "foo/bar", None, None),
        ("localhost/x", "localhost", "x", None, None),
        ("localhost:5000/x:y", "localhost:5000", "x", "y", None),
        ("Registry/x", "registry", "x", None, None),
        ("registry:5000/a/b/c", "registry:5000", "a/b/c", None, None),
        ("[fd00::1]:5000/x", "[fd00::1]:5000", "x", None, None),
        (f"busybox@{DIGEST}", "docker.io", "library/busybox", None, DIGEST),
        (f"r.example.com/a__b/c-d.e:1@{DIGEST}", "r.example.com", "a__b/c-d.e", "1", DIGEST),
        ("r.example.com/x@sha512:" + "0" * 128, "r.example.com", "x", None, "sha512:" + "0" * 128),
    ],
)
def test_an_image_reference_is_read_as_the_runtime_reads_it(
    text: str, registry: str, repository: str, tag: str | None, digest: str | None
) -> None:
    assert parse_image(text) == ImageReference(registry, repository, tag, digest)


MALFORMED_IMAGES = [
    " busybox",
    "busybox\n",
    "Busybox",
    "busybox:",
    "busybox:-x",
    "busybox:" + "x" * 129,
    "busybox@",
    "busybox@sha256:" + "a" * 63,
    "busybox@sha256:" + "A" * 64,
    "busybox@sha512:" + "a" * 64,
    "busybox@md5:" + "a" * 32,
    "/busybox",
    "a//b",
    "a/b/",
    "a..b/c",
    "a.b-/c",
    "a.b:x/c",
    "r.example.com/",
    "r.example.com/A",
    "r.example.com/" + "a" * 256,
    "https://r.example.com/x",
    "a" * 2000,
    "a/../b",
    "büsybox",
]


@pytest.mark.parametrize("text", ["", *MALFORMED_IMAGES])
def test_a_malformed_image_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="it"):
        parse_image(text)


def image_violations(image: object, *allowed: str, **more: Any) -> list[tuple[str, str]]:
    pod = {"spec": {"automountServiceAccountToken": False, "containers": [{"name": "a", "image": image}]}}
    return found(pod, PolicySettings(level=Level.PRIVILEGED, allowed_images=allowed, **more))


DENIED_IMAGE = [("session_image", "spec.containers[0].image")]
UNPINNED_IMAGE = [("session_image_digest", "spec.containers[0].image")]


@pytest.mark.parametrize(
    ("entry", "image"),
    [
        ("docker.io", "busybox"),
        ("index.docker.io", "docker.io/foo/bar"),
        ("docker.io/library", "docker.io/library/busybox:1"),
        ("docker.io/library", "busybox:1"),
        ("busybox", "docker.io/library/busybox:1"),
        ("foo/bar", f"foo/bar@{DIGEST}"),
        ("registry.example.com", "registry.example.com/x"),
        ("registry.example.com", "Registry.EXAMPLE.com/x"),
        ("Registry.Example.com/team", "registry.example.com/team/x/y:1"),
        ("registry.example.com/team/x", "registry.example.com/team/x"),
        ("localhost", "localhost/x"),
        ("localhost:5000", "localhost:5000/x"),
    ],
)
def test_an_image_below_an_allowed_prefix_is_accepted(entry: str, image: str) -> None:
    assert validate_image_prefix(entry) is None
    assert image_violations(image, "other.example.com", entry) == []


@pytest.mark.parametrize(
    ("entry", "image"),
    [
        ("docker.io/lib", "docker.io/library/busybox"),
        ("registry.example.com/team", "registry.example.com/team-evil/x"),
        ("registry.example.com/team", "registry.example.com.evil/team/x"),
        ("registry.example.com/team", "evil/registry.example.com/team/x"),
        ("registry.example.com/team", "registry.example.com:5000/team/x"),
        ("registry.example.com/team", "registry.example.com/tea"),
        ("registry.example.com", "registry.example.com.evil/x"),
        ("registry.example.com/team/x", "registry.example.com/team/xy"),
        ("localhost:5000", "localhost/x"),
        ("localhost:5000", "localhost:50001/x"),
        ("busybox", "evil/busybox"),
        ("busybox", "busybox.evil/busybox"),
        ("library", "busybox"),
    ],
)
def test_an_image_beside_an_allowed_prefix_is_refused(entry: str, image: str) -> None:
    assert validate_image_prefix(entry) is None
    assert image_violations(image, entry) == DENIED_IMAGE


def test_a_refused_image_is_named_in_full() -> None:
    pod = put(good_pod(), "spec.containers.0.image", "foo/bar:1")
    violation = only(pod, PolicySettings(allowed_images=("registry.example.com/team",)))
    assert violation == Violation(
        field="spec.containers[0].image",
        value='"foo/bar:1"',
        expected="below one of registry.example.com/team",
        rule="session_image",
        message='container "workspace" uses image "docker.io/foo/bar", which is not allowed',
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_of_every_kind_of_container_counts(kind: str) -> None:
    pod = put(good_pod(), f"spec.{kind}.0.image", "evil/x")
    policy = PolicySettings(allowed_images=("registry.example.com/team",))
    assert found(pod, policy) == [("session_image", f"spec.{kind}[0].image")]


@pytest.mark.parametrize("image", [*MALFORMED_IMAGES, 7, ["busybox"]])
def test_a_malformed_image_is_a_violation_whatever_is_allowed(image: object) -> None:
    assert image_violations(image) == DENIED_IMAGE
    assert image_violations(image, "docker.io") == DENIED_IMAGE


@pytest.mark.parametrize("image", [None, ""])
def test_a_missing_image_is_a_violation_where_images_are_restricted(image: object) -> None:
    assert image_violations(image) == []
    assert image_violations(image, "docker.io") == DENIED_IMAGE
    assert image_violations(image, require_image_digest=True) == UNPINNED_IMAGE


@pytest.mark.parametrize("digest", [DIGEST, "sha512:" + "b" * 128])
def test_a_pinned_image_is_accepted(digest: str) -> None:
    assert image_violations(f"busybox:1@{digest}", "busybox", require_image_digest=True) == []


def test_an_image_that_is_not_pinned_is_refused_where_a_digest_is_demanded() -> None:
    assert image_violations("busybox:1", "busybox", require_image_digest=True) == UNPINNED_IMAGE
    assert image_violations("busybox@sha256:abc", require_image_digest=True) == DENIED_IMAGE + UNPINNED_IMAGE


MALFORMED_PREFIXES = [
    "",
    " ",
    "*",
    "docker.io/*",
    "docker.io/",
    "/docker.io",
    "busybox:latest",
    "r.example.com/x:1",
    f"r.example.com/x@{DIGEST}",
    "https://r.example.com",
    "r..example.com",
    "UPPER/Case",
    "a" * 2000,
]


@pytest.mark.parametrize("entry", MALFORMED_PREFIXES)
def test_a_malformed_prefix_is_reported_and_allows_nothing(entry: str) -> None:
    problem = validate_image_prefix(entry)
    assert problem is not None
    assert " is not a registry or repository: " in problem
    assert image_violations("busybox", entry) == DENIED_IMAGE
    assert image_violations("r.example.com/x:1", entry) == DENIED_IMAGE


# ---------------------------------------------------------------------------------------------------------------------
# Failing closed.


@pytest.mark.parametrize(
    ("pod", "field"),
    [
        (None, "pod"),
        ([], "pod"),
        ({}, "spec"),
        ({"spec": None}, "spec"),
        ({"spec": []}, "spec"),
        ({"spec": {}}, "spec.containers"),
        ({"spec": {"containers": []}}, "spec.containers"),
        ({"spec": {"containers": {}}}, "spec.containers"),
        ({"spec": {"containers": [None]}}, "spec.containers[0]"),
        ({"spec": {"containers": [[]]}}, "spec.containers[0]"),
        ({"spec": {"containers": [{"name": 7}]}}, "spec.containers[0].name"),
        ({"metadata": "x", "spec": {"containers": [{}]}}, "metadata"),
    ],
)
@pytest.mark.parametrize("level", Level)
def test_a_malformed_pod_is_refused_at_every_level(level: Level, pod: object, field: str) -> None:
    assert ("malformed", field) in found(pod, PolicySettings(level=level, session_rules=False))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.volumes", {}, "object where a list must be"),
        ("spec.volumes", "x", "string where a list must be"),
        ("spec.volumes.0.emptyDir", 1.5, "number where an object must be"),
        ("spec.securityContext", [], "list where an object must be"),
        ("spec.os", "windows", "string where an object must be"),
        ("spec.ephemeralContainers", True, "boolean where a list must be"),
        ("spec.containers.0.securityContext", 7, "integer where an object must be"),
        ("spec.containers.0.securityContext.capabilities.add", "ALL", "string where a list must be"),
        ("spec.containers.0.livenessProbe", [], "list where an object must be"),
        ("spec.containers.0.ports", {"hostPort": 80}, "object where a list must be"),
        ("metadata.annotations", [], "list where an object must be"),
        ("metadata.annotations.x", 7, "integer where a string must be"),
        ("spec.securityContext.sysctls", {1, 2}, "set where a list must be"),
    ],
)
def test_what_has_a_wrong_type_is_refused(path: str, value: object, message: str) -> None:
    violations = {violation.field: violation for violation in evaluate(put(good_pod(), path, value), BASELINE)}
    violation = violations["spec.volumes[0].emptyDir" if "emptyDir" in path else path.replace(".0", "[0]")]
    assert (violation.rule, violation.message) == ("malformed", message)


@pytest.mark.parametrize("path", ["projected", "projected.sources", "projected.sources.0"])
@pytest.mark.parametrize("value", ["x", 7, True])
def test_a_projected_volume_that_is_malformed_is_refused(path: str, value: object) -> None:
    pod = put(good_pod(), "spec.volumes", [{"name": "v", "projected": {"sources": [{}]}}])
    field = f"spec.volumes[0].{path.replace('.0', '[0]')}"
    assert ("malformed", field) in found(put(pod, f"spec.volumes.0.{path}", value), SESSION)


def test_a_field_with_a_wrong_type_is_reported_once() -> None:
    assert found(put(good_pod(), "spec.hostPID", "true"), BASELINE) == [("hostNamespaces", "spec.hostPID")]


def test_what_stands_in_a_field_is_shortened_and_escaped() -> None:
    long = only(put(good_pod(), "spec.hostPID", "x" * 200), BASELINE)
    assert len(long.value) == 80
    assert long.value.endswith("x...")
    pod = put(good_pod(), "spec.containers.0.name", "a\n\x1b\ud800")
    assert only(put(pod, "spec.containers.0.securityContext.privileged", True), BASELINE).message == (
        'container "a\\n\\u001b\\ud800" must not set securityContext.privileged=true'
    )
    circular: list[object] = []
    circular.append(circular)
    assert only(put(good_pod(), "metadata.labels", {}) | {"metadata": circular}, BASELINE).value == "<list>"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["windows", "Default", "ALL", "RuntimeDefault", "docker.io/library/busybox"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def paths_of(value: object, path: Path = ()) -> Iterator[Path]:
    if path:
        yield path
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from paths_of(member, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths_of(item, (*path, index))


def full_pod() -> Pod:
    """An acceptable pod that sets everything the rules read."""
    pod = good_pod()
    spec = pod["spec"]
    context = {
        "appArmorProfile": {"type": "RuntimeDefault"},
        "runAsUser": 1000,
        "seLinuxOptions": {"type": "container_t", "user": "", "role": ""},
        "windowsOptions": {"hostProcess": False},
    }
    spec |= {"hostNetwork": False, "hostPID": False, "hostIPC": False, "shareProcessNamespace": False}
    spec["os"] = {"name": "linux"}
    spec["securityContext"] |= context | {"sysctls": [{"name": "net.ipv4.tcp_rmem"}]}
    spec["volumes"].append({"name": "p", "projected": {"sources": [{"configMap": {}}]}})
    pod["metadata"]["annotations"][f"{APPARMOR}workspace"] = "runtime/default"
    handler = {"httpGet": {"host": ""}, "tcpSocket": {"host": ""}}
    for kind in KINDS:
        body = spec[kind][0]
        body["securityContext"] |= copy.deepcopy(context) | {
            "privileged": False,
            "procMount": "Default",
            "runAsNonRoot": True,
            "seccompProfile": {"type": "Localhost"},
        }
        body["securityContext"]["capabilities"]["add"] = ["NET_BIND_SERVICE"]
        body |= {
            "ports": [{"hostPort": 0}],
            "volumeMounts": [{"name": "work", "mountPath": "/work"}],
            "lifecycle": {"postStart": handler, "preStop": handler},
            "livenessProbe": handler,
            "readinessProbe": handler,
            "startupProbe": handler,
        }
    return pod


def replaced(pod: Pod, path: Path, value: object) -> Pod:
    result = copy.deepcopy(pod)
    node: Any = result
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return result


FULL_POD = full_pod()
FULL_PATHS = sorted(paths_of(FULL_POD), key=str)
# What no rule reads, and the API server alone vouches for.
UNREAD = {"apiVersion", "kind"}
READ_PATHS = [
    path for path in FULL_PATHS if path[0] not in UNREAD and path != ("metadata", "name") and path[-2:] != (0, "name")
]
EXAMPLES = settings(max_examples=200, deadline=None)


def test_the_pod_that_sets_everything_is_accepted() -> None:
    assert evaluate(FULL_POD, SESSION) == ()


@EXAMPLES
@given(path=st.sampled_from(FULL_PATHS), value=JSON, level=st.sampled_from(Level))
def test_no_json_in_place_of_a_subtree_raises(path: Path, value: object, level: Level) -> None:
    policy = PolicySettings(level, ("docker.io",), require_image_digest=True, container="workspace")
    for violation in evaluate(replaced(FULL_POD, path, value), policy):
        assert json.dumps(violation.to_json()).isascii()
        assert len(violation.value) <= 80


@EXAMPLES
@given(value=JSON)
def test_no_json_in_place_of_a_pod_is_accepted(value: Any) -> None:
    assert evaluate(value, RESTRICTED)


def kind_of(value: object) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


@EXAMPLES
@given(path=st.sampled_from(READ_PATHS), value=JSON)
def test_a_subtree_of_another_type_is_never_accepted(path: Path, value: object) -> None:
    original: Any = FULL_POD
    for key in path:
        original = original[key]
    if value is None or kind_of(value) == kind_of(original):
        return
    assert evaluate(replaced(FULL_POD, path, value), SESSION), (path, value)


BAD_EVERYWHERE = {
    "metadata": {"annotations": {f"{APPARMOR}workspace": "unconfined"}},
    "spec": {
        "automountServiceAccountToken": True,
        "hostPID": True,
        "hostNetwork": True,
        "volumes": [{"name": "v", "hostPath": {"path": "/"}}],
        **{kind: [{"name": kind, "securityContext": {"privileged": True}} for _ in range(2)] for kind in KINDS},
    },
}


@EXAMPLES
@given(path=st.sampled_from(sorted(paths_of(BAD_EVERYWHERE), key=str)), value=JSON, level=st.sampled_from(Level))
def test_no_json_turns_a_bad_pod_into_a_good_one(path: Path, value: object, level: Level) -> None:
    policy = PolicySettings(level=level, container="workspace")
    assert evaluate(replaced(BAD_EVERYWHERE, path, value), policy)
