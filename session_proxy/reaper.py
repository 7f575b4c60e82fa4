"""Killing for real: TERM, grace, KILL of whatever still carries an exec's id, and a last look that finds nothing.

The first TERM and, should this module be unable to reach the container, the KILL are the wrapper's own doing: it saw
the end of its standard input. What this adds is every descendant that left the process group, and the proof.
"""

import asyncio
import secrets
import time

from session_proxy import remotecommand, wrapper
from session_proxy.errors import RemoteCommandProtocolError, SessionProxyError
from session_proxy.stream import Cluster, ExecStream
from session_proxy.workspace import Target, Workspace

VERIFY_SECONDS = 4.0
"""For opening the second exec and for the proof, on top of the grace period."""

POLL_SECONDS = 0.05
"""From the first look to the second; each wait is half as long again as the last, since a look costs the container."""

MAX_POLL_SECONDS = 0.4
"""The longest wait between two looks."""

CLEAN_LOOKS = 2
"""Looks in a row that must find nothing: one that runs beside a fork could miss the child."""

UNREADABLE_LOOKS = 4
"""Looks that may find nothing but processes that cannot be read; one that is just ending is such a one, too."""

MAX_LINE_BYTES = 4_096
"""Longest answer of the program in the container."""


class Reaper:
    """Kills what is left of one exec and verifies it."""

    def __init__(
        self, cluster: Cluster, workspace: Workspace, target: Target, exec_id: str, ready: wrapper.Ready
    ) -> None:
        self._cluster = cluster
        self._workspace = workspace
        self._target = target
        self._exec_id = exec_id
        self._ready = ready
        self.failure: str | None = None
        """Why it could not be verified."""
        self._nonce = secrets.token_hex(8)
        self._buffer = b""

    async def reap(self, grace_seconds: float) -> bool:
        """Return True when it was verified that no process of the exec is left, False when one may be.

        The grace period counts from this call. Takes at most ``grace_seconds`` + VERIFY_SECONDS.
        """
        grace_ends = time.monotonic() + grace_seconds
        try:
            async with asyncio.timeout(grace_seconds + VERIFY_SECONDS):
                argv = wrapper.reaper_argv(self._exec_id, self._nonce, self._ready)
                async with self._cluster.open_exec(self._target, argv, stdin=True) as stream:
                    await self._line(stream)  # its greeting: until it gets a line it does nothing
                    # The name may be another pod's by now, and nothing is killed there.
                    await self._workspace.confirm_identity(self._target)
                    return await self._kill(stream, grace_ends)
        except TimeoutError:
            self.failure = "processes were left when the time was over"
        except SessionProxyError as error:
            self.failure = f"{type(error).__name__}: {error}"
        return False

    async def _kill(self, stream: ExecStream, grace_ends: float) -> bool:
        census = await self._scan(stream, "TERM")
        wait = POLL_SECONDS
        while census.command and (left := grace_ends - time.monotonic()) > 0:
            await asyncio.sleep(min(wait, left))
            wait = min(wait * 1.5, MAX_POLL_SECONDS)
            census = await self._scan(stream, "LOOK")
        clean = unread = 0
        signal = "KILL"
        while clean < CLEAN_LOOKS:
            census = await self._scan(stream, signal)
            signal = "END"
            clean = clean + 1 if census.nothing_left else 0
            if census.command or census.wrapper:
                await asyncio.sleep(POLL_SECONDS)
            elif census.unreadable:
                unread += 1
                if unread >= UNREADABLE_LOOKS:
                    self.failure = f"{census.unreadable} processes cannot be read"
                    return False
                await asyncio.sleep(POLL_SECONDS)
        return True

    async def _scan(self, stream: ExecStream, signal: str) -> wrapper.Census:
        for message in remotecommand.stdin_messages(f"{signal}\n".encode()):
            await stream.send(message)
        census = await self._line(stream)
        if census is None:
            raise RemoteCommandProtocolError("the reaper greeted twice")
        return census

    async def _line(self, stream: ExecStream) -> wrapper.Census | None:
        mark = self._nonce.encode()
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                if line.startswith(mark):
                    return wrapper.parse_census(self._nonce, line)
                continue  # a noisy shell start-up file
            if len(self._buffer) > MAX_LINE_BYTES:
                raise RemoteCommandProtocolError("the reaper's answer has no end")
            message = await stream.receive()
            event = remotecommand.decode(message) if message is not None else None
            if message is None or isinstance(event, remotecommand.Status):
                raise RemoteCommandProtocolError("the reaper ended early")
            if isinstance(event, remotecommand.Output) and event.channel is remotecommand.Channel.STDOUT:
                self._buffer += event.data
