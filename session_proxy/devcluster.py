"""An embedded stand-in for the Kubernetes API server: same wire, one machine, no cluster.

**It is not a sandbox.** Its "containers" share one scratch directory, and whatever is run in them is an ordinary child
process of this one: same user, same network, same files. It listens on loopback only and demands its token always,
because whoever may talk to it may run commands as the user that started it.

What it promises is the wire: pods GET, LIST, WATCH and DELETE, exec over a websocket with ``v5.channel.k8s.io`` and
``v4.channel.k8s.io``, ``Status`` objects with the words of kube-apiserver, kubelet and containerd. What it copies:

- the first frame after the upgrade is empty and names the lowest output channel; it is sent before the process starts;
- the process leads its own session and process group, as runc makes it;
- stdout and stderr are copied independently, in frames of at most 32 KiB and the channel byte;
- the Status is withheld until the process ended and nobody holds its stdout or stderr any more;
- a dropped connection kills nothing: standard input reaches end of file, and whoever keeps printing blocks on a full
  pipe (it gets no SIGPIPE, and nobody drains it);
- standard input that nobody reads stops the server from reading the websocket, pings included;
- killing a container ends its execs with exit code 137 and a Status;
- on a container that is not running v4 is refused with HTTP 500, v5 is upgraded and told on channel 3.

What differs, on purpose: ``tty=true``, SPDY and the base64 subprotocols are refused; an upgrade that offers no
subprotocol at all is refused like one that offers unknown ones; a container has no main process of its own, so a
deletion with a grace period takes all of it; everything is allowed in every namespace unless ``Faults.forbidden`` says
otherwise. A process that both cleared its environment and outlived its parent escapes the kill of its container.
"""

import asyncio
import base64
import contextlib
import copy
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import select
import signal
import socket
import ssl
import stat
import struct
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import WSMsgType, web

Json = dict[str, Any]

V5: Final = "v5.channel.k8s.io"
V4: Final = "v4.channel.k8s.io"

STDIN, STDOUT, STDERR, STATUS, CLOSE = 0, 1, 2, 3, 255

OUTPUT_CHUNK_BYTES: Final = 32 * 1024
FRAMES_BETWEEN_YIELDS: Final = 8
MAX_STDIN_MESSAGE_BYTES: Final = 32 * 1024 * 1024
MAX_REQUEST_LINE_BYTES: Final = 1024 * 1024
MAX_HISTORY_EVENTS: Final = 1000
MAX_REMEMBERED_REQUESTS: Final = 1000
MAX_REMEMBERED_EXECS: Final = 10_000

WATCH_SECONDS: Final = 1800.0
BOOKMARK_SECONDS: Final = 60.0
CLOSE_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.02
KILL_ROUNDS: Final = 50
KILL_WAIT_SECONDS: Final = 0.5
STOP_SECONDS: Final = 5.0
DEFAULT_GRACE_SECONDS: Final = 30
FIRST_RESOURCE_VERSION: Final = 100

SERVER_VERSION: Final = "v1.35.0+devcluster"
USER: Final = "system:serviceaccount:default:session-proxy"
MARKER: Final = "DEVCLUSTER_CONTAINER"
CONTAINER_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATH_PREFIX: Final = "/t/"
ALLOWED: Final = frozenset(
    {"get pods", "list pods", "watch pods", "delete pods", "get pods/exec", "create pods/exec"}
    | {"create selfsubjectaccessreviews"}
)


@dataclass(slots=True)
class Faults:
    """Switches for what can go wrong; all off by default, all may be changed while the server runs.

    ``int`` switches count down with every request that they hit; -1 means every request.
    """

    unauthorized: int = 0
    """Answer so many requests with 401."""
    unavailable: int = 0
    """Answer so many requests with a 503 Status."""
    forbidden: set[str] = field(default_factory=set)
    """``{"list pods", "get pods/exec"}``: 403 for that verb and resource, and access reviews say denied.

    A websocket exec needs both ``get`` and ``create`` on ``pods/exec``, as from Kubernetes 1.35 on.
    """
    forbidden_empty_body: bool = False
    """Answer the exec upgrade with a 403 without a body."""
    hang: set[str] = field(default_factory=set)
    """``{"list pods", "get pods", "watch pods", "exec"}``: accept and do not answer until this is cleared."""
    slow_start_seconds: float = 0
    """Wait so long between the upgrade and the start of the process."""
    replace_before_gate: Callable[[], None] | None = None
    """Called after the upgrade, before the container is looked up and the process starts."""
    get_pod_override: Callable[[Json], Json] | None = None
    """The answer to a pod GET is a copy that passed through this."""
    garbage: bytes | None = None
    """Send this raw binary message before anything else."""
    text_frames: bool = False
    """Send output as text messages instead of binary ones (only for output that is UTF-8)."""
    split_frames: int | None = None
    """Send stdout and stderr in messages of at most so many bytes."""
    drop_after_bytes: int | None = None
    """Reset the exec connection, without a close frame, after so many bytes of output."""
    stall_after_bytes: int | None = None
    """Send nothing more after so many bytes of output, Status included; the connection stays, pings are answered."""
    drop_before_status: bool = False
    """Reset the connection instead of sending the Status."""
    close_without_status: bool = False
    """Close cleanly (1000) without a Status."""
    abrupt_close: bool = False
    """End the connection after the Status without a close frame, so that the client sees 1006."""
    status_override: bytes | None = None
    """Send these bytes on channel 3 instead of the true Status."""
    after_status: bytes | None = None
    """Send this raw binary message after the Status."""
    ignore_pings: bool = False
    """Do not answer websocket pings."""
    watch_gone: int = 0
    """Answer so many watches with a 410 ERROR event."""


@dataclass(frozen=True, slots=True)
class ExecRecord:
    """One process that was started by an exec. ``started_at`` is seconds since the epoch."""

    pod: str
    uid: str
    container: str
    command: tuple[str, ...]
    subprotocol: str
    pid: int
    started_at: float


@dataclass(slots=True)
class _Pod:
    """A pod, with the UID and container instances that its processes are marked with: the JSON may be made to lie."""

    object: Json
    uid: str
    instances: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Event:
    version: int
    type: str
    pod: Json
    before: Json | None


class _StatusError(Exception):
    """Becomes the HTTP answer: a Status object."""

    def __init__(self, code: int, reason: str, message: str, details: Json | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body: Json = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            **({} if details is None else {"details": details}),
            "code": code,
        }


class _PlainError(Exception):
    """Becomes the HTTP answer: plain text, as the kubelet says it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def workspace_manifest(
    name: str = "workspace",
    *,
    session: str,
    owner_uid: str | None = None,
    image: str = "localhost/workspace:dev",
    container: str = "workspace",
    labels: Mapping[str, str] | None = None,
) -> Json:
    """Return a pod manifest that satisfies the restricted Pod Security Standard and the session rules."""
    metadata: Json = {"name": name, "labels": {"session": session, "type": "workspace", **(labels or {})}}
    if owner_uid is not None:
        metadata["ownerReferences"] = [
            {"apiVersion": "v1", "kind": "Pod", "name": "runner", "uid": owner_uid, "controller": True}
        ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 2,
            "restartPolicy": "Always",
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": container,
                    "image": image,
                    "command": ["sleep", "infinity"],
                    "workingDir": "/workspace",
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }


class DevCluster:
    """An API server on loopback whose containers are local processes. See the module for what it promises.

    ``root`` is the scratch directory that every command starts in; it is created when missing and never removed.
    ``ssl_context`` makes it serve TLS; ``ca_pem`` is then put into the kubeconfig. Pods may be added before ``start``.
    ``stop`` kills and awaits everything that was started through it.
    """

    def __init__(
        self,
        *,
        root: Path,
        namespace: str = "default",
        token: str | None = None,
        subprotocols: Sequence[str] = (V5, V4),
        ssl_context: ssl.SSLContext | None = None,
        ca_pem: bytes | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        faults: Faults | None = None,
    ) -> None:
        if not _is_loopback(host):
            raise ValueError(f"{host!r} is not a loopback address: whoever reaches this server may run commands here")
        if token == "":
            raise ValueError("the token must not be empty")
        self.root = root
        self.namespace = namespace
        self.token = secrets.token_urlsafe(32) if token is None else token
        self.subprotocols = tuple(subprotocols)
        self.faults = Faults() if faults is None else faults
        self.bookmark_seconds = BOOKMARK_SECONDS
        self.execs: list[ExecRecord] = []
        """Every process that was started (the newest ``MAX_REMEMBERED_EXECS``)."""
        self.requests: deque[tuple[str, str]] = deque(maxlen=MAX_REMEMBERED_REQUESTS)
        """Verb and resource of the newest requests that passed authentication, as RBAC names them."""
        self._ssl_context = ssl_context
        self._ca_pem = ca_pem
        self._host = host
        self._port = port
        self._runner: web.ServerRunner | None = None
        self._server: web.Server | None = None
        self._pods: dict[str, _Pod] = {}
        self._version = FIRST_RESOURCE_VERSION
        self._history: deque[_Event] = deque(maxlen=MAX_HISTORY_EVENTS)
        self._forgotten = FIRST_RESOURCE_VERSION
        self._changed = asyncio.Event()
        self._exec_started = asyncio.Event()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures: list[BaseException] = []
        self._removals: dict[str, asyncio.Task[Any]] = {}
        self._watches: set[asyncio.Transport] = set()
        self._sessions: set[_ExecSession] = set()
        self._processes = _ProcessTable()
        self._kubelet = _Kubelet(root, self._pods, self._processes, lambda: self.faults, self._record_exec)

    # Life

    async def start(self) -> None:
        """Listen. With ``port=0`` the port is chosen once and kept over restarts."""
        await asyncio.to_thread(self.root.mkdir, parents=True, exist_ok=True)
        self._server = web.Server(
            self._serve,
            handler_cancellation=True,
            access_log=None,
            max_line_size=MAX_REQUEST_LINE_BYTES,
            max_field_size=MAX_REQUEST_LINE_BYTES,
        )
        self._runner = web.ServerRunner(self._server, handle_signals=False, shutdown_timeout=STOP_SECONDS)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, ssl_context=self._ssl_context, reuse_address=True)
        await site.start()
        self._port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Drop every connection, kill and await every process; raise what went wrong inside, if anything did."""
        await self._stop_listening()
        self._processes.kill()
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS)
            self._processes.kill()
        failures, self._failures = self._failures, []
        if failures:
            raise BaseExceptionGroup("the embedded API server failed", failures)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def restart_server(self, *, down_seconds: float = 0) -> None:
        """Drop every connection, stop listening, then listen on the same port again. Processes run on."""
        await self._stop_listening()
        await asyncio.sleep(down_seconds)
        await self.start()

    async def _stop_listening(self) -> None:
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        for connection in list(self._server.connections if self._server is not None else ()):
            _reset(connection.transport)
        # A handler whose connection was lost is unknown to the runner: await it here.
        for task in self._handlers:
            task.cancel()
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=STOP_SECONDS)
        await runner.cleanup()

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` as a task that ``stop`` awaits and whose failure ``stop`` raises."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._disown)
        return task

    def _disown(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)

    # Where it is

    @property
    def url(self) -> str:
        """The server's address; requests to it carry ``Authorization: Bearer``."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._ssl_context is None else 'https'}://{host}:{self._port}"

    @property
    def server(self) -> str:
        """The address for a kubeconfig. Over plain http it carries the token, since client-go then sends none."""
        return self.url if self._ssl_context is not None else f"{self.url}{PATH_PREFIX}{self.token}"

    def kubeconfig(self) -> Json:
        """Return a kubeconfig for this server. It holds the token."""
        cluster: Json = {"server": self.server}
        if self._ca_pem is not None:
            cluster["certificate-authority-data"] = base64.b64encode(self._ca_pem).decode()
        user = {} if self._ssl_context is None else {"token": self.token}
        context = {"cluster": "devcluster", "user": "devcluster", "namespace": self.namespace}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "devcluster", "cluster": cluster}],
            "users": [{"name": "devcluster", "user": user}],
            "contexts": [{"name": "devcluster", "context": context}],
            "current-context": "devcluster",
        }

    def write_kubeconfig(self, path: Path) -> Path:
        """Write the kubeconfig, readable by its owner only."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(self.kubeconfig(), file, indent=2)
        return path

    # Pods, as tests see them

    def add_pod(self, manifest: Mapping[str, Any], *, running: bool = True, phase: str | None = None) -> Json:
        """Add a pod: what the API server, the scheduler and the kubelet would fill in is filled in.

        ``running=False`` leaves its containers waiting (phase Pending); phase Succeeded or Failed leaves them ended.
        """
        pod: Json = json.loads(json.dumps(manifest))
        metadata = pod.setdefault("metadata", {})
        name = metadata["name"]
        if metadata.setdefault("namespace", self.namespace) != self.namespace:
            raise ValueError(f"pod {name!r}: this server has only the namespace {self.namespace!r}")
        if name in self._pods:
            raise ValueError(f"there is a pod {name!r} already")
        phase = ("Running" if running else "Pending") if phase is None else phase
        now = _timestamp()
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = now
        spec = pod.setdefault("spec", {})
        spec.setdefault("restartPolicy", "Always")
        spec.setdefault("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
        spec.setdefault("nodeName", "devcluster")
        for key, value in (("serviceAccountName", "default"), ("dnsPolicy", "ClusterFirst"), ("securityContext", {})):
            spec.setdefault(key, value)
        instances = {c["name"]: secrets.token_hex(32) for c in spec.get("containers", [])}
        pod["status"] = _pod_status(spec["containers"], instances, phase, now)
        ordered = {"kind": "Pod", "apiVersion": "v1", **{k: pod[k] for k in ("metadata", "spec", "status")}}
        self._pods[name] = _Pod(ordered, metadata["uid"], instances)
        self._record("ADDED", ordered, None)
        return copy.deepcopy(ordered)

    def pod(self, name: str) -> Json:
        """Return a copy of the pod as it is now."""
        return copy.deepcopy(self._pods[name].object)

    def patch_pod(self, name: str, change: Callable[[Json], None]) -> None:
        """Let ``change`` alter the pod's JSON: new resourceVersion, MODIFIED event. Processes are not touched."""
        before = self._pods[name].object
        after = copy.deepcopy(before)
        change(after)
        self._pods[name].object = after
        self._record("MODIFIED", after, before)

    def delete_pod(self, name: str, *, grace_seconds: float = 0) -> None:
        """Delete the pod: at once, or marked now and killed and gone after the grace (needs a running loop)."""
        if grace_seconds <= 0:
            self._remove(name)
            return
        self._mark(name, grace_seconds)
        if (earlier := self._removals.pop(name, None)) is not None:
            earlier.cancel()
        self._removals[name] = self._own(self._remove_later(name, self._uid(name), grace_seconds))

    def mark_deleting(self, name: str) -> None:
        """Give the pod a deletionTimestamp and leave it at that."""
        self._mark(name, DEFAULT_GRACE_SECONDS)

    def replace_pod(self, name: str) -> Json:
        """Delete the pod and add one of the same manifest and name: new UID, new containers, old processes killed."""
        manifest = copy.deepcopy(self._pods[name].object)
        phase = manifest.pop("status")["phase"]
        for key in ("uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"):
            manifest["metadata"].pop(key, None)
        self._remove(name)
        return self.add_pod(manifest, phase=phase)

    def restart_container(
        self, name: str, *, container: str = "workspace", reason: str = "Error", exit_code: int = 137
    ) -> None:
        """Kill the container's processes; it runs again with a new containerID and one more restart."""
        pod = self._pods[name]
        self._processes.kill(self._uid(name), pod.instances[container])
        pod.instances[container] = instance = secrets.token_hex(32)
        now = _timestamp()

        def change(after: Json) -> None:
            status = _container_status(after, container)
            status["lastState"] = _terminated(status, reason, exit_code, now)
            status["containerID"] = f"containerd://{instance}"
            status["restartCount"] += 1
            status.update(ready=True, started=True, state={"running": {"startedAt": now}})
            _set_ready(after, now)

        self.patch_pod(name, change)

    def crash_container(
        self, name: str, *, container: str = "workspace", reason: str = "Error", exit_code: int = 1
    ) -> None:
        """Kill the container's processes and leave it waiting in CrashLoopBackOff."""
        self._processes.kill(self._uid(name), self._pods[name].instances[container])
        now = _timestamp()

        def change(after: Json) -> None:
            status = _container_status(after, container)
            status["lastState"] = _terminated(status, reason, exit_code, now)
            message = f"back-off 10s restarting failed container={container} pod={name}_{self.namespace}"
            waiting = {"message": message, "reason": "CrashLoopBackOff"}
            status.update(ready=False, started=False, state={"waiting": waiting})
            _set_ready(after, now)

        self.patch_pod(name, change)

    def processes(self, name: str) -> list[int]:
        """Return the pids of the pod's processes that are alive (zombies are not)."""
        return sorted(self._processes.live(self._uid(name)))

    def drop_exec_connections(self) -> int:
        """Reset every open exec connection and return how many there were."""
        sessions = [session for session in self._sessions if not session.detached]
        for session in sessions:
            session.abort()
        return len(sessions)

    def drop_watch_connections(self) -> int:
        """Reset every open watch connection and return how many there were."""
        watches = list(self._watches)
        for transport in watches:
            _reset(transport)
        return len(watches)

    async def exec_started(self, count: int = 1) -> ExecRecord:
        """Wait until ``count`` processes were started in all and return the newest."""
        while len(self.execs) < count:
            await self._exec_started.wait()
        return self.execs[-1]

    def _uid(self, name: str) -> str:
        return self._pods[name].uid

    def _mark(self, name: str, grace_seconds: float) -> None:
        when = _timestamp(grace_seconds)

        def change(after: Json) -> None:
            after["metadata"]["deletionTimestamp"] = when
            after["metadata"]["deletionGracePeriodSeconds"] = int(grace_seconds)

        self.patch_pod(name, change)

    def _remove(self, name: str) -> None:
        if (removal := self._removals.pop(name, None)) is not None:
            removal.cancel()
        uid = self._uid(name)
        before = self._pods.pop(name).object
        self._processes.kill(uid)
        self._record("DELETED", copy.deepcopy(before), before)

    async def _remove_later(self, name: str, uid: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if name in self._pods and self._uid(name) == uid:
            self._removals.pop(name, None)
            self._remove(name)

    def _record(self, kind: str, pod: Json, before: Json | None) -> None:
        self._version += 1
        pod["metadata"]["resourceVersion"] = str(self._version)
        if len(self._history) == MAX_HISTORY_EVENTS:
            self._forgotten = self._history[0].version
        self._history.append(_Event(self._version, kind, pod, before))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _record_exec(self, record: ExecRecord) -> None:
        if len(self.execs) >= MAX_REMEMBERED_EXECS:
            del self.execs[0]
        self.execs.append(record)
        started, self._exec_started = self._exec_started, asyncio.Event()
        started.set()

    # Requests

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        task: asyncio.Task[Any] | None = asyncio.current_task()
        if task is not None:
            self._handlers.add(task)
        try:
            return await self._route(request, self._authenticate(request))
        except _StatusError as error:
            return _json(error.body, error.code)
        except _PlainError as error:
            return web.Response(text=str(error), status=error.code)
        finally:
            if task is not None:
                self._handlers.discard(task)

    def _authenticate(self, request: web.BaseRequest) -> str:
        """Return the path without the token, or raise 401."""
        path, presented = request.path, ""
        if path.startswith(PATH_PREFIX):
            presented, _, rest = path.removeprefix(PATH_PREFIX).partition("/")
            path = f"/{rest}"
        scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            presented = credential.strip()
        known = hmac.compare_digest(presented.encode(errors="replace"), self.token.encode())
        if not known or self._hit("unauthorized"):
            raise _StatusError(401, "Unauthorized", "Unauthorized")
        if self._hit("unavailable"):
            message = "the server is currently unable to handle the request"
            raise _StatusError(503, "ServiceUnavailable", message)
        return path

    def _hit(self, switch: str) -> bool:
        """Tell whether a counting fault hits this request, and count it down."""
        count = int(getattr(self.faults, switch))
        if count > 0:
            setattr(self.faults, switch, count - 1)
        return count != 0

    async def _permit(
        self, verbs: Sequence[str], resource: str, namespace: str | None, name: str | None = None
    ) -> None:
        """Remember the request, refuse it or leave it hanging, as the faults say."""
        self.requests.append((verbs[0], resource))
        for verb in verbs:
            if f"{verb} {resource}" in self.faults.forbidden:
                where = "at the cluster scope" if namespace is None else f'in the namespace "{namespace}"'
                what = "pods" if name is None else f'pods "{name}"'
                message = (
                    f'{what} is forbidden: User "{USER}" cannot {verb} resource "{resource}" in API group "" {where}'
                )
                raise _StatusError(403, "Forbidden", message, _details(name))
        key = "exec" if resource == "pods/exec" else f"{verbs[0]} {resource}"
        await _until(lambda: key not in self.faults.hang)

    async def _route(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        match (request.method, *(part for part in path.split("/") if part)):
            case ("GET", "api", "v1", "pods"):
                return await self._list_or_watch(request, None)
            case ("GET", "api", "v1", "namespaces", namespace, "pods"):
                return await self._list_or_watch(request, namespace)
            case ("GET", "api", "v1", "namespaces", namespace, "pods", name):
                await self._permit(["get"], "pods", namespace, name)
                pod = self._find(namespace, name).object
                if self.faults.get_pod_override is not None:
                    pod = self.faults.get_pod_override(copy.deepcopy(pod))
                return _json(_table([pod], self._version) if _wants_table(request) else pod)
            case ("DELETE", "api", "v1", "namespaces", namespace, "pods", name):
                await self._permit(["delete"], "pods", namespace, name)
                return await self._delete(request, namespace, name)
            case (("GET" | "POST") as method, "api", "v1", "namespaces", namespace, "pods", name, "exec"):
                if self.faults.forbidden_empty_body:
                    return web.Response(status=403, headers={"Connection": "close"})
                verbs = ["get", "create"] if method == "GET" else ["create"]
                await self._permit(verbs, "pods/exec", namespace, name)
                return await self._exec(request, self._find(namespace, name))
            case ("POST", "apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"):
                await self._permit(["create"], "selfsubjectaccessreviews", None)
                return _json(self._review(await request.read()), 201)
            case ("GET", ("livez" | "readyz" | "healthz"), *_):
                return web.Response(text="ok")
            case ("GET", *parts) if (document := _discovery(parts)) is not None:
                return _json(document)
            case (_, "api", "v1", "namespaces", _, "pods", *_):
                message = "the server does not allow this method on the requested resource"
                raise _StatusError(405, "MethodNotAllowed", message, {})
        raise _StatusError(404, "NotFound", "the server could not find the requested resource", {})

    def _find(self, namespace: str, name: str) -> _Pod:
        pod = self._pods.get(name) if namespace == self.namespace else None
        if pod is None:
            raise _StatusError(404, "NotFound", f'pods "{name}" not found', _details(name))
        return pod

    async def _delete(self, request: web.BaseRequest, namespace: str, name: str) -> web.Response:
        pod = self._find(namespace, name).object
        options: Json = {}
        with contextlib.suppress(ValueError):
            options = json.loads(await request.read() or b"{}")
        uid = (options.get("preconditions") or {}).get("uid")
        if uid not in (None, pod["metadata"]["uid"]):
            message = (
                f'Operation cannot be fulfilled on pods "{name}": Precondition failed: '
                f"UID in precondition: {uid}, UID in object meta: {pod['metadata']['uid']}"
            )
            raise _StatusError(409, "Conflict", message, _details(name))
        grace = request.query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
        if grace is None:
            grace = pod["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
        seconds = int(grace)
        if seconds > 0:
            self.delete_pod(name, grace_seconds=seconds)
            return _json(self._pods[name].object)
        self._mark(name, 0)
        pod = self._pods[name].object
        self._remove(name)
        return _json(pod)

    def _review(self, body: bytes) -> Json:
        try:
            review = _review_of_protobuf(body) if body.startswith(PROTOBUF_MAGIC) else json.loads(body)
        except ValueError as error:
            raise _StatusError(400, "BadRequest", f"the access review cannot be read: {error}") from error
        spec = review.get("spec", {})
        asked = spec.get("resourceAttributes", {})
        resource = "/".join(filter(None, (asked.get("resource"), asked.get("subresource"))))
        action = f"{asked.get('verb')} {resource}"
        allowed = action in ALLOWED and action not in self.faults.forbidden
        return {
            "kind": "SelfSubjectAccessReview",
            "apiVersion": "authorization.k8s.io/v1",
            "metadata": {"creationTimestamp": None},
            "spec": spec,
            "status": {"allowed": allowed},
        }

    # LIST and WATCH

    async def _list_or_watch(self, request: web.BaseRequest, namespace: str | None) -> web.StreamResponse:
        query = request.query
        matches = _selector(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        here = namespace in (None, self.namespace)

        def wanted(pod: Json | None) -> bool:
            return here and pod is not None and matches(pod)

        if _is_true(query.get("watch")):
            await self._permit(["watch"], "pods", namespace)
            return await self._watch(request, wanted)
        await self._permit(["list"], "pods", namespace)
        pods = [pod.object for pod in self._pods.values() if wanted(pod.object)]
        if _wants_table(request):
            return _json(_table(pods, self._version))
        items = [{key: value for key, value in pod.items() if key not in ("kind", "apiVersion")} for pod in pods]
        metadata = {"resourceVersion": str(self._version)}
        return _json({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items})

    async def _watch(self, request: web.BaseRequest, wanted: Callable[[Json | None], bool]) -> web.StreamResponse:
        query = request.query
        since = query.get("resourceVersion", "") or "0"
        if not since.isdigit():
            message = f'resourceVersion: Invalid value: "{since}": strconv.ParseUint: parsing "{since}": invalid syntax'
            raise _StatusError(500, "InternalError", message)
        until = time.monotonic() + float(query.get("timeoutSeconds") or WATCH_SECONDS)
        stream = _WatchStream(request)
        await stream.open()
        transport = request.transport
        if transport is not None:
            self._watches.add(transport)
        try:
            await self._follow(stream, wanted, int(since), until)
        finally:
            if transport is not None:
                self._watches.discard(transport)
        return await stream.close()

    async def _follow(
        self, stream: "_WatchStream", wanted: Callable[[Json | None], bool], since: int, until: float
    ) -> None:
        if self._hit("watch_gone"):
            await stream.gone(since, self._version)
            return
        if since == 0:
            since = self._version
            for pod in [pod.object for pod in self._pods.values()]:
                if wanted(pod):
                    await stream.event("ADDED", pod)
            if stream.initial_events:
                await stream.bookmark(since, initial=True)
        next_bookmark = time.monotonic() + self.bookmark_seconds
        while True:
            changed = self._changed
            if since < self._forgotten:
                await stream.gone(since, self._version)
                return
            for event in self._events_after(since):
                since = event.version
                if (kind := _kind_for(event, wanted)) is not None:
                    await stream.event(kind, event.pod)
            if changed is not self._changed:
                continue
            now = time.monotonic()
            if stream.bookmarks and now >= min(next_bookmark, until):
                await stream.bookmark(since)
                next_bookmark = now + self.bookmark_seconds
            if now >= until:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(until, next_bookmark) - now):
                    await changed.wait()

    def _events_after(self, version: int) -> list[_Event]:
        newest_first = takewhile(lambda event: event.version > version, reversed(self._history))
        return list(newest_first)[::-1]

    # exec

    async def _exec(self, request: web.BaseRequest, pod: _Pod) -> web.StreamResponse:
        query = request.query
        container = _container_of(pod.object, query.get("container"))
        upgrade = request.headers.get("Upgrade", "").lower()
        if not upgrade:
            raise _StatusError(400, "BadRequest", "Upgrade request required")
        if upgrade != "websocket":
            raise _PlainError(400, f"unable to upgrade: {upgrade} is not supported by this server, only websocket is")
        streams = frozenset(s for s in ("stdin", "stdout", "stderr") if _is_true(query.get(s)))
        if not streams:
            raise _PlainError(400, "you must specify at least 1 of stdin, stdout, stderr")
        if _is_true(query.get("tty")):
            raise _StatusError(400, "BadRequest", "this server has no terminals: tty=true is not supported")
        offered = {p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",")}
        chosen = next((p for p in self.subprotocols if p in offered), None)
        if chosen is None:
            return web.Response(status=403, headers={"Connection": "close"})
        name = pod.object["metadata"]["name"]
        if chosen != V5 and not _is_running(pod.object, container):
            raise _PlainError(500, f'container not found ("{container}")')
        ws = web.WebSocketResponse(
            protocols=(chosen,),
            compress=False,
            autoping=False,
            max_msg_size=MAX_STDIN_MESSAGE_BYTES,
            timeout=CLOSE_SECONDS,
        )
        await ws.prepare(request)
        transport = request.transport
        if transport is None:
            return ws
        asked = _ExecRequest(name, container, tuple(query.getall("command", [])), streams, chosen)
        session = _ExecSession(asked, ws, transport, self._kubelet)
        self._sessions.add(session)
        task = self._own(session.run())
        task.add_done_callback(lambda _: self._sessions.discard(session))
        try:
            await session.receive()
        finally:
            session.detach()
        return ws


@dataclass(frozen=True, slots=True)
class _ExecRequest:
    pod: str
    container: str
    command: tuple[str, ...]
    streams: frozenset[str]
    subprotocol: str


class _ExecSession:
    """One exec connection and its process. The process may outlive the connection."""

    def __init__(
        self, asked: _ExecRequest, ws: web.WebSocketResponse, transport: asyncio.Transport, kubelet: "_Kubelet"
    ) -> None:
        self.detached = False
        self._asked = asked
        self._ws = ws
        self._transport = transport
        self._kubelet = kubelet
        self._faults = kubelet.faults
        self._sent = 0
        self._ending = False
        self._started = asyncio.Event()
        self._stdin: int | None = None
        self._stdin_wait: asyncio.Future[None] | None = None
        self._outputs: dict[int, int] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._delivery: asyncio.Task[None] | None = None

    # The connection

    async def receive(self) -> None:
        """Feed standard input until the connection ends; what the process does not read stays in the connection."""
        with contextlib.suppress(ConnectionError):
            while True:
                message = await self._ws.receive()
                if message.type is WSMsgType.BINARY:
                    await self._received(message.data)
                elif message.type is WSMsgType.TEXT:
                    await self._received(message.data.encode())
                elif message.type is WSMsgType.PING:
                    if not self._faults().ignore_pings:
                        await self._ws.pong(message.data)
                elif message.type is not WSMsgType.PONG:
                    return

    async def _received(self, message: bytes) -> None:
        if not message or message[0] not in (STDIN, CLOSE):
            return
        await self._started.wait()
        if message[0] == STDIN:
            await self._write_stdin(memoryview(message)[1:])
        elif self._asked.subprotocol == V5 and message[1:] == bytes([STDIN]):
            self._close_stdin()

    async def _write_stdin(self, data: memoryview) -> None:
        while data and self._stdin is not None:
            try:
                data = data[os.write(self._stdin, data) :]
            except BlockingIOError:
                await self._stdin_writable(self._stdin)
            except BrokenPipeError:
                self._close_stdin()

    async def _stdin_writable(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        self._stdin_wait = wait = loop.create_future()
        loop.add_writer(fd, _resolve, wait)
        try:
            await wait
        finally:
            self._stdin_wait = None
            if self._stdin == fd:
                loop.remove_writer(fd)

    def _close_stdin(self) -> None:
        fd, self._stdin = self._stdin, None
        if fd is None:
            return
        if self._stdin_wait is not None:
            asyncio.get_running_loop().remove_writer(fd)
            _resolve(self._stdin_wait)
        os.close(fd)

    def detach(self) -> None:
        """Treat the connection as gone: standard input ends, output is no longer read, nothing is killed."""
        self.detached = True
        if self._started.is_set():
            self._close_stdin()
        if self._delivery is not None and not self._ending:
            self._delivery.cancel()

    def abort(self) -> None:
        """Reset the connection."""
        _reset(self._transport)

    # The process

    async def run(self) -> None:
        """Start the process, deliver what it prints and how it ended, and stay until nobody holds its pipes."""
        try:
            refusal = await self._start()
            if not self.detached:
                self._delivery = asyncio.create_task(self._deliver(refusal))
                await asyncio.wait({self._delivery})
                if not self._delivery.cancelled():
                    self._delivery.result()
            await self._outlive()
        except BaseException:
            self.abort()
            raise
        finally:
            await self._release()

    async def _start(self) -> Json | None:
        """Start the process, or return the Status that says why not."""
        faults = self._faults()
        try:
            with contextlib.suppress(ConnectionError):
                if faults.garbage is not None:
                    await self._ws.send_bytes(faults.garbage)
                streams = self._asked.streams
                lowest = STDOUT if "stdout" in streams else STDERR if "stderr" in streams else STATUS
                await self._ws.send_bytes(bytes([lowest]))
            if faults.replace_before_gate is not None:
                faults.replace_before_gate()
            if faults.slow_start_seconds > 0:
                await asyncio.sleep(faults.slow_start_seconds)
            return await self._spawn()
        finally:
            self._started.set()
            if self.detached:
                self._close_stdin()

    async def _spawn(self) -> Json | None:
        asked, kubelet = self._asked, self._kubelet
        pod = kubelet.pods.get(asked.pod)
        instance = None if pod is None else pod.instances.get(asked.container)
        if pod is None or instance is None or not _is_running(pod.object, asked.container):
            return _internal_error(f'unable to upgrade connection: container not found ("{asked.container}")')
        uid = pod.uid
        mark = kubelet.processes.mark(uid, instance)
        environment = {"PATH": CONTAINER_PATH, "HOME": str(kubelet.root), "HOSTNAME": asked.pod, MARKER: mark}
        try:
            path = _look_up(asked.command, kubelet.root)
            with contextlib.ExitStack() as theirs:
                stdin, stdout, stderr = (self._pipe(name, theirs) for name in ("stdin", "stdout", "stderr"))
                self._process = await asyncio.create_subprocess_exec(
                    *asked.command,
                    executable=path,
                    cwd=kubelet.root,
                    env=environment,
                    start_new_session=True,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                )
        except _StartError as error:
            return _runtime_error(str(error), asked.subprotocol)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            message = f"unable to start container process: exec {asked.command[0]}: {reason.lower()}"
            return _runtime_error(message, asked.subprotocol)
        pid = self._process.pid
        kubelet.processes.add(pid, mark)
        kubelet.started(ExecRecord(asked.pod, uid, asked.container, asked.command, asked.subprotocol, pid, time.time()))
        now = kubelet.pods.get(asked.pod)
        if now is None or now.instances.get(asked.container) != instance:
            kubelet.processes.kill(uid, instance)  # replaced while the process started
        return None

    def _pipe(self, name: str, theirs: contextlib.ExitStack) -> int:
        """Return the process's end of a stream, which ``theirs`` closes here. Our end never blocks."""
        if name not in self._asked.streams:
            return asyncio.subprocess.DEVNULL
        read, write = os.pipe()
        ours, end = (write, read) if name == "stdin" else (read, write)
        os.set_blocking(ours, False)
        theirs.callback(os.close, end)
        if name == "stdin":
            self._stdin = ours
        else:
            self._outputs[STDOUT if name == "stdout" else STDERR] = ours
        return end

    async def _outlive(self) -> None:
        """Wait for the process, then for whoever inherited its output: closing the pipes would kill them."""
        if self._process is None:
            return
        await self._process.wait()
        await _until(lambda: all(_hung_up(fd) for fd in self._outputs.values()))

    async def _release(self) -> None:
        if self._delivery is not None:
            self._delivery.cancel()
            await asyncio.wait({self._delivery})
        self._close_stdin()
        if self._process is not None:
            # Either it ended already, or the server stops and killed it.
            await self._process.wait()
            self._kubelet.processes.remove(self._process.pid)
        for fd in self._outputs.values():
            os.close(fd)
        self._outputs.clear()

    # What the client gets

    async def _deliver(self, refusal: Json | None) -> None:
        try:
            if refusal is None and self._process is not None:
                async with asyncio.TaskGroup() as pumps:
                    for channel, fd in self._outputs.items():
                        pumps.create_task(self._pump(channel, fd))
                code = await self._process.wait()
                await self._finish(_exit_status(code, self._asked))
            else:
                await self._finish(refusal or {})
        except* ConnectionError:
            pass

    async def _pump(self, channel: int, fd: int) -> None:
        """Copy output until end of file, reading no faster than the client does."""
        prefix, frames = bytes([channel]), 0
        while True:
            try:
                data = os.read(fd, OUTPUT_CHUNK_BYTES)
            except BlockingIOError:
                await _readable(fd)
                continue
            if not data:
                return
            if self._delivers_faithfully():
                await self._ws.send_bytes(prefix + data)
                self._sent += len(data)
            else:
                await self._send_faulty(prefix, data)
            frames += 1
            if frames % FRAMES_BETWEEN_YIELDS == 0:
                # A pipe that is never empty and a socket that is never full would leave no turn to anyone else.
                await asyncio.sleep(0)

    def _delivers_faithfully(self) -> bool:
        faults = self._faults()
        return (
            faults.drop_after_bytes is None
            and faults.stall_after_bytes is None
            and faults.split_frames is None
            and not faults.text_frames
        )

    async def _send_faulty(self, prefix: bytes, data: bytes) -> None:
        while data:
            await self._stall()
            faults = self._faults()
            room = len(data) if faults.split_frames is None else max(1, faults.split_frames)
            for limit in (faults.drop_after_bytes, faults.stall_after_bytes):
                if limit is not None:
                    room = min(room, max(0, limit - self._sent))
            if room:
                kind = WSMsgType.TEXT if faults.text_frames else WSMsgType.BINARY
                await self._ws.send_frame(prefix + data[:room], kind)
                self._sent += len(data[:room])
                data = data[room:]
            if faults.drop_after_bytes is not None and self._sent >= faults.drop_after_bytes:
                await self._flush()
                self.abort()
                raise ConnectionResetError

    async def _stall(self) -> None:
        """Wait while the stall switch says that enough was sent."""
        await _until(lambda: (limit := self._faults().stall_after_bytes) is None or self._sent < limit)

    async def _finish(self, status: Json) -> None:
        await self._stall()
        self._ending = True
        self._close_stdin()
        faults = self._faults()
        if faults.drop_before_status:
            await self._flush()
            self.abort()
            return
        if not faults.close_without_status:
            body = _encode(status) if faults.status_override is None else faults.status_override
            await self._ws.send_bytes(bytes([STATUS]) + body)
        if faults.after_status is not None:
            await self._ws.send_bytes(faults.after_status)
        if faults.abrupt_close:
            await self._flush()
            self._transport.close()
            return
        await self._ws.close()

    async def _flush(self) -> None:
        """Wait until what was sent is out of this process (a reset would throw it away)."""
        await _until(lambda: self._transport.is_closing() or not self._transport.get_write_buffer_size())


@dataclass(frozen=True, slots=True)
class _Kubelet:
    """What an exec needs of its server."""

    root: Path
    pods: Mapping[str, _Pod]
    processes: "_ProcessTable"
    faults: Callable[[], Faults]
    started: Callable[[ExecRecord], None]


class _StartError(Exception):
    """The container runtime cannot start the process; the message is runc's."""


# Processes


class _ProcessTable:
    """The processes that were started, each marked in its environment with server, pod UID and container instance."""

    def __init__(self) -> None:
        self._id = secrets.token_hex(8)
        self._children: dict[int, str] = {}

    def mark(self, *parts: str) -> str:
        """Return the mark of all (no parts), of a pod's UID, or of a UID and a container instance."""
        return "".join(f"{part}/" for part in (self._id, *parts))

    def add(self, pid: int, mark: str) -> None:
        """Remember a direct child, so that it is found whatever it does to its environment."""
        self._children[pid] = mark

    def remove(self, pid: int) -> None:
        """Forget a direct child that was reaped."""
        self._children.pop(pid, None)

    def live(self, *parts: str) -> set[int]:
        """Return the live processes so marked and all their descendants."""
        mark = self.mark(*parts)
        children = {pid for pid, child in self._children.items() if child.startswith(mark)}
        return _live_processes(f"{MARKER}={mark}".encode(), children) if sys.platform == "linux" else children

    def kill(self, *parts: str) -> None:
        """SIGKILL what is so marked until nothing is left, as a pid namespace ends. Elsewhere: its process groups."""
        if sys.platform != "linux":
            for pid in self.live(*parts):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            return
        for _ in range(KILL_ROUNDS):
            pids = self.live(*parts)
            if not pids:
                return
            _kill_and_wait(pids)


def _live_processes(mark: bytes, children: set[int]) -> set[int]:
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state in (b"Z", b"X"):
                continue
            parents[pid] = int(parent)
            if pid in children or b"\0" + mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                found.add(pid)
    grown = True
    while grown:
        descendants = {pid for pid, parent in parents.items() if parent in found} - found
        found |= descendants
        grown = bool(descendants)
    return found


def _kill_and_wait(pids: Iterable[int]) -> None:
    """Kill and wait a moment for each to be gone, which for SIGKILL is a matter of milliseconds.

    All are stopped first. A pid namespace ends in one step; here a parent could see its child die, and exit by itself
    with a code that looks like success, before its own turn comes.
    """
    with contextlib.ExitStack() as stack:
        dying = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                fd = os.pidfd_open(pid)
                stack.callback(os.close, fd)
                signal.pidfd_send_signal(fd, signal.SIGSTOP)
                dying.append(fd)
        for fd in dying:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        until = time.monotonic() + KILL_WAIT_SECONDS
        for fd in dying:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0.0, until - time.monotonic()) * 1000)


def _look_up(command: Sequence[str], root: Path) -> str:
    """Find the executable as runc does in a container, with its words when there is none."""
    if not command:
        raise _StartError("args must not be empty")
    name = command[0]
    fail = f'unable to start container process: exec: "{name}": '
    if "/" not in name:
        for directory in CONTAINER_PATH.split(":"):
            candidate = Path(directory, name)
            if name and candidate.is_file() and os.access(candidate, os.X_OK):
                return str(candidate)
        raise _StartError(fail + "executable file not found in $PATH")
    path = root / name
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _StartError(f"{fail}stat {name}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise _StartError(f"{fail}stat {name}: invalid argument") from error
    if stat.S_ISDIR(mode) or not os.access(path, os.X_OK):
        raise _StartError(fail + "permission denied")
    return str(path)


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces: a fault switch, a pipe's other end, a socket's queue."""
    while not condition():  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(POLL_SECONDS)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _hung_up(fd: int) -> bool:
    """Tell whether nobody holds the writing end any more, without reading what is left."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def _reset(transport: asyncio.BaseTransport | None) -> None:
    """End a connection with RST: nothing that is still queued is sent, no close frame, no FIN."""
    if not isinstance(transport, asyncio.WriteTransport):
        return
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() == -1:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


# Status objects of an exec


def _exit_status(code: int, asked: _ExecRequest) -> Json:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    code = 128 - code if code < 0 else code
    # v5 is answered by the API server, which has the words of its own client library for what the kubelet told it.
    detail = (
        f"command terminated with exit code {code}"
        if asked.subprotocol == V5
        else f"error executing command [{' '.join(asked.command)}], exit code {code}"
    )
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: {detail}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _internal_error(cause: str) -> Json:
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"Internal error occurred: {cause}",
        "reason": "InternalError",
        "details": {"causes": [{"message": cause}]},
        "code": 500,
    }


def _runtime_error(message: str, subprotocol: str) -> Json:
    cause = (
        "error executing command in container: failed to exec in container: "
        f'failed to start exec "{secrets.token_hex(32)}": OCI runtime exec failed: exec failed: {message}: unknown'
    )
    # On v5 the API server wraps the kubelet's Status once more.
    return _internal_error(f"Internal error occurred: {cause}" if subprotocol == V5 else cause)


# JSON


def _encode(value: Json) -> bytes:
    """Encode as Go does: compact, and without ``<``, ``>`` and ``&``."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode(errors="surrogateescape")


def _json(value: Json, status: int = 200) -> web.Response:
    headers = {"Cache-Control": "no-cache, private"}
    return web.Response(body=_encode(value) + b"\n", status=status, content_type="application/json", headers=headers)


def _details(name: str | None) -> Json:
    return {"kind": "pods"} if name is None else {"name": name, "kind": "pods"}


def _is_true(value: str | None) -> bool:
    return value is not None and value.lower() in ("1", "true", "t")


def _timestamp(ahead: float = 0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=ahead)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


# Pods


def _pod_status(containers: Iterable[Json], instances: Mapping[str, str], phase: str, now: str) -> Json:
    running = phase == "Running"
    statuses = []
    for container in containers:
        status: Json = {
            "name": container["name"],
            "state": {"waiting": {"reason": "ContainerCreating"}},
            "lastState": {},
            "ready": running,
            "restartCount": 0,
            "image": container.get("image", ""),
            "imageID": "",
            "started": running,
        }
        if phase != "Pending":
            status["containerID"] = f"containerd://{instances[container['name']]}"
            status["imageID"] = f"sha256:{hashlib.sha256(status['image'].encode()).hexdigest()}"
            status["state"] = {"running": {"startedAt": now}}
        if phase in ("Succeeded", "Failed"):
            code = 0 if phase == "Succeeded" else 1
            status["state"] = _terminated(status, "Completed" if code == 0 else "Error", code, now)
        statuses.append(status)
    true, ready = "True", str(running)
    return {
        "phase": phase,
        "conditions": [
            {"type": kind, "status": value, "lastProbeTime": None, "lastTransitionTime": now}
            for kind, value in (
                ("Initialized", true),
                ("Ready", ready),
                ("ContainersReady", ready),
                ("PodScheduled", true),
            )
        ],
        "hostIP": "127.0.0.1",
        **({} if phase == "Pending" else {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}),
        "startTime": now,
        "containerStatuses": statuses,
        "qosClass": "BestEffort",
    }


def _container_status(pod: Json, container: str) -> Json:
    for status in pod["status"]["containerStatuses"]:
        if status["name"] == container:
            found: Json = status
            return found
    raise KeyError(container)


def _terminated(status: Json, reason: str, exit_code: int, now: str) -> Json:
    started = status["state"].get("running", {}).get("startedAt", now)
    return {
        "terminated": {
            "exitCode": exit_code,
            "reason": reason,
            "startedAt": started,
            "finishedAt": now,
            "containerID": status["containerID"],
        }
    }


def _set_ready(pod: Json, now: str) -> None:
    ready = str(all(status["ready"] for status in pod["status"]["containerStatuses"]))
    for condition in pod["status"]["conditions"]:
        if condition["type"] in ("Ready", "ContainersReady") and condition["status"] != ready:
            condition.update(status=ready, lastTransitionTime=now)


def _is_running(pod: Json, container: str) -> bool:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return any(status["name"] == container and "running" in status.get("state", {}) for status in statuses)


def _container_of(pod: Json, asked: str | None) -> str:
    name, spec = pod["metadata"]["name"], pod["spec"]
    regular = [str(c["name"]) for c in spec["containers"]]
    if asked:
        others = [c["name"] for key in ("initContainers", "ephemeralContainers") for c in spec.get(key) or []]
        if asked not in (*regular, *others):
            raise _StatusError(400, "BadRequest", f"container {asked} is not valid for pod {name}")
        return asked
    if len(regular) != 1:
        choice = " ".join(regular)
        message = f"a container name must be specified for pod {name}, choose one of: [{choice}]"
        raise _StatusError(400, "BadRequest", message)
    return regular[0]


# Selectors

_KEY: Final = r"[A-Za-z0-9][-A-Za-z0-9_./]*"
_SET: Final = re.compile(rf"({_KEY})\s+(in|notin)\s+\(([^()]*)\)")
_EQUAL: Final = re.compile(rf"({_KEY})\s*(==|=|!=)\s*([-A-Za-z0-9_.]*)")
_EXISTS: Final = re.compile(rf"(!?)\s*({_KEY})")


def _selector(labels: str, fields: str) -> Callable[[Json], bool]:
    """Parse a label selector and a field selector, or raise 400."""
    # A comma within parentheses belongs to a set.
    by_label = [_label_requirement(part.strip()) for part in re.split(r",(?![^(]*\))", labels) if labels]
    by_field = [_field_requirement(part) for part in fields.split(",") if fields]

    def matches(pod: Json) -> bool:
        own = pod["metadata"].get("labels") or {}
        return all(meets(own) for meets in by_label) and all(meets(pod) for meets in by_field)

    return matches


def _label_requirement(text: str) -> Callable[[Mapping[str, str]], bool]:
    if match := _SET.fullmatch(text):
        key, operator, listed = match.groups()
        values = {value.strip() for value in listed.split(",")}
        if operator == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if match := _EQUAL.fullmatch(text):
        key, operator, value = match.groups()
        if operator == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := _EXISTS.fullmatch(text):
        absent, key = match.groups()
        return lambda labels: (key in labels) != bool(absent)
    raise _StatusError(400, "BadRequest", f"unable to parse requirement: {text!r}")


def _field_requirement(text: str) -> Callable[[Json], bool]:
    match = re.fullmatch(r"([A-Za-z.]+)(==|=|!=)(.*)", text)
    if match is None:
        raise _StatusError(400, "BadRequest", f"invalid selector: {text!r}; can't understand {text!r}")
    label, operator, value = match.groups()
    if label not in ("metadata.name", "metadata.namespace", "spec.nodeName", "status.phase"):
        raise _StatusError(400, "BadRequest", f"field label not supported: {label}")
    part, key = label.split(".")
    return lambda pod: (pod[part].get(key, "") == value) != (operator == "!=")


# WATCH


def _kind_for(event: _Event, wanted: Callable[[Json | None], bool]) -> str | None:
    """Return what the event is to a watcher who sees only some pods, None when it is nothing."""
    if event.type == "DELETED":
        return "DELETED" if wanted(event.before) else None
    before, after = wanted(event.before), wanted(event.pod)
    if after:
        return "MODIFIED" if before else "ADDED"
    return "DELETED" if before else None


class _WatchStream:
    """The chunked answer to a watch: one JSON event a line."""

    def __init__(self, request: web.BaseRequest) -> None:
        self.bookmarks = _is_true(request.query.get("allowWatchBookmarks"))
        self.initial_events = _is_true(request.query.get("sendInitialEvents"))
        self._table = _wants_table(request)
        self._columns_sent = False
        self._request = request
        headers = {"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        self._response = web.StreamResponse(headers=headers)

    async def open(self) -> None:
        await self._response.prepare(self._request)

    async def close(self) -> web.StreamResponse:
        with contextlib.suppress(ConnectionError):
            await self._response.write_eof()
        return self._response

    async def event(self, kind: str, pod: Json) -> None:
        if self._table:
            pod = _table([pod], int(pod["metadata"]["resourceVersion"]), columns=not self._columns_sent)
            self._columns_sent = True
        await self._send(kind, pod)

    async def bookmark(self, version: int, *, initial: bool = False) -> None:
        metadata: Json = {"resourceVersion": str(version), "creationTimestamp": None}
        if initial:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        pod = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": {"containers": None}, "status": {}}
        await self._send("BOOKMARK", pod)

    async def gone(self, since: int, now: int) -> None:
        await self._send("ERROR", _StatusError(410, "Expired", f"too old resource version: {since} ({now})").body)

    async def _send(self, kind: str, value: Json) -> None:
        await self._response.write(_encode({"type": kind, "object": value}) + b"\n")


# What kubectl asks for besides pods

_COLUMNS: Final = (("Name", "string", "name"), ("Ready", "string", ""), ("Status", "string", ""))
_MORE_COLUMNS: Final = (("Restarts", "string", ""), ("Age", "string", ""))


def _wants_table(request: web.BaseRequest) -> bool:
    return "as=Table" in request.headers.get("Accept", "")


def _table(pods: Iterable[Json], version: int, *, columns: bool = True) -> Json:
    definitions = [
        {"name": name, "type": kind, "format": form, "description": name, "priority": 0}
        for name, kind, form in (*_COLUMNS, *_MORE_COLUMNS)
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": str(version)},
        "columnDefinitions": definitions if columns else None,
        "rows": [{"cells": _cells(pod), "object": _partial(pod)} for pod in pods],
    }


def _partial(pod: Json) -> Json:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": pod["metadata"]}


def _cells(pod: Json) -> list[str]:
    metadata, status = pod["metadata"], pod.get("status", {})
    statuses = status.get("containerStatuses", [])
    shown = status.get("phase", "Unknown")
    for container in statuses:
        for state in ("waiting", "terminated"):
            shown = container.get("state", {}).get(state, {}).get("reason", shown)
    if "deletionTimestamp" in metadata:
        shown = "Terminating"
    ready = sum(1 for container in statuses if container["ready"])
    restarts = sum(container["restartCount"] for container in statuses)
    created = datetime.strptime(metadata["creationTimestamp"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    age = int((datetime.now(UTC) - created).total_seconds())
    name = metadata["name"]
    return [name, f"{ready}/{len(pod['spec']['containers'])}", shown, str(restarts), f"{max(0, age)}s"]


def _discovery(parts: Sequence[str]) -> Json | None:
    match parts:
        case ["version"]:
            major, minor = SERVER_VERSION.removeprefix("v").split(".")[:2]
            platform = {"goVersion": "", "compiler": "", "platform": f"{sys.platform}/{os.uname().machine}"}
            git = {"gitVersion": SERVER_VERSION, "gitCommit": "", "gitTreeState": "clean", "buildDate": _timestamp()}
            return {"major": major, "minor": minor, **git, **platform}
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        case ["apis"]:
            version = {"groupVersion": "authorization.k8s.io/v1", "version": "v1"}
            group = {"name": "authorization.k8s.io", "versions": [version], "preferredVersion": version}
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}
        case ["api", "v1"]:
            pods = _resource("pods", "Pod", ["delete", "get", "list", "watch"], namespaced=True)
            pods |= {"shortNames": ["po"], "categories": ["all"]}
            execs = _resource("pods/exec", "PodExecOptions", ["create", "get"], namespaced=True)
            return {"kind": "APIResourceList", "groupVersion": "v1", "resources": [pods, execs]}
        case ["apis", "authorization.k8s.io", "v1"]:
            review = _resource("selfsubjectaccessreviews", "SelfSubjectAccessReview", ["create"], namespaced=False)
            version = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "authorization.k8s.io/v1"}
            return {**version, "resources": [review]}
    return None


def _resource(name: str, kind: str, verbs: Sequence[str], *, namespaced: bool) -> Json:
    return {"name": name, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": list(verbs)}


PROTOBUF_MAGIC: Final = b"k8s\0"
_VARINT, _BYTES = 0, 2


def _review_of_protobuf(body: bytes) -> Json:
    """Read the access review that kubectl sends: runtime.Unknown, field 2 is the object; its field 2 is the spec."""
    spec = _fields(_fields(_fields(body.removeprefix(PROTOBUF_MAGIC)).get(2, b"")).get(2, b""))
    names = {1: "namespace", 2: "verb", 3: "group", 4: "version", 5: "resource", 6: "subresource", 7: "name"}
    attributes = {
        names[number]: value.decode()
        for number, value in _fields(spec.get(1, b"")).items()
        if number in names and value
    }
    return {"spec": {"resourceAttributes": attributes} if attributes else {}}


def _fields(message: bytes) -> dict[int, bytes]:
    """Return the length-delimited fields of a protobuf message."""
    fields: dict[int, bytes] = {}
    rest = iter(message)
    for tag in rest:
        if tag & 7 == _VARINT:
            _varint(rest)
        elif tag & 7 == _BYTES:
            fields[tag >> 3] = bytes(islice(rest, _varint(rest)))
        else:
            break
    return fields


def _varint(data: Iterator[int]) -> int:
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            break
    return value
