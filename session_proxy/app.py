"""The HTTP interface: routes, who may talk to it, and the one table from error to status."""

import asyncio
import contextlib
import fcntl
import hmac
import ipaddress
import json
import math
import re
import secrets
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import HttpVersion11, web

from session_proxy import openapi, wire
from session_proxy.errors import (
    HostNotAllowedError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    OriginNotAllowedError,
    PeerNotAllowedError,
    RefusedError,
    RequestTimeoutError,
    RequestTooLargeError,
    UnauthorizedError,
)
from session_proxy.execution import Execution, Outcome
from session_proxy.executor import Executor
from session_proxy.limits import OutputBuffer, Slots
from session_proxy.readiness import Readiness
from session_proxy.workspace import Workspace

STATUS_BY_REASON: Mapping[str, int] = {
    "invalid_request": 400,
    "unauthorized": 401,
    "workspace_not_owned": 403,
    "workspace_policy_violation": 403,
    "host_not_allowed": 403,
    "origin_not_allowed": 403,
    "peer_not_allowed": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "request_timeout": 408,
    "request_too_large": 413,
    "rate_limited": 429,
    "too_many_execs": 429,
    "internal_error": 500,
    "kube_unavailable": 502,
    "kube_forbidden": 502,
    "kube_unauthorized": 502,
    "workspace_not_found": 503,
    "workspace_not_running": 503,
    "workspace_ambiguous": 503,
    "shutting_down": 503,
    "kube_timeout": 504,
}
"""The only place where an error becomes a status."""

BODY_SECONDS = 10.0
"""For a request's body to arrive whole, and for the head of a connection's first request."""

SMALL_BODY_BYTES = 65_536
"""A body up to this size is read in any case; of larger ones, MAX_CONCURRENT_EXECS at a time."""

SEND_BUFFER_BYTES = 262_144
"""The kernel's buffer of one response; without a bound it grows to megabytes for a reader that stopped."""

STALL_CHECKS = 8
"""How often within STALL_SECONDS a blocked reader is looked at."""

MAX_REQUEST_ID = 128
"""Longest X-Request-Id that is taken over."""

_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9.-]+))(?::[0-9]{0,5})?", re.ASCII)

_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:/+=-]{{1,{MAX_REQUEST_ID}}}", re.ASCII)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AppMetrics(Protocol):
    """What is counted here."""

    def refused(self, reason: str) -> None:
        """Count a refusal."""

    def render(self) -> bytes:
        """Return the text exposition."""


@dataclass(frozen=True, slots=True)
class AppSettings:
    """What the HTTP interface needs of the settings."""

    bounds: wire.RequestBounds
    max_request_bytes: int
    heartbeat_seconds: float
    stall_seconds: float
    token: str | None = field(default=None, repr=False)
    socket_uids: tuple[int, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)


EXECUTOR = web.AppKey("executor", Executor)
WORKSPACE = web.AppKey("workspace", Workspace)
READINESS = web.AppKey("readiness", Readiness)
SETTINGS = web.AppKey("settings", AppSettings)
METRICS: web.AppKey[AppMetrics] = web.AppKey("metrics")
METRICS_TYPE: web.AppKey[str] = web.AppKey("metrics_type")
LOGGER: web.AppKey[Any] = web.AppKey("logger")
REQUEST_ID = web.RequestKey("request_id", str)
DEADLINES: web.AppKey["ConnectionDeadlines"] = web.AppKey("deadlines")
LARGE_BODIES = web.AppKey("large_bodies", Slots)


def make_app(
    executor: Executor,
    workspace: Workspace,
    readiness: Readiness,
    settings: AppSettings,
    *,
    metrics: AppMetrics,
    metrics_type: str,
    logger: Any,
) -> web.Application:
    """Return the application; the caller owns everything passed in."""
    app = web.Application(middlewares=[_envelope, _gatekeeper], client_max_size=settings.max_request_bytes)
    app[EXECUTOR] = executor
    app[WORKSPACE] = workspace
    app[READINESS] = readiness
    app[SETTINGS] = settings
    app[METRICS] = metrics
    app[METRICS_TYPE] = metrics_type
    app[LOGGER] = logger
    app[DEADLINES] = ConnectionDeadlines()
    app[LARGE_BODIES] = Slots(executor.settings.max_concurrent)
    routes: tuple[tuple[str, str, Handler], ...] = (
        ("POST", "/exec", _exec),
        ("GET", "/execs", _execs),
        ("GET", "/execs/{id}", _show_exec),
        ("DELETE", "/execs/{id}", _kill_exec),
        ("GET", "/workspace", _workspace),
        ("GET", "/limits", _limits),
        ("GET", "/livez", _livez),
        ("GET", "/health", _livez),
        ("GET", "/readyz", _readyz),
        ("GET", "/metrics", _metrics),
        ("GET", "/openapi.json", _openapi),
    )
    for method, path, handler in routes:
        app.router.add_route(method, path, handler, expect_handler=_expect)
    return app


class ConnectionDeadlines:
    """Closes connections whose first request does not arrive: aiohttp has no bound for a half-sent head."""

    def __init__(self) -> None:
        self._waiting: dict[web.RequestHandler, asyncio.TimerHandle] = {}

    def opened(self, protocol: web.RequestHandler) -> None:
        """Begin to wait for the connection's first request."""
        loop = asyncio.get_running_loop()
        self._waiting[protocol] = loop.call_later(BODY_SECONDS, self._expire, protocol)

    def arrived(self, protocol: web.RequestHandler) -> None:
        """Stop waiting."""
        timer = self._waiting.pop(protocol, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Forget all timers."""
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()

    def _expire(self, protocol: web.RequestHandler) -> None:
        self._waiting.pop(protocol, None)
        if protocol.transport is not None:
            protocol.transport.close()


# --- every request ----------------------------------------------------------------------------------------------------


def problem(error: RefusedError, request_id: str) -> web.Response:
    """Return the RFC 9457 document of a refusal."""
    status = STATUS_BY_REASON[error.reason]
    body: dict[str, Any] = {
        "type": f"urn:session-proxy:{error.reason}",
        "title": error.reason.replace("_", " "),
        "status": status,
        "detail": error.detail,
        "reason": error.reason,
        "requestId": request_id,
        **error.extra,
    }
    headers = {"Cache-Control": "no-store"}
    if error.violations:
        body["violations"] = [violation.to_json() for violation in error.violations]
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if status == 401:  # noqa: PLR2004
        headers["WWW-Authenticate"] = "Bearer"
    text = json.dumps(body, ensure_ascii=True)
    return web.Response(text=text, status=status, headers=headers, content_type="application/problem+json")


@web.middleware
async def _envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each request an id, and each error its problem document."""
    request.app[DEADLINES].arrived(request.protocol)
    given = request.headers.get("X-Request-Id", "")
    request_id = request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
    try:
        response = await handler(request)
    except RefusedError as error:
        response = _refused(request, error)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _refused(request, MethodNotAllowedError(f"{request.method} {request.path}: allowed is {allowed}"))
        response.headers["Allow"] = allowed
    except web.HTTPNotFound:
        response = _refused(request, NotFoundError(f"no such route: {request.path[:100]}; see GET /openapi.json"))
    except web.HTTPRequestEntityTooLarge:
        response = _refused(request, _too_large(request))
    except web.HTTPException:
        raise
    except (ConnectionError, asyncio.CancelledError):
        raise  # the client left
    except Exception as error:  # noqa: BLE001 (a defect becomes a 500 with a reason, and a log line with the trace)
        request.app[LOGGER].exception("internal_error", request_id=request_id, path=request.path)
        if request.writer.output_size and request.transport is not None:
            request.transport.abort()  # in mid-response: nothing else can tell the client
        response = _refused(request, RefusedError(f"internal error: {type(error).__name__}; the log has more"))
    if not response.prepared:
        response.headers.setdefault("X-Request-Id", request_id)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
    return response


def _refused(request: web.Request, error: RefusedError) -> web.Response:
    request.app[METRICS].refused(error.reason)
    request.app[LOGGER].info(
        "refused", request_id=request[REQUEST_ID], method=request.method, path=request.path[:100], reason=error.reason
    )
    response = problem(error, request[REQUEST_ID])
    if not request.content.is_eof():
        response.force_close()  # what was not read of the body must not be taken for the next request
    return response


@web.middleware
async def _gatekeeper(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let in only what comes from beside us: no other host, no browser page, no unknown user."""
    settings = request.app[SETTINGS]
    _check_host(request.headers.get("Host"))
    if "Origin" in request.headers:
        raise OriginNotAllowedError("requests of web pages (an Origin header) are refused")
    site = request.headers.get("Sec-Fetch-Site", "none")
    if site != "none":
        raise OriginNotAllowedError("requests of web pages (Sec-Fetch-Site other than none) are refused")
    if settings.socket_uids:
        _check_peer(request, settings.socket_uids)
    if settings.token is not None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("utf-8", "surrogateescape"), settings.token.encode()
        ):
            raise UnauthorizedError("Authorization must be Bearer and the token of LISTEN_TOKEN_FILE")
    return await handler(request)


def _check_host(host: str | None) -> None:
    if match := _HOST.fullmatch((host or "").strip()):
        name = (match["name"] or match["address"]).lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost"):
            return
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(name).is_loopback:
                return
    raise HostNotAllowedError("Host must be localhost or a loopback address")


def _check_peer(request: web.Request, allowed: tuple[int, ...]) -> None:
    sock = request.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in allowed:
        raise PeerNotAllowedError(f"user id {uid} is not in LISTEN_SOCKET_UIDS")


def _json(body: Any, status: int = 200) -> web.Response:
    return web.json_response(
        body,
        status=status,
        headers={"Cache-Control": "no-store"},
        dumps=lambda value: json.dumps(value, indent=1) + "\n",
    )


# --- the small routes -------------------------------------------------------------------------------------------------


async def _execs(request: web.Request) -> web.Response:
    return _json({"execs": [execution.describe() for execution in request.app[EXECUTOR].list()]})


async def _show_exec(request: web.Request) -> web.Response:
    return _json(request.app[EXECUTOR].get(request.match_info["id"]).describe())


async def _kill_exec(request: web.Request) -> web.Response:
    execution = request.app[EXECUTOR].get(request.match_info["id"])
    execution.end(Outcome.CANCELLED, reason="deleted", error="cancelled by DELETE /execs")
    return _json(execution.describe(), 200 if execution.judging or execution.verdict is not None else 202)


async def _workspace(request: web.Request) -> web.Response:
    return _json(await request.app[WORKSPACE].describe())


async def _limits(request: web.Request) -> web.Response:
    return _json({**request.app[SETTINGS].limits, "running": request.app[EXECUTOR].running})


async def _livez(_: web.Request) -> web.Response:
    return _json({"status": "ok"})


async def _readyz(request: web.Request) -> web.Response:
    if request.app[EXECUTOR].draining:
        reasons = [{"reason": "shutting_down", "detail": "the sidecar is stopping"}]
    else:
        reasons = await request.app[READINESS].problems()
    return _json({"status": "unready" if reasons else "ok", "reasons": reasons}, 503 if reasons else 200)


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[METRICS].render(), headers={"Content-Type": request.app[METRICS_TYPE]})


async def _openapi(request: web.Request) -> web.Response:
    settings = request.app[SETTINGS]
    return _json(
        openapi.document(
            settings.bounds, settings.max_request_bytes, STATUS_BY_REASON, bearer=settings.token is not None
        )
    )


# --- POST /exec -------------------------------------------------------------------------------------------------------


async def _exec(request: web.Request) -> web.StreamResponse:
    settings = request.app[SETTINGS]
    encoder = wire.encoder_for(", ".join(request.headers.getall("Accept", ())))
    with contextlib.ExitStack() as reading:
        body = await _read_body(request, settings.max_request_bytes, reading)
        execution = await request.app[EXECUTOR].submit(wire.parse_request(body, settings.bounds), request[REQUEST_ID])
        del body
    try:
        start = await asyncio.shield(execution.ready)
        headers = {
            "Content-Type": encoder.content_type,
            "X-Exec-Id": execution.id,
            "X-Request-Id": request[REQUEST_ID],
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        reader = _Reader(request, response, execution, settings)
        await reader.stream(encoder, start)
    except BaseException:
        # Reset, or (with handler_cancellation) gone, or a defect of ours. The exec's own task kills what it started.
        execution.end(Outcome.CANCELLED, reason="client_gone", error="the client went away")
        execution.output.discard()
        raise
    return response


async def _expect(_: web.Request) -> None:
    """Leave Expect to the handler: aiohttp would answer before anybody looked at who is asking."""


async def _read_body(request: web.Request, limit: int, reading: contextlib.ExitStack) -> bytes:
    """Return the body. A large one takes a place among those that are read at a time, which ``reading`` gives back."""
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(request)
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.content.iter_any():
                small = len(body) <= SMALL_BODY_BYTES
                body += chunk
                if len(body) > limit:
                    raise _too_large(request)
                if small and len(body) > SMALL_BODY_BYTES:
                    request.app[LARGE_BODIES].take()
                    reading.callback(request.app[LARGE_BODIES].release)
    except web.RequestPayloadError:
        raise InvalidRequestError("the body is not what Content-Encoding or Transfer-Encoding say") from None
    except TimeoutError:
        raise RequestTimeoutError(f"the body did not arrive whole within {BODY_SECONDS:g} s") from None
    return bytes(body)


def _too_large(request: web.Request) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body may have {request.app[SETTINGS].max_request_bytes} bytes (MAX_REQUEST_BYTES)"
    )


class _Reader:
    """Writes one exec's events to its one reader, and notices when that reader stops reading."""

    def __init__(
        self, request: web.Request, response: web.StreamResponse, execution: Execution, settings: AppSettings
    ) -> None:
        self._response = response
        self._execution = execution
        self._settings = settings
        self._transport = request.transport
        self._socket = request.get_extra_info("socket")
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._written = 0
        self._writing = False

    async def stream(self, encoder: wire.Encoder, start: wire.Start) -> None:
        """Send everything up to and including the terminal event."""
        output = self._execution.output
        watching = asyncio.create_task(self._watch())
        try:
            await self._write(encoder.start(start))
            while batch := await self._next(output, encoder):
                await self._write(b"".join([encoder.output(stream, data) for stream, data in batch]))
            self._writing = True
            await self._response.write_eof(encoder.exit(self._execution.exit_event()))
        finally:
            watching.cancel()
            await asyncio.wait({watching})

    async def _next(self, output: OutputBuffer, encoder: wire.Encoder) -> list[tuple[str, bytes]]:
        """Take output, pinging while there is none. A deadline costs: there is none where it would change nothing."""
        while encoder.pings and not output.readable:
            try:
                async with asyncio.timeout(self._settings.heartbeat_seconds):
                    return await output.take()
            except TimeoutError:
                await self._write(encoder.ping())
        return await output.take()

    async def _write(self, data: bytes) -> None:
        if not data:
            return
        self._writing = True
        self._written += len(data)
        await self._response.write(data)
        self._writing = False

    async def _watch(self) -> None:
        """Abort the connection of a reader that takes nothing for STALL_SECONDS while something is to be written."""
        seconds = self._settings.stall_seconds
        idle_checks = 0
        before = -1
        while True:
            await asyncio.sleep(seconds / STALL_CHECKS)
            taken = self._taken()
            idle_checks = idle_checks + 1 if self._writing and taken == before else 0
            before = taken
            if idle_checks >= STALL_CHECKS:
                self._execution.end(
                    Outcome.CANCELLED, reason="client_stalled", error=f"the client read nothing for {seconds:g} s"
                )
                self._execution.output.discard()
                if isinstance(self._transport, asyncio.WriteTransport):
                    self._transport.abort()
                return

    def _taken(self) -> int:
        """Bytes the reader's side has taken: what left this process less what the kernel still holds."""
        held = 0
        if isinstance(self._transport, asyncio.WriteTransport):
            held = self._transport.get_write_buffer_size()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            queued = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
            held += struct.unpack("i", queued)[0]
        return self._written - held
