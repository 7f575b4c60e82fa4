"""Structured logs: one JSON object a line on standard error, and the audit record of each exec."""

import logging
import sys
from typing import Any

import structlog

from session_proxy.errors import RefusedError
from session_proxy.execution import SHOWN_PROGRAM_CHARACTERS, Execution


def configure(level: str, log_format: str) -> None:
    """Set up structlog for the process."""
    renderer: Any = (
        structlog.processors.JSONRenderer() if log_format == "json" else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def get() -> Any:
    """Return the process's logger."""
    return structlog.get_logger()


class AuditLog:
    """One record for each exec. Commands stay out of it unless ``log_commands``; output and environment always do."""

    def __init__(self, logger: Any, *, log_commands: bool) -> None:
        self._logger = logger
        self._log_commands = log_commands

    def exec_started(self, execution: Execution) -> None:
        """Note a start at debug level; the record comes at the end."""
        self._logger.debug("exec_started", id=execution.id, request_id=execution.request_id)

    def exec_refused(self, execution: Execution, error: RefusedError) -> None:
        """Write the record of an exec of which nothing ran."""
        self._logger.warning(
            "exec_refused", **self._identity(execution), reason=error.reason, detail=error.detail, **_stages(execution)
        )

    def exec_ended(self, execution: Execution) -> None:
        """Write the record of an exec."""
        verdict = execution.verdict
        if verdict is None:
            return
        target = execution.target
        self._logger.info(
            "exec",
            **self._identity(execution),
            pod=target.pod if target else None,
            pod_uid=target.pod_uid if target else None,
            container=target.container if target else None,
            outcome=verdict.outcome,
            exit_code=verdict.exit_code,
            reason=verdict.reason,
            reaped=execution.reaped,
            reap_failure=execution.reap_failure,
            stdout_bytes=execution.stdout_bytes,
            stderr_bytes=execution.stderr_bytes,
            duration_ms=round(execution.duration_seconds * 1000),
            **_stages(execution),
        )

    def _identity(self, execution: Execution) -> dict[str, Any]:
        command = execution.request.command
        identity: dict[str, Any] = {
            "id": execution.id,
            "request_id": execution.request_id,
            "program": command[0][:SHOWN_PROGRAM_CHARACTERS],
            "argument_count": len(command) - 1,
        }
        if self._log_commands:
            identity["command"] = list(command)
        return identity


def _stages(execution: Execution) -> dict[str, float]:
    return {f"{name}_ms": round(seconds * 1000, 1) for name, seconds in execution.stages.items()}
