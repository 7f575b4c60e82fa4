"""``session-proxy session up|status|down``: a session on a cluster, whole or not at all.

For the platform's side, with a person's own kubeconfig. What is created, and in which order:

1. ServiceAccount (a pod cannot be created without it)
2. runner pod, which owns everything else: once it is gone, the garbage collector removes the rest
3. the ServiceAccount's owner reference; Role and RoleBinding for exactly the workspace pod's name
4. workspace pod

Each object carries the id of the run that made it. A rollback removes what carries that id, so it finds also what was
created by a request whose answer was lost, and never a namesake.
"""

import asyncio
import contextlib
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

from session_proxy import kube
from session_proxy.errors import (
    ConfigError,
    KubeError,
    KubeTimeoutError,
    KubeUnauthorizedError,
    KubeUnavailableError,
    SessionProxyError,
)
from session_proxy.session_spec import (
    MANAGED_BY,
    MIN_SERVER,
    PROXY_CONTAINER,
    PROXY_URL,
    RBAC,
    ROLE_VERBS,
    RUNNER_CONTAINER,
    Manifest,
    SessionName,
    SessionSpec,
    Sidecar,
    manifests,
    owner_reference,
    parse_name,
    parse_spec,
    runner_pod,
    service_account,
)

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_NOTHING_THERE: Final = 3
EXIT_UNKNOWN: Final = 4
EXIT_CONFIG: Final = 78

POLL_SECONDS: Final = 0.25
"""Between two looks at objects that are starting or going."""

ROLLBACK_SECONDS: Final = 45.0
"""For removing everything after a failure, the pods' end included."""

ROLLBACK_GRACE_SECONDS: Final = 1
"""Grace of pods in a rollback: nothing runs in them that anybody waits for."""

SETTLE_SECONDS: Final = 5.0
"""How long a rollback looks, at the least, for what a create request without an answer may still bring about."""

READ_ATTEMPTS: Final = 3
"""Of a read before anything is created; the API server may be restarting."""

RETRY_SECONDS: Final = 1.0
"""Between those."""

MAX_MESSAGE: Final = 500
"""Characters of the API server's own words that are shown."""

MAX_LISTED: Final = 10
"""Names shown of what an option could have named."""

RUN_ANNOTATION: Final = "session-proxy/run"
"""Which run of ``up`` created an object."""

PLACEHOLDER_UID: Final = "00000000-0000-0000-0000-000000000000"
"""The owner in a dry run."""

HOPELESS: Final = frozenset(
    {
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImageInspectError",
        "ImagePullBackOff",
        "InvalidImageName",
    }
)
"""Reasons for which a container waits that are not waited for."""


class SessionError(SessionProxyError):
    """A step failed; the text says which and why."""

    def __init__(self, text: str, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.exit_status = exit_status


def run_session(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Run the subcommand that ``values`` (the parsed arguments) name; return the exit status."""
    command = {"up": _up, "status": _status, "down": _down}[values["session_command"]]
    try:
        return asyncio.run(command(values, environ))
    except ConfigError as error:
        for problem in error.problems:
            _say(problem)
        return EXIT_CONFIG
    except KubeUnauthorizedError as error:
        _say(f"KUBECONFIG's credential is refused: {error.detail}")
        return EXIT_CONFIG
    except KubeError as error:
        _say(_reason(error))
        return EXIT_UNKNOWN
    except SessionError as error:
        _say(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        _say("interrupted")
        # From its first request on, `up` handles signals by itself: nothing has been created.
        return EXIT_FAILED if command is _up else EXIT_UNKNOWN


def _say(text: str) -> None:
    """Tell the person. A terminal that went away must not keep a rollback from its work."""
    with contextlib.suppress(OSError):
        print(f"session-proxy: {_printable(text)}", file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    # Image names and messages come from a cluster: they must not steer the terminal that shows them.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Progress:
    """Says each thing once, with the time since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.states: dict[str, str] = {}

    def __call__(self, subject: object, state: str) -> None:
        if self.states.get(str(subject)) != state:
            self.states[str(subject)] = state
            _say(f"{time.monotonic() - self._started:5.1f} s  {subject}: {state}")


def _reason(error: BaseException) -> str:
    match error:
        case asyncio.CancelledError():
            return "interrupted"
        case KubeError():
            return f"{error.reason}: {error.detail}"
        case SessionError():
            return str(error)
    return f"{type(error).__name__}: {error}"


# --- the API server ---------------------------------------------------------------------------------------------------

_RESOURCES: Final = {
    "Pod": ("", "pods"),
    "ServiceAccount": ("", "serviceaccounts"),
    "Role": (RBAC, "roles"),
    "RoleBinding": (RBAC, "rolebindings"),
}


@dataclass(frozen=True, slots=True)
class _Object:
    """An object of the session: kind and name, shown as kubectl takes it."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.lower()}/{self.name}"

    @property
    def resource(self) -> str:
        """The resource as RBAC and ``kubectl auth can-i`` name it."""
        group, plural = _RESOURCES[self.kind]
        return f"{plural}.{group}" if group else plural

    def path(self, namespace: str) -> str:
        return f"{self.collection(namespace)}/{self.name}"

    def collection(self, namespace: str) -> str:
        group, plural = _RESOURCES[self.kind]
        return (f"/apis/{group}" if group else "/api") + f"/v1/namespaces/{namespace}/{plural}"


def _objects(name: SessionName) -> tuple[_Object, ...]:
    """Return what a session consists of, in the order in which it is created."""
    return (
        _Object("ServiceAccount", name.access),
        _Object("Pod", name.runner),
        _Object("Role", name.access),
        _Object("RoleBinding", name.access),
        _Object("Pod", name.workspace),
    )


class _Cluster:
    """The API server as this command sees it.

    Its methods raise SessionError when the API server refuses, KubeError when it gives no answer or only says that it
    cannot now: then a change may have been made, or may yet be made, or not.
    """

    def __init__(self, client: kube.KubeClient, namespace: str) -> None:
        self._client = client
        self.namespace = namespace
        self._last_create: asyncio.Task[Manifest] | None = None

    # What changes nothing is asked again when there is no answer.

    async def read(self, path: str, query: Mapping[str, str] | None = None) -> tuple[int, Manifest]:
        """Return the status (200, 403 or 404) and the object."""
        status, answer = await self._patiently("GET", path, query=query)
        if status not in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
            _check(status, answer, f"{path} cannot be read")
        return status, dict(answer)

    async def allows(self, verb: str, resource: str, name: str) -> bool:
        """Return whether the person may do that in the namespace; ``resource`` is ``roles.rbac…`` or ``pods/exec``."""
        resource, _, subresource = resource.partition("/")
        plural, _, group = resource.partition(".")
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": plural}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes | {"subresource": subresource, "name": name}},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = _check(*await self._patiently("POST", path, body=body), "permissions cannot be asked for")
        return (answer.get("status") or {}).get("allowed") is True

    # These are tried once; whoever polls tries again.

    async def find(self, item: _Object) -> Manifest | None:
        """Return an object as it is now, None when there is none."""
        status, answer = await self._call("GET", item.path(self.namespace))
        return None if status == HTTPStatus.NOT_FOUND else _check(status, answer, f"{item} cannot be read")

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object. The request goes on when this is cancelled; see ``last_create_answered``."""
        item = _Object(manifest["kind"], manifest["metadata"]["name"])

        async def post() -> Manifest:
            answered = await self._call("POST", item.collection(self.namespace), body=manifest)
            return _check(*answered, f"{item} cannot be created")

        self._last_create = asyncio.create_task(post())
        return await asyncio.shield(self._last_create)

    @property
    def began_to_create(self) -> bool:
        """Whether any create request was sent."""
        return self._last_create is not None

    async def last_create_answered(self) -> bool:
        """Wait for the last create request's end, which has a bound of its own; False: its object may appear yet."""
        if self._last_create is None:
            return True
        await asyncio.wait([self._last_create])
        return not isinstance(self._last_create.exception(), KubeError)

    async def set_owner(self, item: _Object, reference: Manifest) -> None:
        """Give an existing object its owner."""
        patch = {"metadata": {"ownerReferences": [reference]}}
        media_type = "application/merge-patch+json"
        answered = await self._call("PATCH", item.path(self.namespace), body=patch, content_type=media_type)
        _check(*answered, f"{item} cannot be given its owner")

    async def delete(self, item: _Object, uid: str, grace_seconds: int | None) -> None:
        """Delete the object with that UID. That it is gone already, or another of that name there, is no error."""
        body: Manifest = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        status, answer = await self._call("DELETE", item.path(self.namespace), body=body)
        if status not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
            _check(status, answer, f"{item} cannot be deleted")

    async def _patiently(self, method: str, path: str, **arguments: Any) -> tuple[int, Mapping[str, Any]]:
        for _ in range(READ_ATTEMPTS - 1):
            with contextlib.suppress(KubeTimeoutError, KubeUnavailableError):
                return await self._call(method, path, **arguments)
            await asyncio.sleep(RETRY_SECONDS)
        return await self._call(method, path, **arguments)

    async def _call(self, method: str, path: str, **arguments: Any) -> tuple[int, Mapping[str, Any]]:
        status, answer = await self._client.call(method, path, **arguments)
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise KubeUnavailableError(f"{method} {path}: {_message(status, answer)}")
        return status, answer


def _check(status: int, answer: Mapping[str, Any], what: str) -> Manifest:
    if status < HTTPStatus.MULTIPLE_CHOICES:
        return dict(answer)
    taken = answer.get("reason") == "AlreadyExists"
    # `up` says by itself what it left behind; to the others the cluster did not answer their question.
    raise SessionError(f"{what}: {'the name is taken' if taken else _message(status, answer)}", EXIT_UNKNOWN)


def _message(status: int, answer: Mapping[str, Any]) -> str:
    return str(answer.get("message") or f"HTTP {status}")[:MAX_MESSAGE]


@contextlib.asynccontextmanager
async def _connected(environ: Mapping[str, str], namespace: str | None) -> AsyncIterator[_Cluster]:
    """Connect as the person whose kubeconfig it is. Raises ConfigError."""
    path = environ.get("KUBECONFIG")
    if path or not environ.get("KUBERNETES_SERVICE_HOST"):
        # Several files joined by colons are the library's business, a file that is not there is ours to name.
        shown = path or "~/.kube/config"
        if ":" not in shown and not Path(shown).expanduser().is_file():  # noqa: ASYNC240 (once, at start)
            given = f"KUBECONFIG is {path!r}" if path else f"KUBECONFIG is not set, and {shown} is no file"
            raise ConfigError([f"{given}; it must be a kubeconfig file that can be read"])
        environ = {name: value for name, value in environ.items() if name != "KUBERNETES_SERVICE_HOST"}
    credentials = await kube.load_credentials(environ)
    namespace = namespace or credentials.namespace
    if not namespace:
        raise ConfigError(
            ["--namespace is not given and the kubeconfig names none; it must be the session's namespace"]
        )
    client = kube.KubeClient(credentials, namespace=namespace)
    try:
        yield _Cluster(client, namespace)
    finally:
        await client.close()


# --- up ---------------------------------------------------------------------------------------------------------------


async def _up(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    spec = parse_spec(values)
    if values.get("dry_run"):
        print(dry_run(spec), end="")
        return EXIT_DONE
    async with _connected(environ, spec.namespace) as cluster:
        run, progress = secrets.token_hex(8), _Progress()
        work = asyncio.create_task(_bring_up(cluster, spec, run, progress))
        _on_signals(work)
        await asyncio.wait([work])
        error = asyncio.CancelledError() if work.cancelled() else work.exception()
        if error is not None:
            await _give_up(cluster, spec.name, run, progress, error)
        _say(f"session {spec.name.session} is ready")
        print(_usage(spec.name, cluster.namespace), flush=True)
    return EXIT_DONE


def _on_signals(work: asyncio.Task[None]) -> None:
    """Let the signals that end a program end ``work`` instead. What comes after it is bounded and not interrupted."""

    def interrupt() -> None:
        if not work.cancel():
            _say(f"stopping already; it takes at most {ROLLBACK_SECONDS + kube.REQUEST_SECONDS:g} s")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` have it
            asyncio.get_running_loop().add_signal_handler(number, interrupt)


async def _bring_up(cluster: _Cluster, spec: SessionSpec, run: str, progress: _Progress) -> None:
    if problems := await _preflight(cluster, spec):
        raise ConfigError(problems)
    progress("checks", f"passed; creating session {spec.name.session} in namespace {cluster.namespace}")
    try:
        async with asyncio.timeout(spec.timeout):
            uids = await _create_all(cluster, spec, run, progress)
            await _wait_ready(cluster, uids, progress)
    except TimeoutError:
        pods = (item for item in _objects(spec.name) if item.kind == "Pod")
        states = ((item, progress.states.get(str(item), "not created")) for item in pods)
        unready = "; ".join(f"{item}: {state}" for item, state in states if state != "ready")
        raise SessionError(f"not ready in --timeout {spec.timeout:g} s: {unready}") from None


async def _give_up(
    cluster: _Cluster, name: SessionName, run: str, progress: _Progress, error: BaseException
) -> NoReturn:
    """Remove what ``run`` created, and say in an exception why and how it went."""
    reason = _reason(error)
    if not cluster.began_to_create:
        if isinstance(error, ConfigError | KubeUnauthorizedError):
            raise error
        raise SessionError(f"{reason}; nothing was created")
    _say(f"failed: {reason}; removing what was created")
    left = await _remove(
        cluster,
        name,
        lambda found: (found["metadata"].get("annotations") or {}).get(RUN_ANNOTATION) == run,
        progress,
        seconds=ROLLBACK_SECONDS,
        at_least=0 if await cluster.last_create_answered() else SETTLE_SECONDS,
        grace_seconds=ROLLBACK_GRACE_SECONDS,
    )
    if left:
        raise SessionError(
            f"{reason}; after {ROLLBACK_SECONDS:g} s there may be left: {', '.join(map(str, left))}; to remove it: "
            f"session-proxy session down {name.session} --namespace {cluster.namespace}",
            EXIT_UNKNOWN,
        )
    raise SessionError(f"{reason}; everything that was created is removed again")


def _usage(name: SessionName, namespace: str) -> str:
    target = f"kubectl exec --namespace {namespace} {name.runner} --container {RUNNER_CONTAINER} --"
    body = """'{"command":["id"]}'"""
    return (
        "Run a command in the workspace, from the runner (with what its image has):\n"
        f"  {target} curl -sN -d {body} {PROXY_URL}/exec\n"
        f"  {target} wget -qO- --post-data {body} {PROXY_URL}/exec\n"
        "Look at the session, remove it:\n"
        f"  session-proxy session status {name.session} --namespace {namespace}\n"
        f"  session-proxy session down {name.session} --namespace {namespace}"
    )


def dry_run(spec: SessionSpec) -> str:
    """Return what ``up`` would create as YAML, in that order."""
    account = service_account(spec.name)
    account["metadata"]["ownerReferences"] = [owner_reference(spec.name, PLACEHOLDER_UID)]
    documents = [account, runner_pod(spec), *manifests(spec, PLACEHOLDER_UID)]
    if spec.namespace is not None:
        for document in documents:
            document["metadata"]["namespace"] = spec.namespace
    return (
        f"# What `session-proxy session up {spec.name.session}` creates, in this order. Nothing has been created.\n"
        f"# The owner UID {PLACEHOLDER_UID} is a placeholder: the real one is known once the runner pod\n"
        "# exists, and the ServiceAccount gets it then. Not to be applied as it is: what names an owner that does not\n"
        "# exist is removed by the garbage collector.\n"
    ) + yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True)


# --- checks before anything is created --------------------------------------------------------------------------------


async def _preflight(cluster: _Cluster, spec: SessionSpec) -> list[str]:
    """Return everything about the cluster that stands in the way."""
    groups = (
        await _version_problems(cluster, spec),
        await _reference_problems(cluster, spec),
        await _permission_problems(cluster, [*_needs_of_up(spec), *await _grants(cluster, spec.name)]),
        await _taken_names(cluster, spec.name),
    )
    return [problem for group in groups for problem in group]


async def _version_problems(cluster: _Cluster, spec: SessionSpec) -> list[str]:
    if spec.sidecar is not Sidecar.NATIVE:
        return []
    status, version = await cluster.read("/version")
    release = server_release(version)
    if release >= MIN_SERVER or status == HTTPStatus.FORBIDDEN:
        return []
    served, needed = (".".join(map(str, numbers)) for numbers in (release, MIN_SERVER))
    return [f"--sidecar is 'native', which needs Kubernetes {needed}; it must be container on this one ({served})"]


def server_release(version: Mapping[str, Any]) -> tuple[int, int]:
    """Return major and minor of the API server's /version, (0, 0) when it does not say."""
    # Not its fields major and minor, which some builds leave empty.
    found = re.match(r"v([0-9]{1,4})\.([0-9]{1,4})", str(version.get("gitVersion", "")), re.ASCII)
    return (int(found[1]), int(found[2])) if found else (0, 0)


async def _reference_problems(cluster: _Cluster, spec: SessionSpec) -> list[str]:
    """Look for the objects that options name. What the person may not read is left to the API server."""
    namespace = f"/api/v1/namespaces/{cluster.namespace}"
    references = {
        ("--namespace", cluster.namespace): namespace,
        ("--workspace-claim", spec.workspace_claim): f"{namespace}/persistentvolumeclaims/{spec.workspace_claim}",
        ("--runtime-class", spec.runtime_class): f"/apis/node.k8s.io/v1/runtimeclasses/{spec.runtime_class}",
        ("--node-name", spec.node_name): f"/api/v1/nodes/{spec.node_name}",
    }
    problems = []
    for (flag, value), path in references.items():
        if value is None:
            continue
        status, found = await cluster.read(path)
        if status == HTTPStatus.NOT_FOUND:
            problems.append(f"{flag} is {value!r}; it must be one that exists{await _choice(cluster, path)}")
        elif (found.get("metadata") or {}).get("deletionTimestamp"):
            problems.append(f"{flag} is {value!r}; it must be one that is not being deleted")
    return problems


async def _choice(cluster: _Cluster, path: str) -> str:
    """Return what there is to choose from beside ``path``, as far as the person may know."""
    status, listed = await cluster.read(path.rpartition("/")[0], {"limit": str(MAX_LISTED)})
    if status == HTTPStatus.FORBIDDEN:
        return ""
    names = [str(item["metadata"]["name"]) for item in listed.get("items") or ()]
    return f", such as {', '.join(names)}" if names else "; there is none"


Need = tuple[str, str, str]
"""Verb, resource, and the object's name, empty where RBAC cannot know it."""


def _needs(name: SessionName, *verbs: str) -> list[Need]:
    return [(verb, item.resource, "" if verb == "create" else item.name) for item in _objects(name) for verb in verbs]


def _needs_of_up(spec: SessionSpec) -> list[Need]:
    needs = [*_needs(spec.name, "create", "get", "delete"), ("patch", "serviceaccounts", spec.name.access)]
    return needs + ([("get", "persistentvolumeclaims", spec.workspace_claim)] if spec.workspace_claim else [])


async def _grants(cluster: _Cluster, name: SessionName) -> list[Need]:
    """Return what the person must hold because the Role grants it: nobody may grant more, unless with these verbs."""
    free: list[Need] = [(verb, f"roles.{RBAC}", name.access) for verb in ("escalate", "bind")]
    if not await _missing(cluster, free):
        return []
    return [(verb, resource, name.workspace) for resource, verbs in ROLE_VERBS for verb in verbs]


async def _missing(cluster: _Cluster, needs: Sequence[Need]) -> list[Need]:
    answers = await asyncio.gather(*(cluster.allows(*need) for need in needs))
    return [need for need, allowed in zip(needs, answers, strict=True) if not allowed]


async def _permission_problems(cluster: _Cluster, needs: Iterable[Need]) -> list[str]:
    lacking: dict[str, dict[str, None]] = {}
    for verb, resource, _ in await _missing(cluster, list(dict.fromkeys(needs))):
        lacking.setdefault(resource, {})[verb] = None
    return [
        f"KUBECONFIG's user may not {', '.join(verbs)} {resource} in namespace {cluster.namespace}; RBAC must allow it"
        for resource, verbs in lacking.items()
    ]


async def _taken_names(cluster: _Cluster, name: SessionName) -> list[str]:
    taken = []
    for item in _objects(name):
        status, _ = await cluster.read(item.path(cluster.namespace))
        if status not in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
            taken.append(item)
    if not taken:
        return []
    return [
        f"NAME is {name.session!r}; it must be free in namespace {cluster.namespace}, where there is "
        + ", ".join(map(str, taken))
    ]


# --- creating and waiting ---------------------------------------------------------------------------------------------


async def _create_all(cluster: _Cluster, spec: SessionSpec, run: str, progress: _Progress) -> dict[_Object, str]:
    """Create everything; return the pods with their UIDs."""
    pods: dict[_Object, str] = {}

    async def create(manifest: Manifest) -> str:
        manifest["metadata"]["annotations"] = {RUN_ANNOTATION: run}
        uid = str((await cluster.create(manifest))["metadata"]["uid"])
        item = _Object(manifest["kind"], manifest["metadata"]["name"])
        progress(item, "created")
        if item.kind == "Pod":
            pods[item] = uid
        return uid

    account = service_account(spec.name)
    await create(account)
    runner_uid = await create(runner_pod(spec))
    await cluster.set_owner(_Object("ServiceAccount", spec.name.access), owner_reference(spec.name, runner_uid))
    for manifest in manifests(spec, runner_uid):
        await create(manifest)
    return pods


async def _wait_ready(cluster: _Cluster, pods: Mapping[_Object, str], progress: _Progress) -> None:
    """Return once both pods are ready, which for the sidecar means that it would run a command now."""
    while True:
        try:
            states = [_awaited_state(item, await cluster.find(item), uid) for item, uid in pods.items()]
        except KubeError as error:
            progress("API server", error.detail)
        else:
            for item, state in zip(pods, states, strict=True):
                progress(item, state)
            if all(state == "ready" for state in states):
                return
        await asyncio.sleep(POLL_SECONDS)


def _awaited_state(item: _Object, pod: Manifest | None, uid: str) -> str:
    """Return the pod's state in words. Raises SessionError when it is not worth waiting for."""
    if pod is None or pod["metadata"].get("uid") != uid:
        raise SessionError(f"{item} was removed by somebody else")
    state, hopeless = pod_state(pod)
    if hopeless:
        raise SessionError(f"{item}: {state}")
    return state


def pod_state(pod: Mapping[str, Any]) -> tuple[str, bool]:
    """Return what a pod does, in words (``ready`` when it is), and whether waiting for more has no sense."""
    status = pod.get("status") or {}
    if (pod.get("metadata") or {}).get("deletionTimestamp"):
        return "being deleted", True
    if status.get("phase") in ("Failed", "Succeeded"):
        return _words(status["phase"], status.get("reason"), status.get("message")), True
    conditions = {item.get("type"): item for item in status.get("conditions") or ()}
    if (conditions.get("Ready") or {}).get("status") == "True":
        return "ready", False
    containers = _containers(pod)
    states = [state for container in containers if (state := _container_state(container))]
    if states:
        return min(states, key=lambda state: not state[1])  # the first that is hopeless, else the first
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return _words("not scheduled", scheduled.get("reason"), scheduled.get("message")), False
    unready = [str(container.get("name")) for container in containers if not container.get("ready")]
    if status.get("phase") == "Running":
        return f"running, not ready yet: {', '.join(unready)}", False
    return "pending", False


def _container_state(container: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Return what a container that does not run waits for, and whether in vain."""
    state = container.get("state") or {}
    what = f"container {container.get('name')}"
    if waiting := state.get("waiting"):
        reason = str(waiting.get("reason") or "waiting")
        if reason == "PodInitializing":
            return None  # for another container, which says more
        ended = (container.get("lastState") or {}).get("terminated")
        words = _words(f"{what}: {reason}", waiting.get("message"), _ending(ended) if ended else None)
        return words, reason in HOPELESS
    if (ended := state.get("terminated")) and not container.get("ready"):
        return _words(f"{what}: ended", _ending(ended)), False
    return None


def _runs(pod: Mapping[str, Any]) -> bool:
    return any("running" in (container.get("state") or {}) for container in _containers(pod))


def _containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _ending(ended: Mapping[str, Any]) -> str:
    return f"exit code {ended.get('exitCode')}, {ended.get('reason', 'no reason given')}"


def _words(first: str, *more: object) -> str:
    rest = ": ".join(str(word)[:MAX_MESSAGE] for word in more if word)
    return f"{first}: {rest}" if rest else first


# --- rollback and down ------------------------------------------------------------------------------------------------


async def _remove(
    cluster: _Cluster,
    name: SessionName,
    ours: Callable[[Manifest], bool],
    progress: _Progress,
    *,
    seconds: float,
    at_least: float = 0,
    grace_seconds: int | None = None,
) -> list[_Object]:
    """Delete the session's objects that are ``ours`` and look until they are gone; return what is left in the end.

    Whatever fails is tried again until the time is over: the API server may be restarting.
    """
    left = set(_objects(name))
    deleted: set[tuple[str, int | None]] = set()
    settled = time.monotonic() + at_least

    async def remove(item: _Object) -> None:
        while True:
            try:
                found = await cluster.find(item)
                if found is None or not ours(found):
                    left.discard(item)
                    if time.monotonic() >= settled:
                        return
                else:
                    left.add(item)
                    await end(item, found)
            except (KubeError, SessionError) as error:
                left.add(item)
                progress(item, _reason(error))
            await asyncio.sleep(POLL_SECONDS)

    async def end(item: _Object, found: Manifest) -> None:
        uid = str(found["metadata"]["uid"])
        # Where nothing runs nothing has to end. Kubernetes 1.20 was seen to take up to 89 s more to find that out.
        grace = grace_seconds if _runs(found) else 0
        if (uid, grace) not in deleted:
            await cluster.delete(item, uid, grace)
            deleted.add((uid, grace))
            progress(item, "being deleted")

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            # All at once: one that gets no answer holds up none of the others.
            await asyncio.gather(*map(remove, _objects(name)))
    return [item for item in _objects(name) if item in left]


def _is_of_session(found: Mapping[str, Any], name: SessionName) -> bool:
    labels = found["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in {**MANAGED_BY, "session": name.session}.items())


async def _look(cluster: _Cluster, name: SessionName, *verbs: str) -> tuple[dict[_Object, Manifest], list[_Object]]:
    """Return the session's objects that are there, and those of its names that something else has.

    Raises ConfigError when the person may not use ``verbs`` on them.
    """
    if problems := await _permission_problems(cluster, _needs(name, *verbs)):
        raise ConfigError(problems)
    found = {item: found for item in _objects(name) if (found := await cluster.find(item)) is not None}
    foreign = [item for item, manifest in found.items() if not _is_of_session(manifest, name)]
    return {item: manifest for item, manifest in found.items() if item not in foreign}, foreign


async def _down(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    name, namespace, seconds = parse_name(values)
    async with _connected(environ, namespace) as cluster:
        present, foreign = await _look(cluster, name, "get", "delete")
        left = await _remove(cluster, name, lambda found: _is_of_session(found, name), _Progress(), seconds=seconds)
        where = f"session {name.session} in namespace {cluster.namespace}"
    if foreign:
        _say(f"not touched, because `session up` did not make it: {', '.join(map(str, foreign))}")
    if left:
        raise SessionError(f"{where}: after --timeout {seconds:g} s there is still {', '.join(map(str, left))}")
    _say(f"{where}: {'removed' if present else 'nothing was there'}")
    return EXIT_DONE


# --- status -----------------------------------------------------------------------------------------------------------


async def _status(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    name, namespace, _ = parse_name(values)
    async with _connected(environ, namespace) as cluster:
        present, foreign = await _look(cluster, name, "get")
        where = f"session {name.session} in namespace {cluster.namespace}"
    if not present:
        print(f"{where}: nothing there")
        return EXIT_NOTHING_THERE
    states = dict.fromkeys(_objects(name), "missing") | dict.fromkeys(foreign, "not made by `session up`")
    for item, manifest in present.items():
        states[item] = pod_state(manifest)[0] if item.kind == "Pod" else "there"
    ready = all(state in ("ready", "there") for state in states.values())
    for item, state in states.items():
        print(f"{item!s:<{max(len(str(item)) for item in states)}}  {_printable(state)}")
    print(f"{where}: {'ready' if ready else 'not ready'}")
    if not ready and _Object("Pod", name.runner) in present:
        print(
            f"What the sidecar says of it: kubectl exec --namespace {cluster.namespace} {name.runner} --container "
            f"{PROXY_CONTAINER} -- session-proxy health --ready"
        )
    return EXIT_DONE if ready else EXIT_FAILED
