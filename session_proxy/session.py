"""``session-proxy session up|status|down``: a session on a cluster, whole or not at all.

For the platform's side, with a person's own kubeconfig. What is created, and in which order:

1. ServiceAccount (a pod cannot be created without it)
2. runner pod, which owns everything else: once it is gone, the garbage collector removes the rest
3. Role and RoleBinding for exactly the workspace pod's name, and the ServiceAccount's owner reference
4. workspace pod

Each object carries the id of the attempt that made it. A rollback removes what carries that id, so it finds also what
was created by a request whose answer was lost, and never a namesake.
"""

import asyncio
import contextlib
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from session_proxy import kube
from session_proxy.errors import ConfigError, KubeError, SessionProxyError
from session_proxy.ownership import OwnerMode, check_ownership
from session_proxy.policy import PolicySettings, evaluate
from session_proxy.session_spec import (
    ATTEMPT_ANNOTATION,
    MANAGED_BY,
    MIN_SERVER,
    PROXY_CONTAINER,
    ROLE_VERBS,
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
    sidecar_policy,
)

EXIT_READY: Final = 0
EXIT_NOT_READY: Final = 1
EXIT_NOTHING_THERE: Final = 2
EXIT_CONFIG: Final = 78

POLL_SECONDS: Final = 0.25
"""Between two looks at pods that are starting or going."""

CREATE_SECONDS: Final = 30.0
"""For all objects to be created; the wait for them to be ready has ``--timeout``."""

ROLLBACK_SECONDS: Final = 45.0
"""For removing everything after a failure, the pods' end included."""

ROLLBACK_GRACE_SECONDS: Final = 1
"""Grace of pods in a rollback: nothing runs in them that anybody waits for."""

READ_ATTEMPTS: Final = 3
"""Of a read before anything is created; the API server may be restarting."""

RETRY_SECONDS: Final = 1.0
"""Between those."""

HTTP_OK: Final = 200
HTTP_MULTIPLE_CHOICES: Final = 300
HTTP_FORBIDDEN: Final = 403
HTTP_NOT_FOUND: Final = 404
HTTP_CONFLICT: Final = 409

RBAC: Final = "rbac.authorization.k8s.io"

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
"""Reasons for which a container waits that time alone does not cure."""

T = TypeVar("T")


class SessionError(SessionProxyError):
    """A step failed; the text says which and why."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Where objects of a kind live in the API."""

    title: str
    group: str
    plural: str

    def path(self, namespace: str, name: str = "") -> str:
        root = f"/apis/{self.group}/v1" if self.group else "/api/v1"
        return f"{root}/namespaces/{namespace}/{self.plural}" + (f"/{name}" if name else "")


POD: Final = _Kind("pod", "", "pods")
SERVICE_ACCOUNT: Final = _Kind("service account", "", "serviceaccounts")
ROLE: Final = _Kind("role", RBAC, "roles")
ROLE_BINDING: Final = _Kind("role binding", RBAC, "rolebindings")
_KINDS: Final = {"Pod": POD, "ServiceAccount": SERVICE_ACCOUNT, "Role": ROLE, "RoleBinding": ROLE_BINDING}


def _objects(name: SessionName) -> tuple[tuple[_Kind, str], ...]:
    """Return what a session consists of, in the order in which it is removed: access first; then nothing new runs."""
    return (
        (ROLE_BINDING, name.access),
        (ROLE, name.access),
        (POD, name.runner),
        (POD, name.workspace),
        (SERVICE_ACCOUNT, name.access),
    )


def run_session(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Run the subcommand that ``values`` (the parsed arguments) name; return the exit status."""
    command = {"up": _up, "status": _status, "down": _down}[values["session_command"]]
    try:
        return asyncio.run(_interruptible(command(values, environ)))
    except ConfigError as error:
        for problem in error.problems:
            _say(problem)
        return EXIT_CONFIG
    except KubeError as error:
        _say(f"{error.reason}: {error.detail}")
    except SessionError as error:
        _say(str(error))
    except asyncio.CancelledError:
        _say("interrupted")
    return EXIT_NOT_READY


def _say(text: str) -> None:
    print(f"session-proxy: {_printable(text)}", file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    # Image names and messages come from a cluster: they must not steer the terminal that shows them.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


async def _interruptible(work: Awaitable[int]) -> int:
    """Cancel ``work`` at the first SIGINT or SIGTERM. Later ones change nothing: the rollback is bounded anyway."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    cancelled = False

    def interrupt() -> None:
        nonlocal cancelled
        if cancelled:
            _say(f"already stopping; it takes at most {ROLLBACK_SECONDS:g} s")
            return
        cancelled = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    return await task


@dataclass(slots=True)
class _Cluster:
    """The API server as this command sees it."""

    client: kube.KubeClient
    namespace: str

    async def read(self, path: str) -> Manifest | None:
        """Return the object at ``path`` as it is now, None when there is none. Raises SessionError, KubeError."""
        return await self._retried(lambda: self._get(path), READ_ATTEMPTS)

    async def find(self, kind: _Kind, name: str) -> Manifest | None:
        """Return an object of the namespace, None when there is none."""
        return await self.read(kind.path(self.namespace, name))

    async def can(self, verb: str, resource: str, name: str = "") -> bool:
        """Return whether the person may do that in the namespace; ``resource`` is ``roles.rbac…`` or ``pods/exec``."""
        resource, _, subresource = resource.partition("/")
        plural, _, group = resource.partition(".")
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": plural}
        attributes |= {"subresource": subresource} if subresource else {}
        attributes |= {"name": name} if name else {}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }

        async def ask() -> bool:
            path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            status, answer = await self.client.call("POST", path, body=body)
            if status >= HTTP_MULTIPLE_CHOICES:
                raise SessionError(f"asking for permissions: {_refusal(status, answer)}")
            return answer.get("status", {}).get("allowed") is True

        return await self._retried(ask, READ_ATTEMPTS)

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object. Once begun, the request is waited for even when this is cancelled."""
        kind, name = _KINDS[manifest["kind"]], manifest["metadata"]["name"]
        status, answer = await _to_the_end(
            self.client.call("POST", kind.path(self.namespace), body=manifest), kube.REQUEST_SECONDS
        )
        if status >= HTTP_MULTIPLE_CHOICES:
            raise SessionError(f"{kind.title} {name} cannot be created: {_refusal(status, answer)}")
        return dict(answer)

    async def set_owner(self, kind: _Kind, name: str, reference: Manifest) -> None:
        """Give an existing object its owner."""
        patch = {"metadata": {"ownerReferences": [reference]}}
        path = kind.path(self.namespace, name)
        status, answer = await self.client.call("PATCH", path, body=patch, content_type="application/merge-patch+json")
        if status >= HTTP_MULTIPLE_CHOICES:
            raise SessionError(f"{kind.title} {name} cannot be given its owner: {_refusal(status, answer)}")

    async def delete(self, kind: _Kind, name: str, uid: str, grace_seconds: int | None = None) -> None:
        """Delete the object with that UID; that it is gone already is no error."""
        body: Manifest = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        status, answer = await self.client.call("DELETE", kind.path(self.namespace, name), body=body)
        if status >= HTTP_MULTIPLE_CHOICES and status not in (HTTP_NOT_FOUND, HTTP_CONFLICT):
            raise SessionError(f"{kind.title} {name} cannot be deleted: {_refusal(status, answer)}")

    async def _get(self, path: str) -> Manifest | None:
        status, answer = await self.client.call("GET", path)
        if status == HTTP_NOT_FOUND:
            return None
        if status >= HTTP_MULTIPLE_CHOICES:
            raise SessionError(f"{path.rpartition('/')[2]} cannot be read: {_refusal(status, answer)}")
        return dict(answer)

    async def _retried(self, read: Callable[[], Awaitable[T]], attempts: int) -> T:
        for _ in range(attempts - 1):
            try:
                return await read()
            except KubeError:
                await asyncio.sleep(RETRY_SECONDS)
        return await read()


def _refusal(status: int, answer: Mapping[str, Any]) -> str:
    message = str(answer.get("message") or f"HTTP {status}")[:500]
    return "the name is taken" if answer.get("reason") == "AlreadyExists" else message


async def _to_the_end(work: Awaitable[T], seconds: float) -> T:
    """Await ``work``; when cancelled meanwhile, let it end (for at most ``seconds``) and only then pass that on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=seconds)
        if task.done() and not task.cancelled():
            task.exception()  # looked at, so that nothing is logged about it
        raise


@contextlib.asynccontextmanager
async def _connected(environ: Mapping[str, str], namespace: str | None) -> AsyncIterator[_Cluster]:
    """Connect as the person whose kubeconfig it is. Raises ConfigError."""
    path = environ.get("KUBECONFIG")
    if path or not environ.get("KUBERNETES_SERVICE_HOST"):
        # Several files joined by colons are the library's business, a file that is not there is ours to name.
        shown = path or "~/.kube/config"
        if ":" not in shown and not Path(shown).expanduser().is_file():  # noqa: ASYNC240 (once, at start)
            raise ConfigError([f"KUBECONFIG is {shown!r}; it must be a kubeconfig file that can be read"])
        environ = {name: value for name, value in environ.items() if name != "KUBERNETES_SERVICE_HOST"}
    credentials = await kube.load_credentials(environ)
    namespace = namespace or credentials.namespace
    if namespace is None:
        raise ConfigError(
            ["--namespace is not given and the kubeconfig names none; it must be the session's namespace"]
        )
    client = kube.KubeClient(credentials, namespace=namespace)
    try:
        yield _Cluster(client, namespace)
    finally:
        await client.close()


# --- up ---------------------------------------------------------------------------------------------------------------


class _Progress:
    """Says each thing once, with the time since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._said: dict[str, str] = {}

    def __call__(self, subject: str, state: str) -> None:
        if self._said.get(subject) != state:
            self._said[subject] = state
            _say(f"{time.monotonic() - self._started:5.1f} s  {subject}: {state}")


async def _up(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    spec = parse_spec(values)
    progress = _Progress()
    async with _connected(environ, spec.namespace) as cluster:
        if problems := await _preflight(cluster, spec):
            raise ConfigError(problems)
        progress("checks", f"passed, creating session {spec.name.session} in namespace {cluster.namespace}")
        attempt = secrets.token_hex(8)
        try:
            async with asyncio.timeout(CREATE_SECONDS):
                runner_uid = await _create_all(cluster, spec, attempt, progress)
            await _wait_ready(cluster, spec, runner_uid, progress)
        except BaseException as error:
            _say(f"failed: {_reason(error)}; removing what was created")
            left = await _to_the_end(_roll_back(cluster, spec.name, attempt), ROLLBACK_SECONDS)
            if left:
                raise SessionError(
                    f"could not remove in {ROLLBACK_SECONDS:g} s: {', '.join(left)}; "
                    f"run: session-proxy session down {spec.name.session} --namespace {cluster.namespace}"
                ) from error
            progress("rollback", "done, nothing is left")
            if isinstance(error, TimeoutError):
                raise SessionError(_reason(error)) from None
            raise
    progress("session", "ready")
    print(f"kubectl exec --namespace {cluster.namespace} {spec.name.runner} --container runner -it -- sh")
    return EXIT_READY


def _reason(error: BaseException) -> str:
    match error:
        case asyncio.CancelledError():
            return "interrupted"
        case TimeoutError():
            return f"the objects could not be created in {CREATE_SECONDS:g} s"
        case KubeError():
            return f"{error.reason}: {error.detail}"
    return str(error) or type(error).__name__


async def _preflight(cluster: _Cluster, spec: SessionSpec) -> list[str]:
    """Return everything about the cluster that stands in the way; nothing has been created."""
    problems = [*await _server_problems(cluster, spec), *await _permission_problems(cluster, spec)]
    if problems:
        return problems  # what follows would only fail for the same reasons
    found = await asyncio.gather(*(cluster.find(kind, name) for kind, name in _objects(spec.name)))
    return [
        f"NAME is {spec.name.session!r}; it must be free in namespace {cluster.namespace}, where {kind.title} {name} is"
        for (kind, name), existing in zip(_objects(spec.name), found, strict=True)
        if existing is not None
    ]


async def _server_problems(cluster: _Cluster, spec: SessionSpec) -> list[str]:
    problems: list[str] = []
    version = await cluster.read("/version") or {}
    release = server_release(version)
    if spec.sidecar is Sidecar.NATIVE and release < MIN_SERVER:
        problems.append(
            f"--sidecar is 'native'; it must be container, because this is Kubernetes {release[0]}.{release[1]} and "
            f"native sidecars need {MIN_SERVER[0]}.{MIN_SERVER[1]}"
        )
    status, _ = await cluster.client.call("GET", f"/api/v1/namespaces/{cluster.namespace}")
    if status == HTTP_NOT_FOUND:  # who may not read it will learn from the permissions
        problems.append(f"--namespace is {cluster.namespace!r}; it must be one that exists")
    if spec.runtime_class is not None:
        path = "/apis/node.k8s.io/v1/runtimeclasses"
        status, _ = await cluster.client.call("GET", f"{path}/{spec.runtime_class}")
        if status == HTTP_NOT_FOUND:
            _, listed = await cluster.client.call("GET", path)
            names = sorted(str(item["metadata"]["name"]) for item in listed.get("items") or ())
            problems.append(
                f"--runtime-class is {spec.runtime_class!r}; it must be one that the cluster has: "
                + (", ".join(names) or "it has none")
            )
    return problems


def server_release(version: Mapping[str, Any]) -> tuple[int, int]:
    """Return major and minor of the API server's /version; providers append to the minor (``29+``)."""
    numbers = [re.match(r"[0-9]{1,4}", str(version.get(key, ""))) for key in ("major", "minor")]
    major, minor = (int(number[0]) if number else 0 for number in numbers)
    return major, minor


NEEDED: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("pods", ("create", "get", "delete")),
    ("serviceaccounts", ("create", "get", "patch", "delete")),
    (f"roles.{RBAC}", ("create", "get", "delete")),
    (f"rolebindings.{RBAC}", ("create", "get", "delete")),
)
"""What ``up`` itself does."""


async def _permission_problems(cluster: _Cluster, spec: SessionSpec) -> list[str]:
    async def missing(pairs: Iterable[tuple[str, str, str]]) -> list[str]:
        asked = tuple(pairs)
        answers = await asyncio.gather(*(cluster.can(verb, resource, name) for resource, verb, name in asked))
        return [f"{verb} {resource}" for (resource, verb, _), ok in zip(asked, answers, strict=True) if not ok]

    lacking = await missing((resource, verb, "") for resource, verbs in NEEDED for verb in verbs)
    # Nobody may grant more than they hold, unless with these two verbs.
    if await missing((f"roles.{RBAC}", verb, spec.name.access) for verb in ("escalate", "bind")):
        lacking += await missing(
            (resource, verb, spec.name.workspace) for resource, verbs in ROLE_VERBS for verb in verbs
        )
    return [
        f"the kubeconfig's user may not {what} in namespace {cluster.namespace}; RBAC must allow it" for what in lacking
    ]


def _stamped(manifest: Manifest, attempt: str) -> Manifest:
    manifest["metadata"]["annotations"] = {ATTEMPT_ANNOTATION: attempt}
    return manifest


async def _create_all(cluster: _Cluster, spec: SessionSpec, attempt: str, progress: _Progress) -> str:
    """Create everything; return the runner pod's UID."""
    await cluster.create(_stamped(service_account(spec.name), attempt))
    runner = await cluster.create(_stamped(runner_pod(spec), attempt))
    runner_uid = str(runner["metadata"]["uid"])
    progress(f"pod {spec.name.runner}", "created")
    await cluster.set_owner(SERVICE_ACCOUNT, spec.name.access, owner_reference(spec.name, runner_uid))
    for manifest in manifests(spec, runner_uid):
        await cluster.create(_stamped(manifest, attempt))
    progress(f"pod {spec.name.workspace}", "created")
    return runner_uid


async def _wait_ready(cluster: _Cluster, spec: SessionSpec, runner_uid: str, progress: _Progress) -> None:
    """Return once both pods are ready, which for the sidecar means that it would run a command now."""
    deadline = time.monotonic() + spec.timeout_seconds
    names = (spec.name.workspace, spec.name.runner)
    states = dict.fromkeys(names, "unknown")
    while True:
        try:
            pods = await asyncio.gather(*(cluster.find(POD, name) for name in names))
        except KubeError as error:
            progress("API server", error.detail)
        else:
            for name, pod in zip(names, pods, strict=True):
                states[name] = _checked_state(name, pod, runner_uid if name == spec.name.runner else None)
                progress(f"pod {name}", states[name])
            if all(state == "ready" for state in states.values()):
                return
        if time.monotonic() > deadline:
            raise SessionError(
                f"not ready in --timeout {spec.timeout_seconds:g} s: "
                + "; ".join(f"pod {name}: {state}" for name, state in states.items() if state != "ready")
            )
        await asyncio.sleep(POLL_SECONDS)


def _checked_state(name: str, pod: Manifest | None, uid: str | None) -> str:
    """Return the pod's state in words. Raises SessionError when waiting for it has no sense."""
    if pod is None:
        raise SessionError(f"pod {name} was removed")
    if uid is not None and pod["metadata"].get("uid") != uid:
        raise SessionError(f"pod {name} was replaced by another of that name")
    state, hopeless = pod_state(pod)
    if hopeless:
        raise SessionError(f"pod {name}: {state}")
    return state


def pod_state(pod: Mapping[str, Any]) -> tuple[str, bool]:
    """Return what a pod does, in words (``ready`` when it is), and whether waiting for more has no sense."""
    status = pod.get("status") or {}
    if pod.get("metadata", {}).get("deletionTimestamp"):
        return "being deleted", True
    if status.get("phase") in ("Failed", "Succeeded"):
        return f"{status['phase']} {status.get('reason', '')} {status.get('message', '')}".strip(), True
    conditions = {item.get("type"): item for item in status.get("conditions") or ()}
    if conditions.get("Ready", {}).get("status") == "True":
        return "ready", False
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (container.get("state") or {}).get("waiting")
        if waiting:
            reason, message = str(waiting.get("reason", "waiting")), str(waiting.get("message", ""))[:300]
            words = f"container {container.get('name')}: {reason}" + (f": {message}" if message else "")
            if reason in HOPELESS:
                return words + _last_words(container), True
            if reason != "PodInitializing":
                return words, False
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'not scheduled')}: {scheduled.get('message', '')}", False
    if status.get("phase") == "Pending":
        return "pending", False
    unready = [
        str(container.get("name"))
        for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
        if not container.get("ready")
    ]
    return f"running, not ready yet: {', '.join(unready) or 'pod'}", False


def _last_words(container: Mapping[str, Any]) -> str:
    ended = (container.get("lastState") or {}).get("terminated") or {}
    if "exitCode" not in ended:
        return ""
    return f" (it ended with exit code {ended['exitCode']}, {ended.get('reason', 'no reason given')})"


# --- rollback and down ------------------------------------------------------------------------------------------------


async def _roll_back(cluster: _Cluster, name: SessionName, attempt: str) -> list[str]:
    """Remove what carries this attempt's id; return what is left after ROLLBACK_SECONDS."""

    def ours(found: Manifest) -> bool:
        return (found["metadata"].get("annotations") or {}).get(ATTEMPT_ANNOTATION) == attempt

    return await _remove(
        cluster,
        name,
        ours,
        seconds=ROLLBACK_SECONDS,
        grace_seconds=ROLLBACK_GRACE_SECONDS,
        progress=lambda *_: None,
    )


async def _remove(
    cluster: _Cluster,
    name: SessionName,
    ours: Callable[[Manifest], bool],
    *,
    seconds: float,
    grace_seconds: int | None,
    progress: Callable[[str, str], None],
) -> list[str]:
    """Delete the session's objects and wait until they are gone; return those that are not in time.

    Whatever fails is tried again until the time is over: the API server may be restarting.
    """
    deadline = time.monotonic() + seconds
    deleted: set[str] = set()
    while True:
        left: list[str] = []
        for kind, object_name in _objects(name):
            title = f"{kind.title} {object_name}"
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    status, answer = await cluster.client.call("GET", kind.path(cluster.namespace, object_name))
                    if status == HTTP_NOT_FOUND or (status == HTTP_OK and not ours(dict(answer))):
                        if title in deleted:
                            progress(title, "gone")
                        continue
                    left.append(title)
                    if status == HTTP_OK and title not in deleted:
                        await cluster.delete(kind, object_name, str(answer["metadata"]["uid"]), grace_seconds)
                        deleted.add(title)
                        progress(title, "being deleted")
                    elif status != HTTP_OK:
                        progress(title, _refusal(status, answer))
            except (KubeError, SessionError, TimeoutError) as error:
                left.append(title)
                progress(title, _reason(error))
        if not left:
            return []
        if time.monotonic() > deadline:
            return list(dict.fromkeys(left))
        await asyncio.sleep(POLL_SECONDS)


def _is_of_session(found: Mapping[str, Any], name: SessionName) -> bool:
    labels = found["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in {**MANAGED_BY, "session": name.session}.items())


async def _down(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    name, namespace, seconds = parse_name(values)
    progress = _Progress()
    async with _connected(environ, namespace) as cluster:
        found = await _existing(cluster, name)
        foreign = [title for title, item in found if not _is_of_session(item, name)]
        left = await _remove(
            cluster,
            name,
            lambda item: _is_of_session(item, name),
            seconds=seconds,
            grace_seconds=None,
            progress=progress,
        )
    if foreign:
        _say(f"not touched, because `session up` did not make it: {', '.join(foreign)}")
    if left:
        raise SessionError(f"still there after --timeout {seconds:g} s: {', '.join(left)}")
    _say("nothing was there" if len(foreign) == len(found) else "everything is removed")
    return EXIT_READY


async def _existing(cluster: _Cluster, name: SessionName) -> list[tuple[str, Manifest]]:
    objects = _objects(name)
    found = await asyncio.gather(*(cluster.find(kind, object_name) for kind, object_name in objects))
    return [
        (f"{kind.title} {object_name}", item)
        for (kind, object_name), item in zip(objects, found, strict=True)
        if item is not None
    ]


# --- status -----------------------------------------------------------------------------------------------------------


async def _status(values: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    name, namespace, _ = parse_name(values)
    async with _connected(environ, namespace) as cluster:
        found = dict(await _existing(cluster, name))
    titles = [f"{kind.title} {object_name}" for kind, object_name in _objects(name)]
    ours = {title: item for title, item in found.items() if _is_of_session(item, name)}
    if not ours:
        print(f"session {name.session}: nothing there")
        return EXIT_NOTHING_THERE
    states = {title: _object_state(ours.get(title), taken=title in found) for title in titles}
    print("\n".join(f"{title:<40}  {_printable(state)}" for title, state in states.items()))
    problems = _workspace_problems(ours, name)
    for problem in problems:
        print(f"{'':<40}  {_printable(problem)}")
    ready = not problems and all(state in ("ready", "there") for state in states.values())
    print(f"session {name.session}: {'ready' if ready else 'not ready'}")
    return EXIT_READY if ready else EXIT_NOT_READY


def _object_state(item: Manifest | None, *, taken: bool) -> str:
    if item is None:
        return "not made by `session up`" if taken else "missing"
    return pod_state(item)[0] if item.get("kind") == "Pod" else "there"


def _workspace_problems(found: Mapping[str, Manifest], name: SessionName) -> Sequence[str]:
    """Hold the workspace against ownership and policy, as the sidecar will, with the level that it is told."""
    workspace, runner = found.get(f"pod {name.workspace}"), found.get(f"pod {name.runner}")
    if workspace is None or runner is None:
        return ()
    settings = policy_of(runner)
    problem = check_ownership(workspace, mode=OwnerMode.SELF, own_pod_uid=runner["metadata"]["uid"])
    violations = [f"{item.field} is {item.value}; it must be {item.expected}" for item in evaluate(workspace, settings)]
    return [*([f"workspace_not_owned: {problem}"] if problem else []), *violations]


def policy_of(runner: Mapping[str, Any]) -> PolicySettings:
    """Return the policy that the sidecar of this runner pod applies; its settings stand in its environment."""
    pod_spec = runner["spec"]
    containers = (*(pod_spec.get("initContainers") or ()), *pod_spec["containers"])
    sidecar: Mapping[str, Any] = next((item for item in containers if item["name"] == PROXY_CONTAINER), {})
    settings = {item["name"]: str(item.get("value", "")) for item in sidecar.get("env") or ()}
    return sidecar_policy(settings)
