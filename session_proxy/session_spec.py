"""What ``session-proxy session up`` creates: options become a valid spec, a spec becomes manifests. Pure.

Nothing here asks a cluster. Every problem is found before anything is created and names its option.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

from session_proxy.config import MAX_LABEL_VALUE, SHOWN_VALUE_CHARACTERS, Config, parse_config
from session_proxy.errors import ConfigError
from session_proxy.policy import Level, PolicySettings, evaluate, parse_image

Manifest = dict[str, Any]
"""A Kubernetes object as JSON."""

LONGEST_SUFFIX = len("-workspace")

MAX_NAME = MAX_LABEL_VALUE - LONGEST_SUFFIX
"""Longest name of a session: each object's name must still be a DNS label, which a pod's host name is."""

MANAGED_BY = {"app.kubernetes.io/managed-by": "session-proxy"}
"""Marks what ``up`` created, so that ``down`` touches nothing else."""

ATTEMPT_ANNOTATION = "session-proxy/attempt"
"""Which run of ``up`` created an object, so that a rollback removes that one and no namesake."""

PROXY_UID = 65532
"""The user of the project's image."""

RUNNER_CONTAINER, PROXY_CONTAINER, WORKSPACE_CONTAINER = "runner", "session-proxy", "workspace"

TOKEN_SECONDS = 3600
"""Lifetime asked for the projected token; the kubelet replaces it at 80 % of that."""

RUNNER_GRACE_SECONDS = 15
"""More than DRAIN_SECONDS (8), so that the sidecar can end and reap what runs."""

WORKSPACE_GRACE_SECONDS = 5
"""For a workspace whose first process ignores TERM, as `sleep` does."""

IDLE = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"
"""First process of a workspace: it does nothing."""

MIN_MEMORY_BYTES = 4 << 20
"""Less is always a slip: ``512m`` is half a byte where ``512Mi`` was meant. The kubelet's own least is 4 MiB."""

MIN_SERVER = (1, 29)
"""First release in which an init container with restartPolicy Always is a native sidecar without a feature gate."""

MAX_UID = 2**31 - 1

SETTINGS_OF_UP = frozenset(
    {
        "LISTEN_SOCKET",
        "LISTEN_SOCKET_UIDS",
        "LISTEN_TOKEN_FILE",
        "NAMESPACE",
        "OWNER_MODE",
        "OWNER_UID",
        "POD_NAME",
        "POD_UID",
        "SESSION_NAME",
        "WORKSPACE_CONTAINER",
        "WORKSPACE_POD",
        "WORKSPACE_SELECTOR",
    }
)
"""Settings of the sidecar that follow from the manifests, or would need more of them (sockets, token files)."""


class Sidecar(StrEnum):
    """How the sidecar is deployed."""

    NATIVE = "native"
    CONTAINER = "container"


class PullPolicy(StrEnum):
    """``imagePullPolicy`` of every container."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


@dataclass(frozen=True, slots=True)
class SessionName:
    """The names of everything that belongs to a session."""

    session: str

    @property
    def runner(self) -> str:
        """The runner pod."""
        return f"{self.session}-runner"

    @property
    def workspace(self) -> str:
        """The workspace pod."""
        return f"{self.session}-workspace"

    @property
    def access(self) -> str:
        """The ServiceAccount, Role and RoleBinding."""
        return f"{self.session}-proxy"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a container may use; requested and limited alike."""

    cpu: str
    memory: str


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """Everything ``up`` needs to know, valid on its own."""

    name: SessionName
    namespace: str | None
    proxy_image: str
    runner_image: str
    runner_command: tuple[str, ...]
    runner_uid: int
    runner: Resources
    workspace_image: str
    workspace_uid: int
    workspace: Resources
    workspace_storage: str
    runtime_class: str | None
    node_name: str | None
    image_pull_policy: PullPolicy | None
    image_pull_secret: str | None
    sidecar: Sidecar
    settings: Mapping[str, str]
    timeout_seconds: float


class _InvalidError(ValueError):
    """Why a value is wrong, as the end of the sentence ``--option is ...; it must be ...``."""


# --- values -----------------------------------------------------------------------------------------------------------

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", re.ASCII)
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,2})?", re.ASCII)
_SUFFIXES: Mapping[str, Decimal] = {
    "": Decimal(1),
    **{suffix: Decimal(10) ** (3 * power) for suffix, power in zip("num", (-3, -2, -1), strict=True)},
    **{suffix: Decimal(10) ** (3 * power) for power, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
}
MAX_QUANTITY = Decimal(2**63 - 1)
MAX_SUBDOMAIN = 253


def parse_quantity(text: str) -> Decimal:
    """Return the value of a Kubernetes quantity such as ``500m`` or ``1.5Gi``. Raises ValueError."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError("not a quantity")
    number, suffix = match[1], match[2] or ""
    scale = Decimal(10) ** int(suffix[1:]) if suffix[:1] in ("e", "E") and len(suffix) > 1 else _SUFFIXES[suffix]
    value = Decimal(number) * scale
    if value > MAX_QUANTITY:
        raise ValueError("larger than Kubernetes can hold")
    return value


def _name(text: str) -> SessionName:
    if len(text) > MAX_NAME or not _DNS_LABEL.fullmatch(text):
        raise _InvalidError(
            f"a DNS label: at most {MAX_NAME} lower-case letters, digits and '-', beginning and ending with a letter "
            "or digit"
        )
    return SessionName(text)


def _dns_label(text: str) -> str:
    if len(text) > MAX_LABEL_VALUE or not _DNS_LABEL.fullmatch(text):
        raise _InvalidError("a DNS label: at most 63 lower-case letters, digits and '-'")
    return text


def _subdomain(text: str) -> str:
    if len(text) > MAX_SUBDOMAIN or not _DNS_SUBDOMAIN.fullmatch(text):
        raise _InvalidError("an object's name: at most 253 lower-case letters, digits, '-' and '.'")
    return text


def _image(text: str) -> str:
    try:
        parse_image(text)
    except ValueError as error:
        raise _InvalidError(f"an image reference such as registry.example/team/image:1.2 ({error})") from None
    return text


def _cpu(text: str) -> str:
    try:
        value = parse_quantity(text)
    except ValueError:
        value = Decimal(0)
    if value < Decimal("0.001"):
        raise _InvalidError("a quantity of CPU, at least 1m, such as 500m or 2")
    return text


def _bytes(text: str) -> str:
    try:
        value = parse_quantity(text)
    except ValueError:
        value = Decimal(0)
    if value < MIN_MEMORY_BYTES:
        raise _InvalidError("a quantity of bytes, at least 4Mi, such as 512Mi or 2Gi")
    return text


def _uid(text: str) -> int:
    uid = int(text) if re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) else 0
    if not 0 < uid <= MAX_UID or uid == PROXY_UID:
        raise _InvalidError(f"a numeric user id from 1 to {MAX_UID} other than the sidecar's {PROXY_UID}")
    return uid


def _seconds(text: str) -> float:
    value = float(text) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]+)?", text, re.ASCII) else 0.0
    if not 1 <= value <= 3600:  # noqa: PLR2004
        raise _InvalidError("a number of seconds from 1 to 3600")
    return value


def _sidecar(text: str) -> Sidecar:
    if text not in list(Sidecar):
        raise _InvalidError("native, or container for Kubernetes before 1.29")
    return Sidecar(text)


def _pull_policy(text: str) -> PullPolicy:
    if text not in list(PullPolicy):
        raise _InvalidError("Always, IfNotPresent or Never")
    return PullPolicy(text)


# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """One option of ``session up``: how to read it, its default as text (None: none) and what it is for."""

    flag: str
    parse: Callable[[str], Any]
    default: str | None
    help: str
    required: bool = False

    @property
    def field(self) -> str:
        """The attribute that argparse stores it in."""
        return self.flag[2:].replace("-", "_")


NAMESPACE = Option("--namespace", _dns_label, None, "namespace (default: the kubeconfig's current one)")

TIMEOUT = Option("--timeout", _seconds, "120", "seconds for everything to be ready (down: to be gone)")

OPTIONS: tuple[Option, ...] = (
    NAMESPACE,
    Option("--proxy-image", _image, None, "image of session-proxy, the sidecar", required=True),
    Option("--runner-image", _image, None, "image of the runner, which holds no credential", required=True),
    Option("--workspace-image", _image, None, "image of the workspace, in which commands run", required=True),
    Option("--runner-uid", _uid, "10001", "user id of the runner"),
    Option("--workspace-uid", _uid, "1000", "user id of the workspace"),
    Option("--runner-cpu", _cpu, "500m", "CPU of the runner, requested and limited"),
    Option("--runner-memory", _bytes, "512Mi", "memory of the runner"),
    Option("--workspace-cpu", _cpu, "1", "CPU of the workspace"),
    Option("--workspace-memory", _bytes, "1Gi", "memory of the workspace"),
    Option("--workspace-storage", _bytes, "2Gi", "largest size of the emptyDir at /workspace"),
    Option("--runtime-class", _subdomain, None, "RuntimeClass of the workspace, such as gvisor or kata"),
    Option("--node-name", _subdomain, None, "node for both pods (default: the scheduler's choice)"),
    Option("--image-pull-policy", _pull_policy, None, "Always, IfNotPresent or Never (default: Kubernetes' own)"),
    Option("--image-pull-secret", _subdomain, None, "secret with the registry's credential"),
    Option("--sidecar", _sidecar, "native", "native, or container for Kubernetes before 1.29"),
    TIMEOUT,
)
"""Every option of ``up`` that takes one value."""


def add_arguments(session: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``session``. Wrong arguments exit with 78, because 2 says that nothing is there."""
    commands = session.add_subparsers(
        dest="session_command", required=True, metavar="COMMAND", parser_class=_SessionParser
    )
    up = commands.add_parser(
        "up",
        help="create a session and wait until it is ready",
        description="Create runner pod, workspace pod and the sidecar's access, all of them or nothing. Exit status: 0 "
        "ready, 1 failed and rolled back, 78 refused before anything was created.",
    )
    down = commands.add_parser(
        "down",
        help="remove a session",
        description="Remove everything that up created. Exit status: 0 nothing of it is left, 1 something is, 78 bad "
        "arguments.",
    )
    status = commands.add_parser(
        "status",
        help="say what is there",
        description="Exit status: 0 ready, 1 not ready, 2 nothing there, 78 bad arguments.",
    )
    for parser, options in ((up, OPTIONS), (down, (NAMESPACE, TIMEOUT)), (status, (NAMESPACE,))):
        parser.add_argument("name", metavar="NAME", help=f"the session's name, at most {MAX_NAME} characters")
        for option in options:
            note = f" (default: {option.default})" if option.default else ""
            names = ("-n", option.flag) if option is NAMESPACE else (option.flag,)
            parser.add_argument(*names, dest=option.field, metavar="VALUE", help=option.help + note)
    up.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="setting of the sidecar, such as EXEC_TIMEOUT_SECONDS=60; may be repeated",
    )
    up.add_argument(
        "runner_command", nargs="*", metavar="-- COMMAND", help="command of the runner (default: its image's own)"
    )


class _SessionParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.print_usage()
        self.exit(78, f"{self.prog}: error: {message}\n")


def parse_name(values: Mapping[str, Any]) -> tuple[SessionName, str | None, float]:
    """Return name, namespace and timeout, which ``status`` and ``down`` need. Raises ConfigError."""
    problems: list[str] = []
    fields = _read((NAMESPACE, TIMEOUT), values, problems)
    if problems:
        raise ConfigError(problems)
    return fields["name"], fields["namespace"], fields["timeout"]


def parse_spec(values: Mapping[str, Any]) -> SessionSpec:
    """Read the options of ``up``. Raises ConfigError with all problems, the policy's verdict on the pods included."""
    problems: list[str] = []
    fields = _read(OPTIONS, values, problems)
    settings = _settings(values.get("settings") or (), problems)
    command = tuple(values.get("runner_command") or ())
    if any("\0" in word for word in command):
        problems.append("the runner's command holds a NUL byte, which no argument can")
    try:
        policy = sidecar_policy(settings)
    except ConfigError as error:
        raise ConfigError([*problems, *(f"--set {problem}" for problem in error.problems)]) from None
    if problems:
        raise ConfigError(problems)
    spec = SessionSpec(
        name=fields["name"],
        namespace=fields["namespace"],
        proxy_image=fields["proxy_image"],
        runner_image=fields["runner_image"],
        runner_command=command,
        runner_uid=fields["runner_uid"],
        runner=Resources(fields["runner_cpu"], fields["runner_memory"]),
        workspace_image=fields["workspace_image"],
        workspace_uid=fields["workspace_uid"],
        workspace=Resources(fields["workspace_cpu"], fields["workspace_memory"]),
        workspace_storage=fields["workspace_storage"],
        runtime_class=fields["runtime_class"],
        node_name=fields["node_name"],
        image_pull_policy=fields["image_pull_policy"],
        image_pull_secret=fields["image_pull_secret"],
        sidecar=fields["sidecar"],
        settings=settings,
        timeout_seconds=fields["timeout"],
    )
    if problems := _violations(spec, policy):
        raise ConfigError(problems)
    return spec


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_VALUE_CHARACTERS else text[:SHOWN_VALUE_CHARACTERS] + "…")


def _read(options: Sequence[Option], values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for option in (Option("NAME", _name, None, "", required=True), *options):
        flag, field = (option.flag, option.field) if option.flag.startswith("--") else ("NAME", "name")
        text = values.get(field) or option.default
        fields[field] = None
        if text is None:
            if option.required:
                problems.append(f"{flag} is not given; it must be the {option.help or 'name of the session'}")
            continue
        try:
            fields[field] = option.parse(str(text))
        except _InvalidError as error:
            problems.append(f"{flag} is {_shown(str(text))}; it must be {error}")
    return fields


def _settings(assignments: Sequence[str], problems: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            problems.append(f"--set is {_shown(assignment)}; it must be SETTING=VALUE")
        elif name in SETTINGS_OF_UP:
            problems.append(f"--set {name} is not possible; the manifests of the session decide it")
        elif name.lower() not in Config.__dataclass_fields__ or name != name.upper():
            problems.append(
                f"--set {_shown(name)} is no setting of session-proxy; `session-proxy serve --help` has all"
            )
        else:
            settings[name] = value
    return settings


def sidecar_policy(settings: Mapping[str, str]) -> PolicySettings:
    """Return the policy that a sidecar with these settings applies. Raises ConfigError."""
    config = parse_config({**settings, "SESSION_NAME": "any", "OWNER_MODE": "self", "POD_UID": "any"})
    return PolicySettings(
        level=config.pod_security_level,
        allowed_images=config.allowed_images,
        require_image_digest=config.require_image_digest,
        container=WORKSPACE_CONTAINER,
    )


def _violations(spec: SessionSpec, policy: PolicySettings) -> list[str]:
    """Hold the workspace against what its sidecar will demand, the runner against what namespaces usually enforce."""
    pods = (
        (workspace_pod(spec, "any"), policy),
        (runner_pod(spec), PolicySettings(level=Level.RESTRICTED, session_rules=False)),
    )
    return [
        f"pod {pod['metadata']['name']}: {violation.field} is {violation.value}; it must be {violation.expected}"
        for pod, settings in pods
        for violation in evaluate(pod, settings)
    ]


# --- manifests --------------------------------------------------------------------------------------------------------

ROLE_VERBS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pods", ("get", "list", "watch")),
    ("pods/exec", ("get", "create")),
)
"""All the sidecar may do. ``list`` and ``watch`` under resourceNames need a field selector on the name."""


def manifests(spec: SessionSpec, runner_uid: str) -> tuple[Manifest, ...]:
    """Return what is created once the runner pod is there, all of it owned by that pod."""
    owned = (role(spec.name), role_binding(spec.name), workspace_pod(spec, runner_uid))
    for manifest in owned[:2]:
        manifest["metadata"]["ownerReferences"] = [owner_reference(spec.name, runner_uid)]
    return owned


def owner_reference(name: SessionName, runner_uid: str, *, controller: bool = False) -> Manifest:
    """Refer to the runner pod, so that the garbage collector follows it."""
    reference: Manifest = {"apiVersion": "v1", "kind": "Pod", "name": name.runner, "uid": runner_uid}
    return reference | {"controller": True} if controller else reference


def service_account(name: SessionName) -> Manifest:
    """Return the sidecar's identity. Its token is mounted by the runner pod's projected volume and nothing else."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(name.access, name),
        "automountServiceAccountToken": False,
    }


def role(name: SessionName) -> Manifest:
    """Return the sidecar's permissions: this one workspace pod."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": _metadata(name.access, name),
        "rules": [
            {"apiGroups": [""], "resources": [resource], "resourceNames": [name.workspace], "verbs": list(verbs)}
            for resource, verbs in ROLE_VERBS
        ],
    }


def role_binding(name: SessionName) -> Manifest:
    """Give the role to the sidecar's identity."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": _metadata(name.access, name),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name.access},
        "subjects": [{"kind": "ServiceAccount", "name": name.access}],
    }


def runner_pod(spec: SessionSpec) -> Manifest:
    """Return the pod with the runner, which has no credential, and the sidecar, which has one."""
    runner: Manifest = {
        "name": RUNNER_CONTAINER,
        "image": spec.runner_image,
        "env": [{"name": "SESSION_PROXY_URL", "value": "http://127.0.0.1:8080"}],
        "resources": _resources(spec.runner.cpu, spec.runner.memory),
        "securityContext": _container_context(spec.runner_uid),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 (in the container)
    }
    if spec.runner_command:
        runner["command"] = list(spec.runner_command)
    sidecar = _sidecar_container(spec)
    native = spec.sidecar is Sidecar.NATIVE
    if native:
        sidecar["restartPolicy"] = "Always"
    for container in (runner, sidecar):
        _pull(container, spec)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(spec.name.runner, spec.name, kind="runner"),
        "spec": {
            **_pod_spec(spec, RUNNER_GRACE_SECONDS),
            "serviceAccountName": spec.name.access,
            "containers": [runner] if native else [sidecar, runner],
            "volumes": [
                {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}},
                {"name": "session-proxy-token", "projected": {"sources": _token_sources()}},
            ],
        },
    }
    if native:
        pod["spec"]["initContainers"] = [sidecar]  # type: ignore[index]
    return pod


def workspace_pod(spec: SessionSpec, runner_uid: str) -> Manifest:
    """Return the pod that commands run in, owned by the runner pod."""
    container: Manifest = {
        "name": WORKSPACE_CONTAINER,
        "image": spec.workspace_image,
        "workingDir": "/workspace",
        "resources": _resources(spec.workspace.cpu, spec.workspace.memory),
        "securityContext": _container_context(spec.workspace_uid),
        "volumeMounts": [
            {"name": "workspace", "mountPath": "/workspace"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 (in the container)
        ],
    }
    if spec.settings.get("WRAPPER") != "none":
        # The daemon needs this shell anyway. It also reaps, and ends at once; images without one start as they are.
        container["command"] = ["/bin/sh", "-c", IDLE]
    _pull(container, spec)
    metadata = _metadata(spec.name.workspace, spec.name, kind="workspace")
    # controller: a pod that has one is never adopted by a ReplicaSet whose labels it happens to match.
    metadata["ownerReferences"] = [owner_reference(spec.name, runner_uid, controller=True)]
    pod_spec = _pod_spec(spec, WORKSPACE_GRACE_SECONDS)
    # For volumes that belong to root when they are new, as those of a PersistentVolumeClaim do.
    pod_spec["securityContext"]["fsGroup"] = spec.workspace_uid
    pod_spec |= {
        "containers": [container],
        "volumes": [
            {"name": "workspace", "emptyDir": {"sizeLimit": spec.workspace_storage}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}},
        ],
    }
    if spec.runtime_class is not None:
        pod_spec["runtimeClassName"] = spec.runtime_class
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec}


def _metadata(object_name: str, name: SessionName, *, kind: str | None = None) -> Manifest:
    labels = {**MANAGED_BY, "session": name.session}
    return {"name": object_name, "labels": labels | {"type": kind} if kind else labels}


def _pod_spec(spec: SessionSpec, grace: int) -> Manifest:
    pod_spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Always",
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": grace,
    }
    if spec.node_name is not None:
        pod_spec["nodeName"] = spec.node_name
    if spec.image_pull_secret is not None:
        pod_spec["imagePullSecrets"] = [{"name": spec.image_pull_secret}]
    return pod_spec


def _pull(container: Manifest, spec: SessionSpec) -> None:
    if spec.image_pull_policy is not None:
        container["imagePullPolicy"] = str(spec.image_pull_policy)


def _resources(cpu: str, memory: str) -> Manifest:
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}}


def _container_context(uid: int) -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsGroup": uid,
        "runAsUser": uid,
    }


def _sidecar_container(spec: SessionSpec) -> Manifest:
    def field(name: str, path: str) -> Manifest:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    return {
        "name": PROXY_CONTAINER,
        "image": spec.proxy_image,
        "env": [
            {"name": "SESSION_NAME", "value": spec.name.session},
            {"name": "WORKSPACE_POD", "value": spec.name.workspace},
            {"name": "OWNER_MODE", "value": "self"},
            field("POD_NAME", "metadata.name"),
            field("POD_UID", "metadata.uid"),
            *({"name": name, "value": value} for name, value in sorted(spec.settings.items())),
        ],
        # A process of its own asks: the kubelet cannot reach a loopback listener.
        "startupProbe": _probe(period=1, failures=60),
        "readinessProbe": _probe("--ready", period=5, failures=2),
        "livenessProbe": _probe(period=20, failures=3),
        "resources": {
            "requests": {"cpu": "50m", "memory": "96Mi"},
            "limits": {"cpu": "1", "memory": "256Mi"},
        },
        "securityContext": _container_context(PROXY_UID),
        "volumeMounts": [
            {
                "name": "session-proxy-token",
                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                "readOnly": True,
            }
        ],
    }


def _probe(*flags: str, period: int, failures: int) -> Manifest:
    return {
        "exec": {"command": ["session-proxy", "health", *flags]},
        "periodSeconds": period,
        "timeoutSeconds": 6,  # more than the 5 s that `health` waits itself, so that its words are seen
        "failureThreshold": failures,
    }


def _token_sources() -> list[Manifest]:
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}],
            }
        },
    ]
