"""One exec as everybody else sees it: its reader, ``/execs``, the audit log, the metrics."""

import asyncio
import secrets
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from session_proxy.errors import RefusedError
from session_proxy.limits import OutputBuffer
from session_proxy.wire import ExecRequest, Exit, Start
from session_proxy.workspace import Target

SHOWN_PROGRAM_CHARACTERS = 200
"""How much of argv[0] is shown."""


class Outcome(StrEnum):
    """How an exec can end; the README says what each means."""

    EXITED = "exited"
    FAILED = "failed"
    TIMEOUT = "timeout"
    IDLE_TIMEOUT = "idle_timeout"
    OUTPUT_LIMIT = "output_limit"
    CANCELLED = "cancelled"
    LOST = "lost"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an exec ended. ``exit_code`` is None unless the outcome is ``exited``."""

    outcome: Outcome
    exit_code: int | None = None
    reason: str | None = None
    error: str | None = None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Execution:
    """One exec. ``ready`` resolves to its start event, or raises the refusal; ``output`` is what it prints."""

    def __init__(self, request: ExecRequest, request_id: str) -> None:
        loop = asyncio.get_running_loop()
        self.request = request
        self.request_id = request_id
        self.id = secrets.token_hex(8)
        self.created = _now()
        self.output = OutputBuffer()
        self.ready: asyncio.Future[Start] = loop.create_future()
        self.stopped: asyncio.Future[Verdict] = loop.create_future()
        """Set when somebody ended the exec: the first to do so decides."""
        self.judging = False
        """Whether the command ended by itself and only the verdict is missing: nobody can end it any more."""
        self.target: Target | None = None
        self.verdict: Verdict | None = None
        self.reaped: bool | None = None
        self.reap_failure: str | None = None
        self.stdout_bytes = 0
        self.stderr_bytes = 0
        self.stages: dict[str, float] = {}
        """Seconds each stage took: locate, upgrade, gate, first_byte, run, reap, end."""
        self._program = request.command[0][:SHOWN_PROGRAM_CHARACTERS]
        self._argument_count = len(request.command) - 1
        self._created_at = time.monotonic()
        self._stage_from = self._created_at
        self._started_at: float | None = None
        self._ended_at: float | None = None

    def end(self, outcome: Outcome, *, reason: str | None = None, error: str | None = None) -> bool:
        """Ask for the exec to end this way. Returns whether this call decided it."""
        if self.stopped.done() or self.judging or self.verdict is not None:
            return False
        self.stopped.set_result(Verdict(outcome, None, reason, error))
        return True

    @property
    def started(self) -> bool:
        """Whether the gate was opened."""
        return self._started_at is not None

    @property
    def duration_seconds(self) -> float:
        """Since the gate was opened (since the request, when it never was)."""
        return (self._ended_at or time.monotonic()) - (self._started_at or self._created_at)

    def stage(self, name: str) -> None:
        """Note that a stage is over."""
        now = time.monotonic()
        self.stages[name] = now - self._stage_from
        self._stage_from = now

    def let_go(self) -> None:
        """Open the gate: from here on the command may be running."""
        self._started_at = self._stage_from = time.monotonic()
        self._announce()

    def refuse(self, error: RefusedError) -> None:
        """Nothing ran, and the reader learns why."""
        self._ended_at = time.monotonic()
        self.ready.set_exception(error)
        self.ready.exception()  # the reader may have left; then nobody else looks
        self.output.close()

    def finish(self, verdict: Verdict) -> None:
        """Set the one verdict."""
        if self.verdict is not None:
            raise RuntimeError("a second verdict")
        self.verdict = verdict
        self._ended_at = time.monotonic()
        self._announce()
        self.output.close()

    def forget(self) -> None:
        """Let go of what the request held: ``/execs`` shows none of it, and a hundred of them would be gigabytes."""
        self.request = replace(self.request, command=(self._program,), env={}, stdin=None)

    def _announce(self) -> None:
        if not self.ready.done():
            target = self.target
            self.ready.set_result(
                Start(
                    id=self.id,
                    pod=target.pod if target else "",
                    pod_uid=target.pod_uid if target else "",
                    container=target.container if target else "",
                    time=_now(),
                )
            )

    def exit_event(self) -> Exit:
        """Return the terminal event; only once the verdict is set."""
        if self.verdict is None:
            raise RuntimeError("no verdict yet")
        return Exit(
            outcome=self.verdict.outcome,
            exit_code=self.verdict.exit_code,
            error=self.verdict.error,
            reason=self.verdict.reason,
            duration_ms=round(self.duration_seconds * 1000),
            stdout_bytes=self.stdout_bytes,
            stderr_bytes=self.stderr_bytes,
            reaped=self.reaped,
        )

    @property
    def state(self) -> str:
        """``starting``, ``running``, ``ending`` or ``ended``."""
        if self.verdict is not None:
            return "ended"
        if self.stopped.done() or self.judging:
            return "ending"
        return "running" if self.started else "starting"

    def describe(self) -> dict[str, Any]:
        """Return the exec as ``GET /execs/{id}`` shows it: argv[0] and the argument count, never the command."""
        verdict, target = self.verdict, self.target
        return {
            "id": self.id,
            "requestId": self.request_id,
            "state": self.state,
            "program": self._program,
            "argumentCount": self._argument_count,
            "pod": target.pod if target else None,
            "podUid": target.pod_uid if target else None,
            "container": target.container if target else None,
            "created": self.created,
            "durationMs": round(self.duration_seconds * 1000),
            "stdoutBytes": self.stdout_bytes,
            "stderrBytes": self.stderr_bytes,
            "outcome": verdict.outcome if verdict else None,
            "exitCode": verdict.exit_code if verdict else None,
            "reason": verdict.reason if verdict else None,
            "error": verdict.error if verdict else None,
            "reaped": self.reaped,
        }
