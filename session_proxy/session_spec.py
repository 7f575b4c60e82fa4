"""What ``session-proxy session up`` creates: options become a valid spec, a spec becomes manifests. Pure.

Nothing here asks a cluster. Every problem is found before anything is created and names its option.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

from session_proxy.config import (
    MAX_LABEL_VALUE,
    MAX_SUBDOMAIN,
    Config,
    InvalidValueError,
    Wrapper,
    dns_label,
    parse_config,
    shown,
)
from session_proxy.errors import ConfigError
from session_proxy.policy import PolicySettings, evaluate, parse_image

Manifest = dict[str, Any]
"""A Kubernetes object as JSON."""

LONGEST_SUFFIX = len("-workspace")

MAX_NAME = MAX_LABEL_VALUE - LONGEST_SUFFIX
"""Longest name of a session: each object's name must still be a DNS label, which a pod's host name is."""

MANAGED_BY = {"app.kubernetes.io/managed-by": "session-proxy"}
"""Marks what ``up`` created, so that ``down`` touches nothing else."""

PROXY_UID = 65532
"""The user of the project's image."""

RUNNER_CONTAINER, PROXY_CONTAINER, WORKSPACE_CONTAINER = "runner", "session-proxy", "workspace"

PROXY_URL = "http://127.0.0.1:8080"
"""Where the runner finds the sidecar: LISTEN_ADDR's default."""

TOKEN_SECONDS = 3600
"""Lifetime asked for the projected token; the kubelet replaces it at 80 % of that."""

RUNNER_GRACE_SECONDS = 15
"""More than DRAIN_SECONDS (8), so that the sidecar can end and reap what runs."""

WORKSPACE_GRACE_SECONDS = 5
"""For a workspace whose first process ignores TERM, as `sleep` does."""

IDLE = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"
"""First process of a workspace: it does nothing."""

LEAST_CPU = Decimal("0.001")
"""Kubernetes counts CPU in thousandths."""

LEAST_MEMORY = Decimal(4 << 20)
"""Less is always a slip: ``512m`` is half a byte where ``512Mi`` was meant. The kubelet's own least is 4 MiB."""

MAX_QUANTITY = Decimal(2**63 - 1)
"""Kubernetes caps ``8Ei`` to this without a word."""

MAX_UID = 2**31 - 1

MIN_SERVER = (1, 29)
"""First release in which an init container with restartPolicy Always is a native sidecar without a feature gate."""

SETTINGS_OF_UP = frozenset(
    {
        "DRAIN_SECONDS",
        "LISTEN_ADDR",
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
"""Settings of the sidecar that the manifests decide (names, address, grace), or that would need more of them."""


class Sidecar(StrEnum):
    """How the sidecar is deployed."""

    NATIVE = "native"
    CONTAINER = "container"


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
class SessionSpec:
    """Everything ``up`` needs to know, valid on its own: the options by name, and what the sidecar makes of its own."""

    name: SessionName
    namespace: str | None
    proxy_image: str
    runner_image: str
    runner_command: tuple[str, ...]
    runner_uid: int
    runner_cpu: str
    runner_memory: str
    workspace_image: str
    workspace_uid: int
    workspace_cpu: str
    workspace_memory: str
    workspace_storage: str
    workspace_claim: str | None
    runtime_class: str | None
    node_name: str | None
    image_pull_policy: str | None
    image_pull_secret: str | None
    sidecar: Sidecar
    timeout: float
    settings: Mapping[str, str]
    wrapper: Wrapper


# --- values -----------------------------------------------------------------------------------------------------------

_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_DNS_LABEL = re.compile(_LABEL, re.ASCII)
_DNS_SUBDOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII)
_QUANTITY = re.compile(
    r"\+?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,2})?",
    re.ASCII,
)
_SUFFIXES: Mapping[str, Decimal] = {
    "": Decimal(1),
    **{suffix: Decimal(10) ** (3 * power) for suffix, power in zip("num", (-3, -2, -1), strict=True)},
    **{suffix: Decimal(10) ** (3 * power) for power, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
}


def parse_quantity(text: str) -> Decimal:
    """Return the value of a Kubernetes quantity such as ``500m`` or ``1.5Gi``, which is never negative here.

    Raises ValueError.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError("not a quantity")
    number, suffix = Decimal(match[1]), match[2] or ""
    value = number * (_SUFFIXES[suffix] if suffix in _SUFFIXES else Decimal(10) ** int(suffix[1:]))
    if value > MAX_QUANTITY:
        raise ValueError("larger than 2^63 - 1")
    return value


def _quantity(least: Decimal, wanted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        try:
            enough = parse_quantity(text) >= least
        except ValueError:
            enough = False
        if not enough:
            raise InvalidValueError(wanted)
        return text

    return parse


def _name(text: str) -> SessionName:
    if len(text) > MAX_NAME or not _DNS_LABEL.fullmatch(text):
        raise InvalidValueError(
            f"a DNS label: at most {MAX_NAME} lower-case letters, digits and '-', beginning and ending with a letter "
            "or digit"
        )
    return SessionName(text)


def _subdomain(text: str) -> str:
    if len(text) > MAX_SUBDOMAIN or not _DNS_SUBDOMAIN.fullmatch(text):
        raise InvalidValueError(
            f"an object's name: at most {MAX_SUBDOMAIN} characters, DNS labels of lower-case letters, digits and '-' "
            "joined by '.'"
        )
    return text


def _image(text: str) -> str:
    try:
        parse_image(text)
    except ValueError as error:
        raise InvalidValueError(f"an image reference such as registry.example/team/image:1.2 ({error})") from None
    return text


def _words(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise InvalidValueError(f"words, quoted as for a shell ({error})") from None
    if not words or not words[0]:
        raise InvalidValueError("words, quoted as for a shell, of which the first is the program")
    return words


def _uid(text: str) -> int:
    uid = int(text) if re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) else 0
    if not 0 < uid <= MAX_UID or uid == PROXY_UID:
        raise InvalidValueError(f"a numeric user id from 1 to {MAX_UID} other than the sidecar's {PROXY_UID}")
    return uid


def _seconds(text: str) -> float:
    value = float(text) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]+)?", text, re.ASCII) else 0.0
    if not 1 <= value <= 3600:  # noqa: PLR2004
        raise InvalidValueError("a number of seconds from 1 to 3600")
    return value


def _sidecar(text: str) -> Sidecar:
    try:
        return Sidecar(text)
    except ValueError:
        raise InvalidValueError("native, or container for Kubernetes before 1.29") from None


def _pull_policy(text: str) -> str:
    if text not in ("Always", "IfNotPresent", "Never"):
        raise InvalidValueError("Always, IfNotPresent or Never")
    return text


# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """An option of ``session``: how to read it, its default as text (None: none) and what it is for.

    ``NAME`` is an argument; all others begin with ``--``.
    """

    flag: str
    parse: Callable[[str], Any]
    default: str | None
    help: str
    required: bool = False

    @property
    def field(self) -> str:
        """The attribute of SessionSpec, and the name in the values."""
        return self.flag.lower().lstrip("-").replace("-", "_")


_cpu = _quantity(LEAST_CPU, "a quantity of CPU, at least 1m, such as 500m or 2")
_bytes = _quantity(LEAST_MEMORY, "a quantity of bytes, at least 4Mi, such as 512Mi or 2Gi")

NAME = Option("NAME", _name, None, f"name of the session, at most {MAX_NAME} characters", required=True)
NAMESPACE = Option("--namespace", dns_label, None, "namespace (default: the kubeconfig's current one)")
TIMEOUT = Option("--timeout", _seconds, "120", "seconds for everything to be ready (down: to be gone)")

UP_OPTIONS: tuple[Option, ...] = (
    NAME,
    NAMESPACE,
    Option("--proxy-image", _image, None, "image of session-proxy, the sidecar", required=True),
    Option("--runner-image", _image, None, "image of the runner, which holds no credential", required=True),
    Option("--workspace-image", _image, None, "image of the workspace, in which commands run", required=True),
    Option("--runner-command", _words, None, "command of the runner, split into words as a shell would; no shell runs"),
    Option("--runner-uid", _uid, "10001", "user id of the runner"),
    Option("--workspace-uid", _uid, "1000", "user id of the workspace"),
    Option("--runner-cpu", _cpu, "500m", "CPU of the runner, requested and limited"),
    Option("--runner-memory", _bytes, "512Mi", "memory of the runner, requested and limited"),
    Option("--workspace-cpu", _cpu, "1", "CPU of the workspace, requested and limited"),
    Option("--workspace-memory", _bytes, "1Gi", "memory of the workspace, requested and limited"),
    Option("--workspace-storage", _bytes, "2Gi", "largest size of the emptyDir at /workspace"),
    Option(
        "--workspace-claim",
        _subdomain,
        None,
        "existing PersistentVolumeClaim for /workspace, no emptyDir then",
    ),
    Option("--runtime-class", _subdomain, None, "RuntimeClass of the workspace, such as gvisor or kata"),
    Option("--node-name", _subdomain, None, "node for both pods (default: the scheduler's choice)"),
    Option("--image-pull-policy", _pull_policy, None, "Always, IfNotPresent or Never (default: Kubernetes' own)"),
    Option("--image-pull-secret", _subdomain, None, "secret with the registry's credential"),
    Option("--sidecar", _sidecar, "native", "native, or container for Kubernetes before 1.29"),
    TIMEOUT,
)
"""Every option of ``up`` that takes one value. ``--set`` may be repeated and is read by itself."""

DOWN_OPTIONS = (NAME, NAMESPACE, TIMEOUT)
STATUS_OPTIONS = (NAME, NAMESPACE)


def parse_name(values: Mapping[str, Any]) -> tuple[SessionName, str | None, float]:
    """Return name, namespace and timeout, which ``status`` and ``down`` need. Raises ConfigError."""
    problems: list[str] = []
    fields = _read(DOWN_OPTIONS, values, problems)
    if problems:
        raise ConfigError(problems)
    return fields["name"], fields["namespace"], fields["timeout"]


def parse_spec(values: Mapping[str, Any]) -> SessionSpec:
    """Read the options of ``up``. Raises ConfigError with all problems, the sidecar's verdict on the pod included."""
    problems: list[str] = []
    fields = _read(UP_OPTIONS, values, problems)
    if values.get("workspace_storage") and values.get("workspace_claim"):
        problems.append("--workspace-storage and --workspace-claim are both given; /workspace is one or the other")
    settings = _settings(values.get("settings") or (), problems)
    try:
        # The names stand for those that the pod's own fields will fill in.
        config = parse_config({**settings, "SESSION_NAME": "any", "OWNER_MODE": "self", "POD_UID": "any"})
    except ConfigError as error:
        raise ConfigError([*problems, *(f"--set {problem}" for problem in error.problems)]) from None
    if not problems:
        fields["runner_command"] = fields["runner_command"] or ()
        spec = SessionSpec(**fields, settings=settings, wrapper=config.wrapper)
        problems += _violations(spec, config)
    if problems:
        raise ConfigError(problems)
    return spec


def _read(options: Sequence[Option], values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for option in options:
        text = values.get(option.field) or option.default
        fields[option.field] = None
        if text is not None:
            try:
                fields[option.field] = option.parse(text)
            except InvalidValueError as error:
                problems.append(f"{option.flag} is {shown(text)}; it must be {error}")
        elif option.required:
            problems.append(f"{option.flag} is not given; it must be the {option.help}")
    return fields


def _settings(assignments: Sequence[str], problems: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            problems.append(f"--set is {shown(assignment)}; it must be SETTING=VALUE")
        elif name in SETTINGS_OF_UP:
            problems.append(f"--set {name} is not possible; the session's manifests decide it, or have no place for it")
        elif name.lower() not in Config.__dataclass_fields__ or name != name.upper():
            problems.append(f"--set {shown(name)} is no setting of session-proxy; `session-proxy serve --help` has all")
        else:
            settings[name] = value
    return settings


def _violations(spec: SessionSpec, config: Config) -> list[str]:
    """Hold the workspace against what its sidecar will demand: only the image can be at odds with it, by ``--set``."""
    policy = PolicySettings(
        level=config.pod_security_level,
        allowed_images=config.allowed_images,
        require_image_digest=config.require_image_digest,
        container=WORKSPACE_CONTAINER,
    )
    return [
        f"--workspace-image gives {violation.field} {violation.value}; the sidecar's --set demands {violation.expected}"
        for violation in evaluate(workspace_pod(spec, "any"), policy)
    ]


# --- manifests --------------------------------------------------------------------------------------------------------

RBAC = "rbac.authorization.k8s.io"

ROLE_VERBS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pods", ("get", "watch")),
    ("pods/exec", ("get", "create")),
)
"""All the sidecar may do. ``watch`` under resourceNames needs a field selector on the name."""


def manifests(spec: SessionSpec, runner_uid: str) -> tuple[Manifest, ...]:
    """Return what is created once the runner pod is there, all of it owned by that pod."""
    owned = (role(spec.name), role_binding(spec.name), workspace_pod(spec, runner_uid))
    for manifest in owned[:2]:
        manifest["metadata"]["ownerReferences"] = [owner_reference(spec.name, runner_uid)]
    return owned


def owner_reference(name: SessionName, runner_uid: str, *, controller: bool = False) -> Manifest:
    """Refer to the runner pod, so that the garbage collector follows it."""
    # Without blockOwnerDeletion, for which some clusters demand a permission on the runner pod's finalizers.
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
        "apiVersion": f"{RBAC}/v1",
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
        "apiVersion": f"{RBAC}/v1",
        "kind": "RoleBinding",
        "metadata": _metadata(name.access, name),
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": name.access},
        "subjects": [{"kind": "ServiceAccount", "name": name.access}],
    }


def runner_pod(spec: SessionSpec) -> Manifest:
    """Return the pod with the runner, which has no credential, and the sidecar, which has one."""
    runner: Manifest = {
        "name": RUNNER_CONTAINER,
        "image": spec.runner_image,
        "env": [{"name": "SESSION_PROXY_URL", "value": PROXY_URL}],
        "resources": _resources(spec.runner_cpu, spec.runner_memory),
        "securityContext": _container_context(spec.runner_uid),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 (in the container)
    }
    if spec.runner_command:
        # Doubled, because Kubernetes expands $(NAME) and $$ in a command.
        runner["command"] = [word.replace("$", "$$") for word in spec.runner_command]
    sidecar = _sidecar_container(spec)
    pod_spec = {
        **_pod_spec(spec, RUNNER_GRACE_SECONDS),
        "serviceAccountName": spec.name.access,
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}},
            {"name": "session-proxy-token", "projected": {"sources": _token_sources()}},
        ],
    }
    if spec.sidecar is Sidecar.NATIVE:
        sidecar["restartPolicy"] = "Always"
        pod_spec |= {"initContainers": [sidecar], "containers": [runner]}
    else:
        pod_spec |= {"containers": [sidecar, runner]}
    return _pod(spec, _metadata(spec.name.runner, spec.name, kind="runner"), pod_spec)


def workspace_pod(spec: SessionSpec, runner_uid: str) -> Manifest:
    """Return the pod that commands run in, owned by the runner pod."""
    container: Manifest = {
        "name": WORKSPACE_CONTAINER,
        "image": spec.workspace_image,
        "workingDir": "/workspace",
        "resources": _resources(spec.workspace_cpu, spec.workspace_memory),
        "securityContext": _container_context(spec.workspace_uid),
        "volumeMounts": [
            {"name": "workspace", "mountPath": "/workspace"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 (in the container)
        ],
    }
    if spec.wrapper is Wrapper.SH:
        # The daemon needs this shell anyway. It also reaps, and ends at once; images without one start as they are.
        container["command"] = ["/bin/sh", "-c", IDLE]
    metadata = _metadata(spec.name.workspace, spec.name, kind="workspace")
    # controller: a pod that has one is never adopted by a ReplicaSet whose labels it happens to match.
    metadata["ownerReferences"] = [owner_reference(spec.name, runner_uid, controller=True)]
    storage: Manifest = {"emptyDir": {"sizeLimit": spec.workspace_storage}}
    if spec.workspace_claim is not None:
        storage = {"persistentVolumeClaim": {"claimName": spec.workspace_claim}}
    pod_spec = {
        **_pod_spec(spec, WORKSPACE_GRACE_SECONDS),
        "containers": [container],
        "volumes": [{"name": "workspace", **storage}, {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}],
    }
    # For volumes that belong to root when they are new, as those of a PersistentVolumeClaim do.
    pod_spec["securityContext"]["fsGroup"] = spec.workspace_uid
    if spec.runtime_class is not None:
        pod_spec["runtimeClassName"] = spec.runtime_class
    return _pod(spec, metadata, pod_spec)


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


def _pod(spec: SessionSpec, metadata: Manifest, pod_spec: Manifest) -> Manifest:
    if spec.image_pull_policy is not None:
        for container in (*pod_spec.get("initContainers", ()), *pod_spec["containers"]):
            container["imagePullPolicy"] = spec.image_pull_policy
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec}


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
