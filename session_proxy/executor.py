"""One exec from admission to exit: locate, check, upgrade, gate, stream, end, reap.

Whatever happens on the way there is exactly one verdict, and nothing runs twice: once the upgrade may have reached the
API server, nothing is tried again.
"""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from session_proxy import remotecommand, wrapper
from session_proxy.errors import (
    ExecStartError,
    KubeError,
    KubeTimeoutError,
    KubeUnavailableError,
    NotFoundError,
    RefusedError,
    RemoteCommandProtocolError,
    SessionProxyError,
    ShuttingDownError,
)
from session_proxy.execution import Execution, Outcome, Verdict
from session_proxy.limits import RateLimit, Slots
from session_proxy.reaper import VERIFY_SECONDS, Reaper
from session_proxy.remotecommand import Channel
from session_proxy.stream import Cluster, ExecStream
from session_proxy.wire import STDERR, STDOUT, ExecRequest
from session_proxy.workspace import Loss, Target, Workspace

HISTORY = 100
"""Ended execs that ``GET /execs`` still knows."""

GATE_SECONDS = 20.0
"""From the upgrade to the open gate; 0.1 s where nothing is loaded."""

KILLED_BY_SIGKILL = 137
"""128+9: what a command gets, too, when its whole container dies."""

CONTAINER_DEATH_SECONDS = 2.5
"""How long the kubelet may take to report a dead container (it relists every second) before an exit code of 137 counts
as the command's own."""

LOSS_REASON_SECONDS = 2.5
"""How long to wait for the pod's status to say why a stream broke."""

STREAM_END_SECONDS = 1.0
"""How long a killed command's stream may take to deliver its last output."""

HANG_UP_SECONDS = 1.0
"""How long telling the wrapper to stop may take on a congested connection."""

QUIET_STDIN_BYTES = 32_768
"""With more standard input than this the API server may be blocked writing it, and then it answers no ping."""


class Observer(Protocol):
    """Is told what happens: the metrics and the audit log."""

    def exec_started(self, execution: Execution) -> None:
        """Take note that the gate is open."""

    def exec_ended(self, execution: Execution) -> None:
        """Take note of the verdict."""

    def exec_refused(self, execution: Execution, error: RefusedError) -> None:
        """Take note that nothing ran."""


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Bounds of the executor; seconds."""

    max_concurrent: int = 10
    rate_per_second: float = 20
    burst: int = 40
    heartbeat_seconds: float = 15
    kill_grace_seconds: float = 2
    wrapped: bool = True


class Executor:
    """Runs execs, each in a task of its own, and owns those tasks until they are over."""

    def __init__(self, cluster: Cluster, workspace: Workspace, settings: ExecutorSettings, observer: Observer) -> None:
        self.cluster = cluster
        self.workspace = workspace
        self.settings = settings
        self._observer = observer
        self._rate = RateLimit(settings.rate_per_second, settings.burst)
        self._slots = Slots(settings.max_concurrent)
        self._running: dict[str, Execution] = {}
        self._ended: deque[Execution] = deque(maxlen=HISTORY)
        self._tasks: set[asyncio.Task[None]] = set()
        self._kill_by: float | None = None

    @property
    def running(self) -> int:
        """Execs that hold a slot."""
        return self._slots.taken

    @property
    def draining(self) -> bool:
        """Whether the sidecar is stopping."""
        return self._kill_by is not None

    async def submit(self, request: ExecRequest, request_id: str) -> Execution:
        """Admit a request and start its task; ``execution.ready`` tells when it runs, or why not.

        Raises ShuttingDownError, RateLimitedError, TooManyExecsError.
        """
        await self._rate.admit()
        if self.draining:
            raise ShuttingDownError("the sidecar is stopping", retry_after=self.settings.kill_grace_seconds + 1)
        self._slots.take()
        execution = Execution(request, request_id)
        self._running[execution.id] = execution
        task = asyncio.create_task(self._run(execution), name=f"exec {execution.id}")
        self._tasks.add(task)
        # A callback, not the task's own finally: a task cancelled before its first step runs neither.
        task.add_done_callback(lambda done: self._release(done, execution))
        return execution

    def _release(self, task: asyncio.Task[None], execution: Execution) -> None:
        self._tasks.discard(task)
        self._running.pop(execution.id, None)
        self._slots.release()

    def list(self) -> list[Execution]:
        """Return the running execs, then the recently ended, newest first."""
        return [*reversed(self._running.values()), *reversed(self._ended)]

    def get(self, exec_id: str) -> Execution:
        """Return an exec by its id. Raises NotFoundError."""
        for execution in self.list():
            if execution.id == exec_id:
                return execution
        raise NotFoundError(f"no exec {exec_id[:40]!r} is running or among the last {HISTORY} that ended")

    def grace_seconds(self) -> float:
        """Return the grace period of a kill that begins now; shorter when the sidecar has to be gone soon."""
        if self._kill_by is None:
            return self.settings.kill_grace_seconds
        left = self._kill_by - time.monotonic() - VERIFY_SECONDS / 2
        return max(0.0, min(self.settings.kill_grace_seconds, left))

    async def shutdown(self, within_seconds: float) -> None:
        """End all execs with ``shutdown``, reap them, and await their tasks, all within the time given."""
        self._kill_by = time.monotonic() + within_seconds
        for execution in tuple(self._running.values()):
            execution.end(Outcome.SHUTDOWN, error="the sidecar is stopping")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_seconds)
        # Whoever is left has lost its time: dropping the connection makes the wrapper kill the command.
        leftover = tuple(self._tasks)
        for task in leftover:
            task.cancel()
        await asyncio.gather(*leftover, return_exceptions=True)

    async def _run(self, execution: Execution) -> None:
        try:
            await _Run(self, execution, self._observer, self._finish).carry_out()
        except RefusedError as error:
            execution.refuse(error)
            self._observer.exec_refused(execution, error)
        except asyncio.CancelledError:
            self._give_up(execution, Verdict(Outcome.SHUTDOWN, error="the sidecar stopped before the command ended"))
            raise
        except Exception as error:  # a defect of ours must still give the client its one verdict
            name = type(error).__name__
            self._give_up(execution, Verdict(Outcome.LOST, reason="internal_error", error=f"internal error: {name}"))
            raise

    def _give_up(self, execution: Execution, verdict: Verdict) -> None:
        """Set the verdict of an exec that ended out of turn, unless it only had its stream left to close."""
        if execution.verdict is None:
            execution.reaped = False if execution.started else None
            self._finish(execution, verdict)

    def _finish(self, execution: Execution, verdict: Verdict) -> None:
        execution.stage("end")
        execution.finish(verdict)
        self._running.pop(execution.id, None)
        self._ended.append(execution)
        self._observer.exec_ended(execution)
        execution.forget()


class _MaybeRunningError(SessionProxyError):
    """A bare command was asked for, and whether it runs was not answered."""


class _Run:
    """The way of one exec, from its admission to its verdict."""

    def __init__(
        self,
        executor: Executor,
        execution: Execution,
        observer: Observer,
        finish: Callable[[Execution, Verdict], None],
    ) -> None:
        self._executor = executor
        self._finish = finish
        self._execution = execution
        self._observer = observer
        self._nonce = secrets.token_hex(8)
        self._handshake: wrapper.Handshake | None = None
        self._ready: wrapper.Ready | None = None
        self._payload = b""
        self._payload_bytes = 0
        self._asked_bare = False
        """WRAPPER=none has no gate: the upgrade itself starts the command, answered or not."""
        self._command_seen = False
        """Whether the command certainly started: the wrapper said so, or something was printed."""
        self._muted = False
        self._congested = False
        self._last_output = 0.0

    async def carry_out(self) -> None:
        """Go the whole way; the verdict is told before the stream is closed. Raises RefusedError when nothing ran."""
        async with contextlib.AsyncExitStack() as stack:
            self._finish(self._execution, await self._verdict(stack))

    async def _verdict(self, stack: contextlib.AsyncExitStack) -> Verdict:
        execution = self._execution
        opening = asyncio.create_task(self._open(stack))
        first: set[asyncio.Future[Any]] = {opening, execution.stopped}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done() or execution.stopped.done():
                # Not let through the gate: nothing runs, and nothing is left to reap.
                execution.reaped = not self._asked_bare
                return execution.stopped.result()
            target, stream, loss = opening.result()
        except ExecStartError as error:
            return Verdict(Outcome.FAILED, reason=error.reason, error=error.message)
        except _MaybeRunningError as error:
            execution.reaped = False
            return Verdict(Outcome.LOST, reason="connection_lost", error=str(error))
        finally:
            await _cancel(opening)
        return await self._carry_on(target, stream, loss)

    # --- until the gate -------------------------------------------------------------------------------------------

    async def _open(self, stack: contextlib.AsyncExitStack) -> tuple[Target, ExecStream, Loss]:
        """Locate, check, upgrade, gate. Raises RefusedError or ExecStartError: nothing of the command has run."""
        executor, execution, request = self._executor, self._execution, self._execution.request
        target = execution.target = await executor.workspace.locate()
        execution.stage("locate")
        loss = stack.enter_context(executor.workspace.lost(target))
        if not executor.settings.wrapped:
            has_stdin = request.stdin is not None
            self._asked_bare = True
            try:
                stream = await stack.enter_async_context(
                    executor.cluster.open_exec(target, request.command, stdin=has_stdin, half_close=has_stdin)
                )
            except (KubeTimeoutError, KubeUnavailableError) as error:
                raise _MaybeRunningError(f"{error.detail}; the command may have been started") from error
            self._payload = request.stdin or b""
        else:
            argv = wrapper.wrapper_argv(execution.id, self._nonce, executor.settings.kill_grace_seconds)
            stream = await stack.enter_async_context(executor.cluster.open_exec(target, argv, stdin=True))
            execution.stage("upgrade")
            await self._gate(stream, target)
            self._payload = wrapper.go_payload(
                self._nonce, request.command, cwd=request.cwd, env=request.env, stdin=request.stdin
            )
        self._payload_bytes = len(self._payload)
        execution.stage("gate" if executor.settings.wrapped else "upgrade")
        return target, stream, loss

    async def _gate(self, stream: ExecStream, target: Target) -> None:
        handshake = self._handshake = wrapper.Handshake(self._nonce)
        try:
            async with asyncio.timeout(GATE_SECONDS):
                while True:
                    message = await stream.receive()
                    event = remotecommand.decode(message) if message is not None else None
                    if message is None:
                        raise ExecStartError("start_failed", "the connection ended before the container was ready")
                    if isinstance(event, remotecommand.Status):
                        raise _start_error(event, wrapped=True)
                    if isinstance(event, remotecommand.Output) and event.channel is Channel.STDOUT:
                        said = handshake.feed(event.data)
                        if isinstance(said, wrapper.Ready):
                            self._ready = said
                            break
                await self._executor.workspace.confirm(target)
        except TimeoutError:
            raise KubeTimeoutError(
                f"the container gave no sign of life within {GATE_SECONDS:g} s of the upgrade; nothing ran"
            ) from None
        except RemoteCommandProtocolError as error:
            raise ExecStartError("start_failed", f"{error}; nothing ran") from None

    # --- from the gate on -----------------------------------------------------------------------------------------

    async def _carry_on(self, target: Target, stream: ExecStream, loss: Loss) -> Verdict:
        execution, request = self._execution, self._execution.request
        loop = asyncio.get_running_loop()
        execution.let_go()
        self._observer.exec_started(execution)
        self._last_output = time.monotonic()
        sending = asyncio.create_task(self._send(stream))
        pumping = asyncio.create_task(self._pump(stream))
        beating = asyncio.create_task(self._heartbeat(stream))
        timers = [
            loop.call_later(
                request.timeout_seconds,
                lambda: execution.end(
                    Outcome.TIMEOUT, error=f"the command ran longer than {request.timeout_seconds:g} s"
                ),
            )
        ]
        tasks = [sending, pumping, beating]
        if request.idle_timeout_seconds is not None:
            tasks.append(asyncio.create_task(self._idle(request.idle_timeout_seconds)))
        try:
            first: set[asyncio.Future[Any]] = {pumping, beating, execution.stopped, loss.reason}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            execution.stage("run")
            # Whoever ended it decides, also when the Status came right behind: what was cut off, or answered with 202,
            # has not ended by itself.
            if execution.stopped.done():
                execution.reaped = await self._reap(target, stream, sending)
                await asyncio.wait({pumping}, timeout=STREAM_END_SECONDS)
                return execution.stopped.result()
            if pumping.done():
                timers[0].cancel()
                return await self._ended(target, stream, loss, pumping)
            if beating.done():
                return await self._lost(target, stream, loss, "the API server no longer answers on this connection")
            return await self._lost(target, stream, loss, None)
        except ExecStartError as error:
            return Verdict(Outcome.FAILED, reason=error.reason, error=error.message)
        finally:
            timers[0].cancel()
            await _cancel(*tasks)

    async def _ended(
        self, target: Target, stream: ExecStream, loss: Loss, pumping: "asyncio.Task[remotecommand.Status | None]"
    ) -> Verdict:
        """Judge a stream that ended by itself."""
        self._execution.judging = True
        try:
            status = pumping.result()
        except RemoteCommandProtocolError as error:
            return await self._lost(target, stream, loss, f"the API server sent {error}")
        except KubeError as error:
            return await self._lost(target, stream, loss, error.detail)
        if status is None:
            return await self._lost(target, stream, loss, "the stream ended without a Status")
        if status.exit_code is None:
            if not self._command_seen:
                raise _start_error(status, wrapped=self._executor.settings.wrapped)
            return await self._lost(target, stream, loss, status.message)
        if not self._command_seen and self._executor.settings.wrapped:
            raise ExecStartError("start_failed", f"the wrapper ended with code {status.exit_code} before the command")
        if status.exit_code == KILLED_BY_SIGKILL and await _within(loss.reason, CONTAINER_DEATH_SECONDS):
            return await self._lost(target, stream, loss, None)
        return Verdict(Outcome.EXITED, exit_code=status.exit_code)

    async def _lost(self, target: Target, stream: ExecStream, loss: Loss, error: str | None) -> Verdict:
        """Find out why, as far as it can be known soon, and kill what may be left."""
        self._execution.judging = True
        reaping = asyncio.create_task(self._reap(target, stream, None))
        try:
            known = await _within(loss.reason, LOSS_REASON_SECONDS)
            reason = loss.reason.result() if known else "connection_lost"
            if reason in ("container_restarted", "oom_killed"):
                # The kubelet reports the old container as gone, and with it every process it had.
                self._execution.reaped = True
            else:
                self._execution.reaped = await reaping
        finally:
            await _cancel(reaping)
        return Verdict(Outcome.LOST, reason=reason, error=error or _LOSS_SENTENCES[reason])

    async def _reap(self, target: Target, stream: ExecStream, sending: "asyncio.Task[None] | None") -> bool:
        """Hang up, then kill what is left. Returns whether nothing is left for certain."""
        if self._ready is None:
            return False  # WRAPPER=none: nothing there listens, and nothing carries an id
        if sending is not None:
            await _cancel(sending)
        reaper = Reaper(self._executor.cluster, self._executor.workspace, target, self._execution.id, self._ready)
        hanging_up = asyncio.create_task(_hang_up(stream))
        try:
            return await reaper.reap(self._executor.grace_seconds())
        finally:
            await _cancel(hanging_up)
            self._execution.reap_failure = reaper.failure
            self._execution.stage("reap")

    # --- the parts that run beside each other ---------------------------------------------------------------------

    async def _send(self, stream: ExecStream) -> None:
        """Open the gate and send what the command gets. A connection that breaks is noticed by the pump."""
        with contextlib.suppress(KubeError):
            messages = remotecommand.stdin_messages(self._payload)
            self._payload = b""
            while messages:
                await stream.send(messages.pop(0))
            if not self._executor.settings.wrapped and self._execution.request.stdin is not None:
                await stream.send(remotecommand.CLOSE_STDIN)

    async def _pump(self, stream: ExecStream) -> remotecommand.Status | None:
        """Move output to the buffer until the Status, or None when the stream ended without one."""
        output = self._execution.output
        while (message := await stream.receive()) is not None:
            event = remotecommand.decode(message)
            if event is None:
                continue
            if isinstance(event, remotecommand.Status):
                return event
            if not self._take(event.channel, event.data):
                self._congested = True
                await output.room()
                self._congested = False
                self._last_output = time.monotonic()
        return None

    def _take(self, channel: Channel, data: bytes) -> bool:
        """Take output; False when the reader has to catch up first."""
        execution = self._execution
        if not self._command_seen and self._executor.settings.wrapped and channel is Channel.STDOUT:
            data = self._first(data)
        else:
            self._command_seen = self._command_seen or not self._executor.settings.wrapped
        if self._muted or not data:
            return True
        self._last_output = time.monotonic()
        if "first_byte" not in execution.stages:
            execution.stage("first_byte")
        limit = execution.request.max_output_bytes
        if limit is not None:
            left = limit - execution.stdout_bytes - execution.stderr_bytes
            if len(data) > left:
                data = data[:left]
                self._muted = True
                execution.end(Outcome.OUTPUT_LIMIT, error=f"the command printed more than {limit} bytes")
                if not data:
                    return True
        if channel is Channel.STDOUT:
            execution.stdout_bytes += len(data)
            return execution.output.put(STDOUT, data)
        execution.stderr_bytes += len(data)
        return execution.output.put(STDERR, data)

    def _first(self, data: bytes) -> bytes:
        """Strip the wrapper's word that the command was started. Raises ExecStartError when it was not."""
        if self._handshake is None:
            raise RuntimeError("no handshake")
        said = self._handshake.feed(data)
        if not isinstance(said, wrapper.Started):
            return b""
        self._command_seen = True
        return said.output

    async def _heartbeat(self, stream: ExecStream) -> None:
        """Ping the API server; return when it no longer answers."""
        interval = self._executor.settings.heartbeat_seconds
        with contextlib.suppress(KubeError):
            while True:
                await asyncio.sleep(interval)
                # Nothing is read while the reader is slow, so then an unread pong means nothing.
                deaf = not self._congested and self._payload_bytes <= QUIET_STDIN_BYTES
                if deaf and stream.heard_seconds_ago() > 2 * interval:
                    return
                await stream.ping()

    async def _idle(self, seconds: float) -> None:
        """End the exec when it prints nothing for so long. Waiting for a slow reader is not silence."""
        while (left := self._last_output + seconds - time.monotonic()) > 0 or self._congested:  # noqa: ASYNC110 (a deadline that moves with every byte)
            await asyncio.sleep(max(left, seconds / 10))
        self._execution.end(Outcome.IDLE_TIMEOUT, error=f"the command printed nothing for {seconds:g} s")


_LOSS_SENTENCES = {
    "pod_deleted": "the workspace pod was deleted or replaced while the command ran",
    "container_restarted": "the workspace container ended while the command ran",
    "oom_killed": "the workspace container ran out of memory while the command ran",
    "connection_lost": "the connection was lost while the command ran",
}


def _start_error(status: remotecommand.Status, *, wrapped: bool) -> SessionProxyError:
    if status.exit_code is not None:
        return ExecStartError(
            "start_failed", f"the container's sh ended with code {status.exit_code} before the command"
        )
    reason = remotecommand.start_failure(status.message)
    if wrapped and reason == "command_not_found":
        # What was not found is the wrapper's sh; nothing is known of the command.
        return ExecStartError("start_failed", f"the container has no sh (WRAPPER=none needs none): {status.message}")
    return ExecStartError(reason, status.message)


async def _hang_up(stream: ExecStream) -> None:
    with contextlib.suppress(KubeError, TimeoutError):
        async with asyncio.timeout(HANG_UP_SECONDS):
            for message in remotecommand.stdin_messages(wrapper.HANG_UP):
                await stream.send(message)
            if stream.subprotocol == remotecommand.V5:
                await stream.send(remotecommand.CLOSE_STDIN)


async def _within(future: "asyncio.Future[Any]", seconds: float) -> bool:
    """Wait for a future without cancelling it; whether it is done."""
    await asyncio.wait({future}, timeout=seconds)
    return future.done()


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks and wait for their end; what they raised was looked at, or no longer matters."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
