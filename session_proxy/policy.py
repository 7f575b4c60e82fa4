"""What a workspace pod must be before a command may run in it: a pure function from pod JSON to violations.

Three groups of rules, all on the raw JSON that the API server sent (typed models drop fields they do not know):

* **Pod Security Standards** (https://kubernetes.io/docs/concepts/security/pod-security-standards/), ``baseline`` and
  ``restricted`` in the version of Kubernetes 1.36. Each check carries the id, the level and the words of Kubernetes'
  own admission (``k8s.io/pod-security-admission/policy/check_*.go``); a ``restricted`` check replaces the ``baseline``
  ones that it overrides there, and a Windows pod is excused from what admission excuses it from. Two deliberate
  differences, both stricter: the relaxations for pods in a user namespace (KEP-127: ``hostUsers: false`` lifts
  ``procMount`` at baseline and ``runAsNonRoot`` and ``runAsUser`` at restricted) are **not** granted, because a node
  without that support runs such a pod with the node's own UIDs; and a volume that names more than one source is denied.
* **Session rules**: no API credential in the workspace, no shared process namespace, images from where they may come.
* **Shape**: what the rules read must have the type that Kubernetes gives it. An explicit ``null`` means unset, as it
  does in Kubernetes; everything else of a wrong type is a violation, so nothing malformed is ever passed over.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from posixpath import normpath
from typing import Any, NamedTuple, TypeAlias

from session_proxy.errors import Violation


class Level(StrEnum):
    """A level of the Pod Security Standards; each includes the ones before it."""

    PRIVILEGED = "privileged"
    BASELINE = "baseline"
    RESTRICTED = "restricted"


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What is demanded of a pod.

    ``allowed_images`` are registry or repository prefixes, empty for any; ``container`` is the container that commands
    run in, None where there is none to name (offline); ``session_rules`` False leaves the Pod Security Standards alone.
    """

    level: Level = Level.RESTRICTED
    allowed_images: tuple[str, ...] = ()
    require_image_digest: bool = False
    container: str | None = None
    session_rules: bool = True


def evaluate(pod: Mapping[str, Any], settings: PolicySettings) -> tuple[Violation, ...]:
    """Return every violation of the pod (or pod template), ``()`` when it is acceptable.

    Never raises on what the JSON holds. A field is reported by the rules it breaks, and as malformed only when no rule
    reports it.
    """
    view = _Pod.of(pod)
    found: list[Violation] = []
    for check in _checks_of(settings.level):
        found += (_violation(check.id, finding) for finding in check.find(view))
    if settings.session_rules:
        for rule in _SESSION_RULES:
            found += (_violation(rule.id, finding) for finding in rule.find(view, settings))
    reported = {violation.field for violation in found}
    malformed = [_violation("malformed", finding) for finding in _malformed(pod) if finding.field not in reported]
    return (*malformed, *found)


# ---------------------------------------------------------------------------------------------------------------------
# Reading raw JSON. These never raise; what they pass over because of its type, _malformed reports.


class _Finding(NamedTuple):
    field: str
    value: object
    expected: str
    message: str


class _SecurityContext(NamedTuple):
    """A securityContext and who set it: ``pod`` or ``container "x"``."""

    setter: str
    path: str
    body: Mapping[str, Any]


class _Container(NamedTuple):
    setter: str
    path: str
    body: Mapping[str, Any]


class _Pod(NamedTuple):
    """What the rules look at; containers in the order in which admission visits them."""

    annotations: Mapping[str, Any]
    spec: Mapping[str, Any]
    containers: tuple[_Container, ...]
    own_context: _SecurityContext
    container_contexts: tuple[_SecurityContext, ...]

    @classmethod
    def of(cls, pod: object) -> "_Pod":
        spec = _object(_object(pod).get("spec"))
        containers = tuple(
            _Container(f"container {_quote(_text(body.get('name')))}", path, body)
            for kind in _CONTAINER_KINDS
            for path, body in _objects(f"spec.{kind}", spec.get(kind))
        )
        return cls(
            annotations=_object(_object(_object(pod).get("metadata")).get("annotations")),
            spec=spec,
            containers=containers,
            own_context=_SecurityContext("pod", "spec.securityContext", _object(spec.get("securityContext"))),
            container_contexts=tuple(
                _SecurityContext(setter, f"{path}.securityContext", _object(body.get("securityContext")))
                for setter, path, body in containers
            ),
        )

    @property
    def windows(self) -> bool:
        return _object(self.spec.get("os")).get("name") == "windows"

    @property
    def volumes(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        for path, body in _objects("spec.volumes", self.spec.get("volumes")):
            yield path, _text(body.get("name")), body

    @property
    def contexts(self) -> tuple[_SecurityContext, ...]:
        return (self.own_context, *self.container_contexts)


_CONTAINER_KINDS = ("initContainers", "containers", "ephemeralContainers")


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(path: str, value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, item in enumerate(_items(value)):
        if isinstance(item, Mapping):
            yield f"{path}[{index}]", item


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _one_of(value: object, allowed: Iterable[str]) -> bool:
    return isinstance(value, str) and value in allowed


def _unset_or_false(value: object) -> bool:
    # By identity: 0 == False, and a number is not what Kubernetes takes for a boolean.
    return value is None or value is False


_SHOWN_CHARACTERS = 80


def _render(value: object) -> str:
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _quote(text: str) -> str:
    # ASCII, so that a name with control characters or lone surrogates can go into logs and responses.
    return json.dumps(text)


def _escape(text: str) -> str:
    return _quote(text)[1:-1]


def _join_quoted(values: Iterable[object]) -> str:
    return ", ".join(sorted({_render(value) for value in values}))


_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def _member(path: str, key: object) -> str:
    name = str(key)
    if _PLAIN_NAME.fullmatch(name):
        return f"{path}.{name}" if path else name
    return f"{path}[{_escape(name)}]"


def _violation(rule: str, finding: _Finding) -> Violation:
    shown = "unset" if finding.value is None else _render(finding.value)
    return Violation(finding.field, shown, finding.expected, rule, finding.message)


# ---------------------------------------------------------------------------------------------------------------------
# Shape: the types of everything that a rule reads. A string names a JSON type, [x] is a list of x, {} an object with
# the members named and "*" for every other member.

_Shape: TypeAlias = "str | list[_Shape] | dict[str, _Shape]"

_PROFILE: _Shape = {"type": "string"}
_HANDLER: _Shape = {"httpGet": {"host": "string"}, "tcpSocket": {"host": "string"}}
_CONTEXT: dict[str, _Shape] = {
    "appArmorProfile": _PROFILE,
    "runAsNonRoot": "boolean",
    "runAsUser": "integer",
    "seLinuxOptions": {"type": "string", "user": "string", "role": "string"},
    "seccompProfile": _PROFILE,
    "windowsOptions": {"hostProcess": "boolean"},
}
_CONTAINER: _Shape = {
    "name": "string",
    "image": "string",
    "securityContext": {
        **_CONTEXT,
        "allowPrivilegeEscalation": "boolean",
        "capabilities": {"add": ["string"], "drop": ["string"]},
        "privileged": "boolean",
        "procMount": "string",
    },
    "ports": [{"hostPort": "integer"}],
    "livenessProbe": _HANDLER,
    "readinessProbe": _HANDLER,
    "startupProbe": _HANDLER,
    "lifecycle": {"postStart": _HANDLER, "preStop": _HANDLER},
    "volumeMounts": [{"mountPath": "string"}],
}
_POD: _Shape = {
    "metadata": {"annotations": {"*": "string"}},
    "spec": {
        "automountServiceAccountToken": "boolean",
        "hostIPC": "boolean",
        "hostNetwork": "boolean",
        "hostPID": "boolean",
        "os": {"name": "string"},
        "securityContext": {**_CONTEXT, "sysctls": [{"name": "string"}]},
        "shareProcessNamespace": "boolean",
        "volumes": [{"name": "string", "projected": {"sources": [{"*": {}}]}, "*": {}}],
        "initContainers": [_CONTAINER],
        "containers": [_CONTAINER],
        "ephemeralContainers": [_CONTAINER],
    },
}


def _malformed(pod: object) -> Iterator[_Finding]:
    """Report what has a wrong type, and what no pod is without: a spec with at least one container."""
    yield from _misshapen("", pod, _POD)
    spec = _object(pod).get("spec")
    if spec is None:
        yield _Finding("spec", spec, "an object", "a pod must have a spec")
    elif isinstance(spec, Mapping) and spec.get("containers") in (None, []):
        yield _Finding(
            "spec.containers", spec.get("containers"), "a list of containers", "a pod must have at least one container"
        )


def _misshapen(path: str, value: object, shape: _Shape) -> Iterator[_Finding]:
    if isinstance(shape, str):
        wanted = f"a {shape}" if shape != "integer" else "an integer"
        if _json_type(value) != shape:
            yield _wrong_type(path, value, wanted)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield _wrong_type(path, value, "a list")
            return
        for index, item in enumerate(value):
            yield from _misshapen(f"{path}[{index}]", item, shape[0])
    elif not isinstance(value, Mapping):
        yield _wrong_type(path, value, "an object")
    else:
        for key, member in value.items():
            member_shape = shape.get(key, shape.get("*"))
            if member is not None and member_shape is not None:
                yield from _misshapen(_member(path, key), member, member_shape)


def _wrong_type(path: str, value: object, wanted: str) -> _Finding:
    return _Finding(path or "pod", value, wanted, f"{_json_type(value)} where {wanted} must be")


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, str):
        return "string"
    return {type(None): "null", list: "list", dict: "object", float: "number"}.get(type(value), type(value).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Pod Security Standards, baseline.


def _windows_host_process(pod: _Pod) -> Iterator[_Finding]:
    """Refuse windowsOptions.hostProcess, of the pod and of every container."""
    for setter, path, body in pod.contexts:
        value = _object(body.get("windowsOptions")).get("hostProcess")
        if not _unset_or_false(value):
            yield _Finding(
                f"{path}.windowsOptions.hostProcess",
                value,
                "false or unset",
                f"{setter} must not set securityContext.windowsOptions.hostProcess={_render(value)}",
            )


def _host_namespaces(pod: _Pod) -> Iterator[_Finding]:
    """Refuse the node's network, process and IPC namespaces."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        value = pod.spec.get(key)
        if not _unset_or_false(value):
            yield _Finding(f"spec.{key}", value, "false or unset", f"host namespaces ({key}={_render(value)})")


def _privileged(pod: _Pod) -> Iterator[_Finding]:
    """Refuse privileged containers."""
    for setter, path, body in pod.container_contexts:
        value = body.get("privileged")
        if not _unset_or_false(value):
            yield _Finding(
                f"{path}.privileged",
                value,
                "false or unset",
                f"{setter} must not set securityContext.privileged={_render(value)}",
            )


_BASELINE_CAPABILITIES = (
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
)


def _capabilities_baseline(pod: _Pod) -> Iterator[_Finding]:
    """Refuse capabilities beyond the default set."""
    for context in pod.container_contexts:
        yield from _added_capabilities(context, _BASELINE_CAPABILITIES)


def _added_capabilities(context: _SecurityContext, allowed: tuple[str, ...]) -> Iterator[_Finding]:
    added = _object(context.body.get("capabilities")).get("add")
    bad = [capability for capability in _items(added) if not _one_of(capability, allowed)]
    if bad:
        yield _Finding(
            f"{context.path}.capabilities.add",
            added,
            f"unset, or only {', '.join(allowed)}",
            f"{context.setter} must not include {_join_quoted(bad)} in securityContext.capabilities.add",
        )


def _host_path_volumes(pod: _Pod) -> Iterator[_Finding]:
    """Refuse directories of the node."""
    for path, name, body in pod.volumes:
        value = body.get("hostPath")
        if value is not None:
            yield _Finding(f"{path}.hostPath", value, "unset", f"hostPath volumes (volume {_quote(name)})")


def _host_ports(pod: _Pod) -> Iterator[_Finding]:
    """Refuse ports of the node."""
    for container in pod.containers:
        for path, body in _objects(f"{container.path}.ports", container.body.get("ports")):
            value = body.get("hostPort")
            if value is not None and not (_json_type(value) == "integer" and value == 0):
                yield _Finding(
                    f"{path}.hostPort", value, "0 or unset", f"{container.setter} uses hostPort {_render(value)}"
                )


_CONFINED = ("RuntimeDefault", "Localhost")
_APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"


def _app_armor_profile(pod: _Pod) -> Iterator[_Finding]:
    """Refuse AppArmor profiles other than the runtime's and the node's own, in fields and in the old annotations."""
    for setter, path, body in pod.contexts:
        profile = body.get("appArmorProfile")
        value = _object(profile).get("type")
        if profile is not None and not _one_of(value, _CONFINED):
            yield _Finding(
                f"{path}.appArmorProfile.type",
                value,
                "RuntimeDefault or Localhost, or no appArmorProfile",
                f"{setter} must not set AppArmor profile type to {_shown_type(value)}",
            )
    for key, value in pod.annotations.items():
        # Admission looks at every annotation with the prefix, also one that names no container of the pod.
        if not str(key).startswith(_APPARMOR_ANNOTATION) or value in (None, "", "runtime/default"):
            continue
        if not _text(value).startswith("localhost/"):
            yield _Finding(
                _member("metadata.annotations", key),
                value,
                "runtime/default, localhost/<profile> or unset",
                f'annotation must not set AppArmor profile type to "{_escape(str(key))}={_render(value)}"',
            )


def _shown_type(value: object) -> str:
    return _render("" if value is None else value)


_SELINUX_TYPES = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")


def _selinux_options(pod: _Pod) -> Iterator[_Finding]:
    """Refuse SELinux types other than those made for containers, and any user or role."""
    for setter, path, body in pod.contexts:
        options = _object(body.get("seLinuxOptions"))
        forbidden = f"{setter} set forbidden securityContext.seLinuxOptions: "
        value = options.get("type")
        if value is not None and not _one_of(value, _SELINUX_TYPES):
            yield _Finding(
                f"{path}.seLinuxOptions.type",
                value,
                f"unset, or one of {', '.join(_SELINUX_TYPES[1:])}",
                f"{forbidden}type {_render(value)}",
            )
        for key in ("user", "role"):
            value = options.get(key)
            if value not in (None, ""):
                yield _Finding(f"{path}.seLinuxOptions.{key}", value, "unset", f"{forbidden}{key} may not be set")


def _proc_mount(pod: _Pod) -> Iterator[_Finding]:
    """Refuse an unmasked /proc."""
    for setter, path, body in pod.container_contexts:
        value = body.get("procMount")
        if value not in (None, "Default"):
            yield _Finding(
                f"{path}.procMount",
                value,
                "Default or unset",
                f"{setter} must not set securityContext.procMount to {_render(value)}",
            )


def _seccomp_baseline(pod: _Pod) -> Iterator[_Finding]:
    """Refuse an unconfined seccomp profile. Admission stopped reading the old annotations with policy version 1.19."""
    for context in pod.contexts:
        yield from _bad_seccomp_profile(context)


def _bad_seccomp_profile(context: _SecurityContext) -> Iterator[_Finding]:
    profile = context.body.get("seccompProfile")
    value = _object(profile).get("type")
    if profile is not None and not _one_of(value, _CONFINED):
        yield _Finding(
            f"{context.path}.seccompProfile.type",
            value,
            "RuntimeDefault or Localhost",
            f"{context.setter} must not set securityContext.seccompProfile.type to {_shown_type(value)}",
        )


_SAFE_SYSCTLS = (
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
)


def _sysctls(pod: _Pod) -> Iterator[_Finding]:
    """Refuse sysctls that are not namespaced to the pod."""
    for path, body in _objects("spec.securityContext.sysctls", pod.own_context.body.get("sysctls")):
        value = body.get("name")
        if not _one_of(value, _SAFE_SYSCTLS):
            yield _Finding(
                f"{path}.name",
                value,
                f"one of {', '.join(_SAFE_SYSCTLS)}",
                f"forbidden sysctls ({_escape(_text(value))})",
            )


_PROBES = (
    ("livenessProbe",),
    ("readinessProbe",),
    ("startupProbe",),
    ("lifecycle", "postStart"),
    ("lifecycle", "preStop"),
)


def _host_probes_and_lifecycle(pod: _Pod) -> Iterator[_Finding]:
    """Refuse probes and lifecycle hooks that make the kubelet call another host (KEP-4940)."""
    for container in pod.containers:
        for keys in _PROBES:
            handler = container.body
            for key in keys:
                handler = _object(handler.get(key))
            for action in ("httpGet", "tcpSocket"):
                value = _object(handler.get(action)).get("host")
                if value not in (None, ""):
                    yield _Finding(
                        ".".join((container.path, *keys, action, "host")),
                        value,
                        "unset",
                        f"{container.setter} uses probe or lifecycle host {_render(value)}",
                    )


# ---------------------------------------------------------------------------------------------------------------------
# Pod Security Standards, restricted.

_RESTRICTED_VOLUMES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
)


def _restricted_volumes(pod: _Pod) -> Iterator[_Finding]:
    """Allow the harmless volume types only; one that is not known is denied."""
    wanted = f"exactly one of {', '.join(_RESTRICTED_VOLUMES)}"
    for path, name, body in pod.volumes:
        sources = [key for key, source in body.items() if key != "name" and source is not None]
        bad = [key for key in sources if key not in _RESTRICTED_VOLUMES]
        for key in bad:
            yield _Finding(
                _member(path, key),
                body[key],
                f"unset; a volume must be {wanted}",
                f"volume {_quote(name)} uses restricted volume type {_render(key)}",
            )
        if not sources:
            yield _Finding(path, body, wanted, f'volume {_quote(name)} uses restricted volume type "unknown"')
        if len(sources) > 1 and not bad:
            yield _Finding(
                path, body, wanted, f"volume {_quote(name)} uses more than one volume type {_join_quoted(sources)}"
            )


def _allow_privilege_escalation(pod: _Pod) -> Iterator[_Finding]:
    """Demand an explicit allowPrivilegeEscalation: false of every container."""
    if pod.windows:
        return
    for setter, path, body in pod.container_contexts:
        value = body.get("allowPrivilegeEscalation")
        if value is not False:
            yield _Finding(
                f"{path}.allowPrivilegeEscalation",
                value,
                "false",
                f"{setter} must set securityContext.allowPrivilegeEscalation=false",
            )


def _run_as_non_root(pod: _Pod) -> Iterator[_Finding]:
    """Demand runAsNonRoot: true of every container, its own or the pod's; an explicit other value is never allowed."""
    inherited = pod.own_context.body.get("runAsNonRoot")
    for setter, path, body in pod.contexts:
        value = body.get("runAsNonRoot")
        if value is not None and value is not True:
            yield _Finding(
                f"{path}.runAsNonRoot",
                value,
                "true",
                f"{setter} must not set securityContext.runAsNonRoot={_render(value)}",
            )
        elif value is None and inherited is None and setter != "pod":
            yield _Finding(
                f"{path}.runAsNonRoot",
                value,
                "true, here or in spec.securityContext",
                f"pod or {setter} must set securityContext.runAsNonRoot=true",
            )


def _run_as_user(pod: _Pod) -> Iterator[_Finding]:
    """Refuse user 0 wherever a user is set."""
    for setter, path, body in pod.contexts:
        value = body.get("runAsUser")
        if value is not None and (_json_type(value) != "integer" or value == 0):
            yield _Finding(
                f"{path}.runAsUser",
                value,
                "other than 0, or unset",
                f"{setter} must not set runAsUser={_render(value)}",
            )


def _seccomp_restricted(pod: _Pod) -> Iterator[_Finding]:
    """Demand a seccomp profile of every container, its own or the pod's."""
    if pod.windows:
        return
    yield from _bad_seccomp_profile(pod.own_context)
    inherited = pod.own_context.body.get("seccompProfile")
    for context in pod.container_contexts:
        yield from _bad_seccomp_profile(context)
        if inherited is None and context.body.get("seccompProfile") is None:
            yield _Finding(
                f"{context.path}.seccompProfile.type",
                None,
                "RuntimeDefault or Localhost, here or in spec.securityContext",
                f"pod or {context.setter} must set securityContext.seccompProfile.type "
                'to "RuntimeDefault" or "Localhost"',
            )


def _capabilities_restricted(pod: _Pod) -> Iterator[_Finding]:
    """Demand that every container drops ALL capabilities; it may add NET_BIND_SERVICE."""
    if pod.windows:
        return
    for context in pod.container_contexts:
        dropped = _object(context.body.get("capabilities")).get("drop")
        if "ALL" not in _items(dropped):
            yield _Finding(
                f"{context.path}.capabilities.drop",
                dropped,
                'a list with "ALL" in it',
                f'{context.setter} must set securityContext.capabilities.drop=["ALL"]',
            )
        yield from _added_capabilities(context, ("NET_BIND_SERVICE",))


class _Check(NamedTuple):
    """A check of the Pod Security Standards; ``overrides`` are the baseline checks that it replaces at its level."""

    id: str
    level: Level
    find: Callable[[_Pod], Iterator[_Finding]]
    overrides: str = ""


_CHECKS = (
    _Check("windowsHostProcess", Level.BASELINE, _windows_host_process),
    _Check("hostNamespaces", Level.BASELINE, _host_namespaces),
    _Check("privileged", Level.BASELINE, _privileged),
    _Check("capabilities_baseline", Level.BASELINE, _capabilities_baseline),
    _Check("hostPathVolumes", Level.BASELINE, _host_path_volumes),
    _Check("hostPorts", Level.BASELINE, _host_ports),
    _Check("hostProbesAndHostLifecycle", Level.BASELINE, _host_probes_and_lifecycle),
    _Check("appArmorProfile", Level.BASELINE, _app_armor_profile),
    _Check("seLinuxOptions", Level.BASELINE, _selinux_options),
    _Check("procMount", Level.BASELINE, _proc_mount),
    _Check("seccompProfile_baseline", Level.BASELINE, _seccomp_baseline),
    _Check("sysctls", Level.BASELINE, _sysctls),
    _Check("restrictedVolumes", Level.RESTRICTED, _restricted_volumes, overrides="hostPathVolumes"),
    _Check("allowPrivilegeEscalation", Level.RESTRICTED, _allow_privilege_escalation),
    _Check("runAsNonRoot", Level.RESTRICTED, _run_as_non_root),
    _Check("runAsUser", Level.RESTRICTED, _run_as_user),
    _Check("seccompProfile_restricted", Level.RESTRICTED, _seccomp_restricted, overrides="seccompProfile_baseline"),
    _Check("capabilities_restricted", Level.RESTRICTED, _capabilities_restricted, overrides="capabilities_baseline"),
    _Check("procMount_restricted", Level.RESTRICTED, _proc_mount, overrides="procMount"),
)


def _checks_of(level: Level) -> tuple[_Check, ...]:
    if level is Level.PRIVILEGED:
        return ()
    if level is Level.BASELINE:
        return tuple(check for check in _CHECKS if check.level is Level.BASELINE)
    overridden = {check.overrides for check in _CHECKS}
    return tuple(check for check in _CHECKS if check.id not in overridden)


# ---------------------------------------------------------------------------------------------------------------------
# Session rules.

_TOKEN_DIRECTORY = "/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path


def _session_token(pod: _Pod, _settings: PolicySettings) -> Iterator[_Finding]:
    """Refuse what hands the workspace a credential for the API server.

    Whether the service account itself mounts its token cannot be seen in a pod, so the pod must say false. A Secret
    that happens to hold a token cannot be told from another one; only its usual place is refused.
    """
    value = pod.spec.get("automountServiceAccountToken")
    if value is not False:
        yield _Finding(
            "spec.automountServiceAccountToken",
            value,
            "false",
            "the workspace must hold no service account token: automountServiceAccountToken must be false",
        )
    for path, name, body in pod.volumes:
        sources = _object(body.get("projected")).get("sources")
        for source_path, source in _objects(f"{path}.projected.sources", sources):
            for key in ("serviceAccountToken", "podCertificate"):
                if source.get(key) is not None:
                    yield _Finding(
                        f"{source_path}.{key}",
                        source[key],
                        "unset",
                        f"the workspace must hold no API credential: volume {_quote(name)} projects a {key}",
                    )
    for container in pod.containers:
        for path, body in _objects(f"{container.path}.volumeMounts", container.body.get("volumeMounts")):
            if _is_token_path(_text(body.get("mountPath"))):
                yield _Finding(
                    f"{path}.mountPath",
                    body["mountPath"],
                    f"outside /var/run{_TOKEN_DIRECTORY}",
                    f"the workspace must hold no service account token: {container.setter} mounts a volume there",
                )


def _is_token_path(mount_path: str) -> bool:
    # The kubelet takes a relative path from the root, /var/run is often a link to /run, and Windows ignores case.
    path = re.sub(r"^[a-z]:", "", mount_path.lower().replace("\\", "/"))
    normal = "/" + normpath("/" + path).lstrip("/") + "/"
    return normal.startswith((f"/var/run{_TOKEN_DIRECTORY}/", f"/run{_TOKEN_DIRECTORY}/"))


def _session_process_namespace(pod: _Pod, _settings: PolicySettings) -> Iterator[_Finding]:
    """Refuse a shared process namespace: /proc shows every container's environment and files to every other."""
    value = pod.spec.get("shareProcessNamespace")
    if not _unset_or_false(value):
        yield _Finding(
            "spec.shareProcessNamespace",
            value,
            "false or unset",
            "the containers of the workspace must not share a process namespace",
        )


def _session_container(pod: _Pod, settings: PolicySettings) -> Iterator[_Finding]:
    """Demand the container that commands run in; init and ephemeral containers do not count."""
    if settings.container is None:
        return
    names = [body.get("name") for _, body in _objects("", pod.spec.get("containers"))]
    if settings.container not in names:
        yield _Finding(
            "spec.containers",
            names,
            f"a list with a container named {_quote(settings.container)}",
            f"the workspace has no container {_quote(settings.container)}",
        )


def _session_image(pod: _Pod, settings: PolicySettings) -> Iterator[_Finding]:
    """Demand an image from the registries and repositories allowed, of every container."""
    wanted = f"below one of {', '.join(settings.allowed_images)}" if settings.allowed_images else "an image reference"
    for container in pod.containers:
        value = container.body.get("image")
        path = f"{container.path}.image"
        if value in (None, ""):
            if settings.allowed_images:
                yield _Finding(path, value, wanted, f"{container.setter} must name its image")
            continue
        try:
            image = parse_image(_text(value))
        except ValueError as error:
            yield _Finding(path, value, wanted, f"{container.setter} has a malformed image reference: {error}")
            continue
        if settings.allowed_images and not any(_below(image, prefix) for prefix in settings.allowed_images):
            yield _Finding(
                path,
                value,
                wanted,
                f"{container.setter} uses image {_quote(f'{image.registry}/{image.repository}')}, which is not allowed",
            )


def _session_image_digest(pod: _Pod, settings: PolicySettings) -> Iterator[_Finding]:
    """Demand that every image is pinned by digest, where the settings ask for it."""
    if not settings.require_image_digest:
        return
    for container in pod.containers:
        value = container.body.get("image")
        try:
            pinned = parse_image(_text(value)).digest is not None
        except ValueError:
            pinned = False
        if not pinned:
            yield _Finding(
                f"{container.path}.image",
                value,
                "an image reference that ends in @sha256:<64 hexadecimal digits>",
                f"{container.setter} must pin its image by digest",
            )


class _SessionRule(NamedTuple):
    id: str
    find: Callable[[_Pod, PolicySettings], Iterator[_Finding]]


_SESSION_RULES = (
    _SessionRule("session_token", _session_token),
    _SessionRule("session_process_namespace", _session_process_namespace),
    _SessionRule("session_container", _session_container),
    _SessionRule("session_image", _session_image),
    _SessionRule("session_image_digest", _session_image_digest),
)


# ---------------------------------------------------------------------------------------------------------------------
# Image references, read as Docker and containerd read them (github.com/distribution/reference).

_DEFAULT_REGISTRY = "docker.io"
_LONGEST_REFERENCE = 1024
_LONGEST_REPOSITORY = 255
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_REGISTRY_PATTERN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?")
_SEGMENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_REPOSITORY_PATTERN = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_TAG_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A normalised image reference: ``busybox`` is ``library/busybox`` of registry ``docker.io``."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None


def parse_image(ref: str) -> ImageReference:
    """Parse an image reference; raise ValueError, saying why, when it is none.

    A runtime that is set up to look for short names elsewhere (CRI-O's ``unqualified-search-registries``) reads a name
    without a registry differently; there only full names should be allowed.
    """
    if len(ref) > _LONGEST_REFERENCE:
        raise ValueError(f"it is longer than {_LONGEST_REFERENCE} characters")
    rest, at, digest = ref.partition("@")
    if at and not _DIGEST_PATTERN.fullmatch(digest):
        raise ValueError("its digest is not sha256:<64 hexadecimal digits>")
    name, colon, tag = rest, "", ""
    if ":" in rest.rpartition("/")[2]:
        # A colon before the last slash belongs to the registry's port.
        name, colon, tag = rest.rpartition(":")
    if colon and not _TAG_PATTERN.fullmatch(tag):
        raise ValueError("its tag is not 1 to 128 letters, digits, dots, dashes or underscores")
    registry, repository = _split_registry(name)
    if registry == _DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return ImageReference(registry, _checked_repository(repository), tag or None, digest or None)


def validate_image_prefix(text: str) -> str | None:
    """Return what is wrong with an entry of ``ALLOWED_IMAGES`` as a sentence, None when it can be used."""
    try:
        _parse_prefix(text)
    except ValueError as error:
        return f"{_quote(text)} is not a registry or repository: {error}"
    return None


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not _is_registry(first):
        return _DEFAULT_REGISTRY, name
    return _checked_registry(first), rest


def _is_registry(first: str) -> bool:
    return first == "localhost" or "." in first or ":" in first or first != first.lower()


def _checked_registry(registry: str) -> str:
    if not _REGISTRY_PATTERN.fullmatch(registry):
        raise ValueError("its registry is not a host name with or without a port")
    folded = registry.lower()
    return _DEFAULT_REGISTRY if folded == "index.docker.io" else folded


def _checked_repository(repository: str) -> str:
    if not _REPOSITORY_PATTERN.fullmatch(repository):
        raise ValueError("its name is not made of segments of lower-case letters, digits and separators")
    if len(repository) > _LONGEST_REPOSITORY:
        raise ValueError(f"its name is longer than {_LONGEST_REPOSITORY} characters")
    return repository


@lru_cache(maxsize=1024)
def _parse_prefix(text: str) -> tuple[str, str]:
    """Return registry and repository prefix (empty for the whole registry) of an entry of ``ALLOWED_IMAGES``.

    An entry that names its registry is taken as it stands, so ``docker.io/library`` is a namespace; one that does not
    is an image name, so ``busybox`` is ``docker.io/library/busybox``.
    """
    if len(text) > _LONGEST_REFERENCE:
        raise ValueError(f"it is longer than {_LONGEST_REFERENCE} characters")
    if "@" in text:
        raise ValueError("a prefix has no digest")
    if "/" not in text and _is_registry(text) and _REGISTRY_PATTERN.fullmatch(text):
        return _checked_registry(text), ""
    if ":" in text.rpartition("/")[2]:
        raise ValueError("a prefix has no tag")
    registry, repository = _split_registry(text)
    if "/" not in text:
        repository = f"library/{repository}"
    return registry, _checked_repository(repository)


def _below(image: ImageReference, prefix: str) -> bool:
    try:
        registry, repository = _parse_prefix(prefix)
    except ValueError:
        # Settings are validated at start; an entry that slipped through must not allow anything.
        return False
    if image.registry != registry:
        return False
    return not repository or f"{image.repository}/".startswith(f"{repository}/")
