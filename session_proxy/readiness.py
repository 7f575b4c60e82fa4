"""Whether the daemon could run a command now: the workspace is acceptable, and RBAC allows what is needed."""

import asyncio
import time
from typing import Protocol

from session_proxy.errors import RefusedError
from session_proxy.workspace import Workspace

NEEDED = (("get", ""), ("watch", ""), ("get", "exec"), ("create", "exec"))
"""Verbs on pods and pods/exec. The exec websocket is ``get``; from Kubernetes 1.35 it needs ``create``, too."""

NEEDED_BY_SELECTOR = (*NEEDED[:1], ("list", ""), *NEEDED[1:])
"""The same for a workspace that is found by labels; a name needs no list."""

CACHE_SECONDS = 2.0
"""How long an answer is given again, so that probes cost the API server little."""


class AccessReviewer(Protocol):
    """Asks whether RBAC allows something."""

    async def can_i(self, verb: str, subresource: str = "") -> bool:
        """Return whether ``verb`` on pods, or on a subresource of them, is allowed. Raises KubeError."""


class Readiness:
    """Answers ``/readyz``; one look at a time, kept for CACHE_SECONDS."""

    def __init__(self, workspace: Workspace, access: AccessReviewer, *, by_selector: bool) -> None:
        self._needed = NEEDED_BY_SELECTOR if by_selector else NEEDED
        self._workspace = workspace
        self._access = access
        self._lock = asyncio.Lock()
        self._known: list[dict[str, str]] = []
        self._known_at = float("-inf")

    async def problems(self) -> list[dict[str, str]]:
        """Return what stands in the way, each with ``reason`` and ``detail``; empty when ready."""
        async with self._lock:
            if time.monotonic() - self._known_at > CACHE_SECONDS:
                self._known = await self._look()
                self._known_at = time.monotonic()
            return self._known

    async def _look(self) -> list[dict[str, str]]:
        found = []
        try:
            await self._workspace.locate()
        except RefusedError as error:
            found.append({"reason": error.reason, "detail": error.detail})
        answers = await asyncio.gather(*(self._allowed(*need) for need in self._needed))
        missing = [
            f"{verb} pods{'/' * bool(sub)}{sub}"
            for (verb, sub), answer in zip(self._needed, answers, strict=True)
            if answer is False
        ]
        if missing:
            found.append({"reason": "kube_forbidden", "detail": f"RBAC does not allow {', '.join(missing)}"})
        for answer in answers:
            if isinstance(answer, RefusedError):
                found.append({"reason": answer.reason, "detail": answer.detail})
                break
        return found

    async def _allowed(self, verb: str, subresource: str) -> bool | RefusedError:
        try:
            return await self._access.can_i(verb, subresource)
        except RefusedError as error:
            return error
