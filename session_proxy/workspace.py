"""The workspace pod of this session: find it, check it, recognise it again, and notice when it goes away."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from session_proxy import ownership, policy
from session_proxy.errors import (
    KubeError,
    KubeForbiddenError,
    KubeNotFoundError,
    WorkspaceAmbiguousError,
    WorkspaceNotFoundError,
    WorkspaceNotOwnedError,
    WorkspaceNotRunningError,
    WorkspacePolicyViolationError,
)

Pod = Mapping[str, Any]
"""A pod as decoded from the API server's JSON, never a generated model: those may drop fields newer than they are."""

RETRY_SECONDS = 2.0
"""``Retry-After`` of the refusals that pass by themselves (a pod that is starting)."""

WATCH_BACKOFF_SECONDS = (0.1, 0.5, 1.0, 2.0)
"""Waits between attempts to watch; the last repeats for as long as execs run."""

WATCH_LINGER_SECONDS = 30.0
"""How long a watch is kept after the last exec."""

WATCH_DENIED_SECONDS = 30.0
"""The wait before trying again when RBAC denies the watch."""


class PodReader(Protocol):
    """What is asked of the API server about pods. Errors are KubeError and its kinds."""

    async def find_pods(self) -> Sequence[Pod]:
        """Return the pods that the selector matches, or the one pod named, as they are now (no resourceVersion)."""

    async def read_pod(self, name: str) -> Pod:
        """Return one pod as it is now. Raises KubeNotFoundError."""

    def watch_pod(self, name: str) -> AsyncGenerator[Pod | None, None]:
        """Yield the pod as it is now and at each change, None when it is gone, until the connection ends."""


@dataclass(frozen=True, slots=True)
class WorkspaceSettings:
    """Which pod is the workspace and what it must be."""

    described: str
    container: str
    owner_mode: ownership.OwnerMode
    policy: policy.PolicySettings
    owner_uid: str | None = None
    own_pod_name: str | None = None
    own_pod_uid: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One running container of one pod. Two are the same only when every identifier is."""

    pod: str
    pod_uid: str
    container: str
    container_id: str
    started_at: str
    image: str = field(compare=False, default="")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _container_status(pod: Pod, container: str) -> Mapping[str, Any]:
    statuses = _list(_mapping(pod.get("status")).get("containerStatuses"))
    return next((item for item in map(_mapping, statuses) if item.get("name") == container), {})


def _is_deleting(pod: Pod) -> bool:
    return bool(_mapping(pod.get("metadata")).get("deletionTimestamp"))


def _name(pod: Pod) -> str:
    return str(_mapping(pod.get("metadata")).get("name"))


def running_target(pod: Pod, container: str, *, deleting: bool = False) -> Target:
    """Return the identity of the running container. Raises WorkspaceNotRunningError saying what it does instead.

    ``deleting``: it may also be one that runs out its grace period.
    """
    if _is_deleting(pod) and not deleting:
        raise WorkspaceNotRunningError(f"pod {_name(pod)} is being deleted", retry_after=RETRY_SECONDS)
    status = _container_status(pod, container)
    state = _mapping(status.get("state"))
    started_at = _mapping(state.get("running")).get("startedAt")
    container_id = status.get("containerID")
    uid = _mapping(pod.get("metadata")).get("uid")
    if not (isinstance(started_at, str) and isinstance(container_id, str) and container_id and isinstance(uid, str)):
        doing = "has not been started"
        for kind in ("waiting", "terminated"):
            if kind in state:
                doing = f"is {kind} ({_mapping(state[kind]).get('reason', 'no reason given')})"
        phase = _mapping(pod.get("status")).get("phase", "unknown")
        raise WorkspaceNotRunningError(
            f"container {container} of pod {_name(pod)} {doing}; the pod's phase is {phase}", retry_after=RETRY_SECONDS
        )
    return Target(_name(pod), uid, container, container_id, started_at, str(status.get("image", "")))


def lost_reason(target: Target, pod: Pod | None) -> str | None:
    """Say why a command in ``target`` is lost, given the pod as it is now; None when it is not, as far as is known."""
    if pod is None or _mapping(pod.get("metadata")).get("uid") != target.pod_uid or _is_deleting(pod):
        return "pod_deleted"
    status = _container_status(pod, target.container)
    if not status.get("containerID"):
        return None  # nothing is said about it
    if status["containerID"] == target.container_id and "running" in _mapping(status.get("state")):
        return None
    for state in (status.get("state"), status.get("lastState")):
        terminated = _mapping(_mapping(state).get("terminated"))
        if terminated.get("reason") == "OOMKilled" and terminated.get("containerID") == target.container_id:
            return "oom_killed"
    return "container_restarted"


class Workspace:
    """Finds the workspace pod, checks it, and watches it while something runs there."""

    def __init__(self, pods: PodReader, settings: WorkspaceSettings) -> None:
        self._pods = pods
        self._settings = settings
        self._watch = _PodWatch(pods)

    async def locate(self) -> Target:
        """Return the one running container a command may run in.

        Raises the Workspace... refusals, and KubeError when the API server cannot be asked.
        """
        pod = await self._find()
        await self._check(pod)
        return running_target(pod, self._settings.container)

    async def confirm(self, target: Target) -> None:
        """Read the pod again: raises a refusal unless it is still the same container and still acceptable."""
        pod = await self._same(target)
        await self._check(pod)

    async def confirm_identity(self, target: Target) -> None:
        """Read the pod again: raises a refusal unless it is still the same container, be it in its grace period."""
        await self._same(target, deleting=True)

    def lost(self, target: Target) -> "Loss":
        """Return a context whose ``reason`` future is set when a command in ``target`` can no longer be running."""
        return Loss(self._watch, target)

    async def describe(self) -> dict[str, Any]:
        """Return the body of ``GET /workspace``: every verdict, also when some are bad."""
        pod = await self._find()
        metadata = _mapping(pod.get("metadata"))
        not_owned = await self._not_owned(pod)
        violations = policy.evaluate(pod, self._settings.policy)
        not_running = None
        target = None
        try:
            target = running_target(pod, self._settings.container)
        except WorkspaceNotRunningError as error:
            not_running = error.detail
        status = _container_status(pod, self._settings.container)
        return {
            "pod": metadata.get("name"),
            "podUid": metadata.get("uid"),
            "namespace": metadata.get("namespace"),
            "node": _mapping(pod.get("spec")).get("nodeName"),
            "phase": _mapping(pod.get("status")).get("phase"),
            "container": self._settings.container,
            "containerId": status.get("containerID"),
            "image": status.get("image"),
            "imageId": status.get("imageID"),
            "restartCount": status.get("restartCount"),
            "startedAt": target.started_at if target else None,
            "running": {"ok": not_running is None, "detail": not_running},
            "owner": {"ok": not_owned is None, "mode": self._settings.owner_mode, "detail": not_owned},
            "policy": {
                "ok": not violations,
                "level": self._settings.policy.level,
                "violations": [violation.to_json() for violation in violations],
            },
            "acceptable": not_running is None and not_owned is None and not violations,
        }

    async def close(self) -> None:
        """Stop watching."""
        await self._watch.close()

    async def _find(self) -> Pod:
        found = await self._pods.find_pods()
        live = [pod for pod in found if not _is_deleting(pod)]
        if len(live) > 1:
            names = ", ".join(sorted(_name(pod) for pod in live)[:5])
            raise WorkspaceAmbiguousError(
                f"{len(live)} pods match {self._settings.described}: {names}; there must be one",
                retry_after=RETRY_SECONDS,
            )
        if live:
            return live[0]
        if found:
            raise WorkspaceNotRunningError(f"pod {_name(found[0])} is being deleted", retry_after=RETRY_SECONDS)
        raise WorkspaceNotFoundError(f"no pod matches {self._settings.described}", retry_after=RETRY_SECONDS)

    async def _same(self, target: Target, *, deleting: bool = False) -> Pod:
        try:
            pod = await self._pods.read_pod(target.pod)
        except KubeNotFoundError:
            raise WorkspaceNotFoundError(
                f"pod {target.pod} was deleted while the command was being started; nothing ran",
                retry_after=RETRY_SECONDS,
            ) from None
        if _mapping(pod.get("metadata")).get("uid") != target.pod_uid:
            raise WorkspaceNotRunningError(
                f"pod {target.pod} was replaced while the command was being started; nothing ran",
                retry_after=RETRY_SECONDS,
            )
        if running_target(pod, target.container, deleting=deleting) != target:
            raise WorkspaceNotRunningError(
                f"container {target.container} restarted while the command was being started; nothing ran",
                retry_after=RETRY_SECONDS,
            )
        return pod

    async def _check(self, pod: Pod) -> None:
        not_owned = await self._not_owned(pod)
        if not_owned is not None:
            raise WorkspaceNotOwnedError(f"pod {_name(pod)} is not this session's: {not_owned}")
        violations = policy.evaluate(pod, self._settings.policy)
        if violations:
            raise WorkspacePolicyViolationError(
                f"pod {_name(pod)} violates the policy ({self._settings.policy.level}): "
                + "; ".join(violation.message for violation in violations[:3])
                + (f"; and {len(violations) - 3} more" if len(violations) > 3 else ""),  # noqa: PLR2004
                violations=violations,
            )

    async def _not_owned(self, pod: Pod) -> str | None:
        settings = self._settings
        own_pod = None
        if settings.owner_mode is ownership.OwnerMode.SIBLING:
            try:
                own_pod = await self._pods.read_pod(settings.own_pod_name or "")
            except KubeNotFoundError:
                return f"this session's own pod {settings.own_pod_name} (POD_NAME) does not exist"
        return ownership.check_ownership(
            pod,
            mode=settings.owner_mode,
            owner_uid=settings.owner_uid,
            own_pod=own_pod,
            own_pod_uid=settings.own_pod_uid,
        )


class Loss:
    """Subscription of one exec to the pod watch; ``reason`` is set once, when the target is lost."""

    def __init__(self, watch: "_PodWatch", target: Target) -> None:
        self._watch = watch
        self.target = target
        self.reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Self:
        self._watch.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.remove(self)
        self.reason.cancel()

    def see(self, pod: Pod | None) -> None:
        """Compare the pod as it is now with the target."""
        reason = lost_reason(self.target, pod)
        if reason is not None and not self.reason.done():
            self.reason.set_result(reason)


class _PodWatch:
    """One watch for each pod that execs run in (one, but for replacements).

    It outlives the last exec by WATCH_LINGER_SECONDS, so that a row of short commands costs one watch, not one each.
    """

    def __init__(self, pods: PodReader) -> None:
        self._pods = pods
        self._losses: dict[str, set[Loss]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lingering: dict[str, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def add(self, loss: Loss) -> None:
        name = loss.target.pod
        self._losses.setdefault(name, set()).add(loss)
        if name in self._lingering:
            self._lingering.pop(name).cancel()
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._run(name), name=f"watch pod {name}")

    def remove(self, loss: Loss) -> None:
        name = loss.target.pod
        self._losses[name].discard(loss)
        if not self._losses[name]:
            loop = asyncio.get_running_loop()
            self._lingering[name] = loop.call_later(WATCH_LINGER_SECONDS, self._stop, name)

    async def close(self) -> None:
        for timer in self._lingering.values():
            timer.cancel()
        for name in tuple(self._tasks):
            self._stop(name)
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _stop(self, name: str) -> None:
        self._lingering.pop(name, None)
        self._losses.pop(name, None)
        task = self._tasks.pop(name)
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _run(self, name: str) -> None:
        failures = 0
        while True:
            try:
                async with contextlib.aclosing(self._pods.watch_pod(name)) as pods:
                    async for pod in pods:
                        failures = 0
                        await self._see(name, pod)
            except KubeForbiddenError:
                await asyncio.sleep(WATCH_DENIED_SECONDS)
            except KubeError:
                failures += 1
            await asyncio.sleep(WATCH_BACKOFF_SECONDS[min(failures, len(WATCH_BACKOFF_SECONDS) - 1)])

    async def _see(self, name: str, pod: Pod | None) -> None:
        """Tell those whose target is lost.

        A watch may lag behind what they were started on, so it only raises the suspicion; a fresh read decides.
        """
        suspicious = [loss for loss in self._losses.get(name, ()) if lost_reason(loss.target, pod) is not None]
        if not suspicious:
            return
        try:
            now: Pod | None = await self._pods.read_pod(name)
        except KubeNotFoundError:
            now = None
        for loss in suspicious:
            loss.see(now)
