"""The composition root: settings become objects, listeners open, signals drain."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from session_proxy import __version__, app, kube, log, wire, wrapper
from session_proxy.config import Config, Wrapper
from session_proxy.errors import ConfigError, RefusedError
from session_proxy.execution import Execution
from session_proxy.executor import Executor, ExecutorSettings
from session_proxy.metrics import CONTENT_TYPE, Metrics
from session_proxy.ownership import OwnerMode
from session_proxy.policy import PolicySettings
from session_proxy.readiness import Readiness
from session_proxy.workspace import Workspace, WorkspaceSettings

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: a setting is wrong."""

EXIT_OS = 71
"""EX_OSERR: a listener cannot be opened."""

LAST_WORDS_SHARE = 0.15
"""The part of DRAIN_SECONDS kept for readers to take their last event."""

GOODBYE_SHARE = 0.05
"""The part of DRAIN_SECONDS kept for closing connections and for the interpreter's end."""

KEEPALIVE_SECONDS = 75.0
"""For an idle connection between requests."""

LINGERING_SECONDS = 1.0
"""For the rest of a body whose request was answered early."""

BACKLOG = 128
"""Connections the kernel holds for us while we are busy."""


class _Observers:
    """Metrics and audit log behind one Observer."""

    def __init__(self, metrics: Metrics, audit: log.AuditLog) -> None:
        self._all = (metrics, audit)

    def exec_started(self, execution: Execution) -> None:
        for observer in self._all:
            observer.exec_started(execution)

    def exec_ended(self, execution: Execution) -> None:
        for observer in self._all:
            observer.exec_ended(execution)

    def exec_refused(self, execution: Execution, error: RefusedError) -> None:
        for observer in self._all:
            observer.exec_refused(execution, error)


class _HttpLog:
    """aiohttp's log, without its texts: those quote whole header lines of what it could not parse, tokens included."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def debug(self, *_: object, **__: object) -> None:
        """Nothing."""

    def exception(self, *_: object, exc_info: object = None, **__: object) -> None:
        """Note the kind of error."""
        self._logger.warning("http_error", error=type(exc_info).__name__)

    error = warning = exception


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon: where it listens, and what ends it."""

    address: tuple[str, int]
    executor: Executor


def _token(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"LISTEN_TOKEN_FILE is {path!r}; it must be a readable file ({error})"]) from None
    if not token:
        raise ConfigError([f"LISTEN_TOKEN_FILE is {path!r}; the file must hold a token, and it is empty"])
    return token


def _limits(config: Config) -> Mapping[str, Any]:
    return {
        "maxConcurrentExecs": config.max_concurrent_execs,
        "execRatePerSecond": config.exec_rate_per_second,
        "execBurst": config.exec_burst,
        "timeoutSeconds": config.exec_timeout_seconds,
        "maxTimeoutSeconds": config.exec_timeout_max_seconds,
        "maxOutputBytes": config.max_output_bytes,
        "maxRequestBytes": config.max_request_bytes,
        "maxArgumentBytes": wrapper.MAX_ARGUMENT_BYTES,
        "heartbeatSeconds": config.heartbeat_seconds,
        "stallSeconds": config.stall_seconds,
        "killGraceSeconds": config.kill_grace_seconds,
        "wrapper": config.wrapper,
    }


@contextlib.asynccontextmanager
async def running(config: Config, environ: Mapping[str, str], logger: Any) -> AsyncIterator[Daemon]:
    """Run the daemon inside this context; leaving it drains: within DRAIN_SECONDS every exec is ended and reaped.

    Raises ConfigError when the credentials, the namespace or the token cannot be had, OSError when a listener cannot.
    """
    token = _token(config.listen_token_file)
    credentials = await kube.load_credentials(environ)
    namespace = config.namespace or credentials.namespace
    if namespace is None:
        raise ConfigError(["NAMESPACE is not set and the credentials name none; it must be the workspace's namespace"])
    metrics = Metrics()
    client = kube.KubeClient(
        credentials,
        namespace=namespace,
        selector=config.workspace_selector,
        pod=config.workspace_pod,
        on_call=metrics.kube_called,
    )
    workspace = Workspace(
        client,
        WorkspaceSettings(
            described=(
                f"pod {config.workspace_pod}" if config.workspace_pod else f"the selector {config.workspace_selector}"
            )
            + f" in namespace {namespace}",
            container=config.workspace_container,
            owner_mode=config.owner_mode,
            owner_uid=config.owner_uid,
            own_pod_name=config.pod_name,
            own_pod_uid=config.pod_uid,
            policy=PolicySettings(
                level=config.pod_security_level,
                allowed_images=config.allowed_images,
                require_image_digest=config.require_image_digest,
                container=config.workspace_container,
            ),
        ),
    )
    wrapped = config.wrapper is Wrapper.SH
    executor = Executor(
        client,
        workspace,
        ExecutorSettings(
            max_concurrent=config.max_concurrent_execs,
            rate_per_second=config.exec_rate_per_second,
            burst=config.exec_burst,
            heartbeat_seconds=config.heartbeat_seconds,
            kill_grace_seconds=config.kill_grace_seconds,
            wrapped=wrapped,
        ),
        _Observers(metrics, log.AuditLog(logger, log_commands=config.log_commands)),
    )
    application = app.make_app(
        executor,
        workspace,
        Readiness(workspace, client, by_selector=config.workspace_pod is None),
        app.AppSettings(
            bounds=wire.RequestBounds(
                default_timeout_seconds=config.exec_timeout_seconds,
                max_timeout_seconds=config.exec_timeout_max_seconds,
                max_output_bytes=config.max_output_bytes,
                wrapped=wrapped,
            ),
            max_request_bytes=config.max_request_bytes,
            heartbeat_seconds=config.heartbeat_seconds,
            stall_seconds=config.stall_seconds,
            token=token,
            socket_uids=config.listen_socket_uids,
            limits=_limits(config),
        ),
        metrics=metrics,
        metrics_type=CONTENT_TYPE,
        logger=logger,
    )
    last_words = config.drain_seconds * LAST_WORDS_SHARE
    runner = web.AppRunner(
        application,
        handler_cancellation=True,
        access_log=None,
        logger=_HttpLog(logger),
        keepalive_timeout=KEEPALIVE_SECONDS,
        lingering_time=LINGERING_SECONDS,
        shutdown_timeout=last_words / 2,  # aiohttp may take it twice
    )
    try:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            stack.push_async_callback(workspace.close)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            address = await _listen(config, runner, application[app.DEADLINES], stack)
            if config.owner_mode is OwnerMode.NONE:
                logger.warning(
                    "ownership_not_checked", detail="OWNER_MODE=none: commands run in any pod that the selector matches"
                )
            logger.info("listening", address=f"{address[0]}:{address[1]}", version=__version__, namespace=namespace)
            try:
                yield Daemon(address, executor)
            finally:
                await executor.shutdown(config.drain_seconds * (1 - LAST_WORDS_SHARE - GOODBYE_SHARE))
    finally:
        application[app.DEADLINES].close()


async def _listen(
    config: Config, runner: web.AppRunner, deadlines: app.ConnectionDeadlines, stack: contextlib.AsyncExitStack
) -> tuple[str, int]:
    """Open every listener before anything says ready."""
    loop = asyncio.get_running_loop()
    server = runner.server
    if server is None:
        raise RuntimeError("the runner is not set up")

    def connect() -> web.RequestHandler:
        protocol = server()
        deadlines.opened(protocol)
        return protocol

    host, port = config.listen_addr
    tcp = await loop.create_server(connect, host, port, backlog=BACKLOG)
    stack.callback(tcp.close)
    if config.listen_socket is not None:
        unix = await loop.create_unix_server(connect, sock=_unix_socket(config.listen_socket), backlog=BACKLOG)
        stack.callback(_unlink, config.listen_socket)
        stack.callback(unix.close)
    bound: tuple[str, int] = tcp.sockets[0].getsockname()[:2]
    return bound


def _unix_socket(path: str) -> socket.socket:
    """Bind with mode 0660 from the first moment on; a socket that nobody listens on any more is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(Path(path).lstat().st_mode):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    try:
                        probe.connect(path)
                    except ConnectionRefusedError:
                        _unlink(path)
        before = os.umask(0o117)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
    except BaseException:
        sock.close()
        raise
    return sock


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()


async def _serve(config: Config, environ: Mapping[str, str], on_listening: Callable[[tuple[str, int]], None]) -> None:
    logger = log.get()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(name: str) -> None:
        if stopping.is_set():
            logger.warning("stopped_at_once", signal=name)
            os._exit(128 + signal.Signals[name])  # somebody insists; the wrappers see the connections drop
        logger.info("stopping", signal=name)
        stopping.set()

    for name in ("SIGTERM", "SIGINT"):
        loop.add_signal_handler(signal.Signals[name], stop, name)
    async with running(config, environ, logger) as daemon:
        on_listening(daemon.address)
        await stopping.wait()
        began = time.monotonic()
    logger.info("stopped", drain_ms=round((time.monotonic() - began) * 1000))


def serve(
    config: Config, environ: Mapping[str, str], on_listening: Callable[[tuple[str, int]], None] = lambda _: None
) -> int:
    """Run until SIGTERM or SIGINT; return the exit status. A second signal ends it at once."""
    log.configure(config.log_level, config.log_format)
    try:
        asyncio.run(_serve(config, environ, on_listening))
    except ConfigError as error:
        for line in error.problems:
            log.get().error("setting", problem=line)
        return EXIT_CONFIG
    except OSError as error:
        log.get().error("cannot_listen", detail=str(error))
        return EXIT_OS
    return 0
