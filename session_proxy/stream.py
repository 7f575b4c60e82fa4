"""What an exec needs of a cluster: an open pods/exec websocket. ``kube`` satisfies it."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from session_proxy.workspace import Target


class ExecStream(Protocol):
    """An open pods/exec websocket."""

    subprotocol: str

    async def receive(self) -> bytes | None:
        """Return the next message, None at the end (whatever the close code: only channel 3 tells how it ended)."""

    async def send(self, message: bytes) -> None:
        """Send one message, waiting while the connection is congested. Raises KubeError when it is gone."""

    async def ping(self) -> None:
        """Send a websocket ping. Raises KubeError when the connection is gone."""

    def heard_seconds_ago(self) -> float:
        """Return the seconds since anything, a pong included, was received."""


class Cluster(Protocol):
    """Opens pods/exec websockets."""

    def open_exec(
        self, target: Target, argv: Sequence[str], *, stdin: bool, half_close: bool = False
    ) -> AbstractAsyncContextManager[ExecStream]:
        """Open a stream; leaving the context drops the connection in bounded time.

        ``half_close`` demands v5. Raises KubeError, and ExecStartError when the container cannot be exec'd into.
        """
