"""The caller's contract: a request read from JSON, events written as text, NDJSON or SSE. No sockets here."""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from session_proxy.errors import InvalidRequestError, NotAcceptableError
from session_proxy.wrapper import EXEC_ID_VARIABLE, MAX_ARGUMENT_BYTES

STDOUT = "stdout"
STDERR = "stderr"

TEXT = "text/plain"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"

SHOWN_VALUE_CHARACTERS = 60
"""How much of a wrong value an error repeats."""

MAX_ENTRIES = 100_000
"""Most members of ``command`` and ``env`` together; the kernel's own limit on their bytes comes sooner."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """What the settings allow a request to ask for. Seconds and bytes; 0 bytes is no limit."""

    default_timeout_seconds: float = 600
    max_timeout_seconds: float = 3600
    max_output_bytes: int = 0
    wrapped: bool = True


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """One valid request of ``POST /exec``. ``stdin`` None is an empty standard input; bytes are sent and then ended."""

    command: tuple[str, ...]
    timeout_seconds: float
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes | None = None
    idle_timeout_seconds: float | None = None
    max_output_bytes: int | None = None


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:  # what could just be read, from a little further up the stack
        return "a value nested too deep to show"
    return text if len(text) <= SHOWN_VALUE_CHARACTERS else text[:SHOWN_VALUE_CHARACTERS] + "…"


def _wrong(member: str, problem: str, value: object = None, *, show: bool = True) -> InvalidRequestError:
    """``env`` and ``stdin`` values may be secrets: callers pass ``show=False`` for them."""
    detail = f"{member}: {problem}" + (f", not {_shown(value)}" if show else "")
    return InvalidRequestError(detail, extra={"member": member})


class _DuplicateMemberError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _DuplicateMemberError(name)
            seen.add(name)
    return members


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _decode(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body must be UTF-8; byte {error.start} is not") from None
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except _DuplicateMemberError as error:
        name = str(error)
        raise InvalidRequestError(
            f"the body names a member twice: {_shown(name)}", extra={"member": name[:SHOWN_VALUE_CHARACTERS]}
        ) from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deep to be a request") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"the body must be a JSON object: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError as error:
        raise InvalidRequestError(f"the body must be a JSON object: {_shown(str(error))}") from None


def parse_request(body: bytes, bounds: RequestBounds) -> ExecRequest:
    """Read the body of ``POST /exec``.

    Raises InvalidRequestError, whose detail names the member, its value (shortened) and what would be right.
    """
    members = _decode(body)
    if not isinstance(members, dict):
        # Not shown: it may hold a whole request, and with it secrets.
        kind = "an array" if isinstance(members, list) else "a single value"
        raise InvalidRequestError(f'the body must be a JSON object such as {{"command": ["ls"]}}, not {kind}')
    for name in members:
        if name not in _MEMBERS:
            raise _wrong(
                _shown(name).strip('"'),
                f"unknown member; a request has {', '.join(_MEMBERS)}",
                members[name],
                show=False,
            )
    if "command" not in members:
        raise _wrong("command", 'required: a non-empty array of strings such as ["ls", "-l"]', show=False)
    if not bounds.wrapped:
        for name in ("cwd", "env"):
            if name in members:
                raise _wrong(
                    name,
                    "not available with WRAPPER=none: the command runs bare, without the shell that sets it",
                    show=False,
                )
    values = {name: read(name, members[name], bounds) for name, read in _MEMBERS.items() if name in members}
    if "stdin" in values and "stdinBase64" in values:
        raise _wrong("stdinBase64", "give stdin or stdinBase64, not both", show=False)
    if len(values["command"]) + len(values.get("env", {})) > MAX_ENTRIES:
        raise _wrong("command", f"at most {MAX_ENTRIES} members of command and env together", show=False)
    caps = [limit for limit in (values.get("maxOutputBytes"), bounds.max_output_bytes) if limit]
    return ExecRequest(
        command=values["command"],
        timeout_seconds=values.get("timeoutSeconds", bounds.default_timeout_seconds),
        cwd=values.get("cwd"),
        env=values.get("env", {}),
        stdin=values.get("stdin", values.get("stdinBase64")),
        idle_timeout_seconds=values.get("idleTimeoutSeconds"),
        max_output_bytes=min(caps) if caps else None,
    )


def _text(member: str, value: object, *, show: bool = True) -> str:
    if not isinstance(value, str):
        raise _wrong(member, "must be a string", value, show=show)
    if "\0" in value:
        raise _wrong(member, "must not hold a NUL character", value, show=show)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(member, "must be valid Unicode (it holds half of a surrogate pair)", value, show=show) from None
    return value


def _argument(member: str, text: str) -> str:
    size = len(text.encode())
    if size > MAX_ARGUMENT_BYTES:
        raise _wrong(
            member,
            f"is {size} bytes long; Linux takes at most {MAX_ARGUMENT_BYTES} in one argument or variable. "
            "Send long data as stdin instead",
            show=False,
        )
    return text


def _command(member: str, value: object, _: RequestBounds) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(member, 'must be a non-empty array of strings such as ["ls", "-l"]', value)
    argv = tuple(_argument(f"{member}[{at}]", _text(f"{member}[{at}]", item)) for at, item in enumerate(value))
    if not argv[0]:
        raise _wrong(f"{member}[0]", "must name a program", argv[0])
    return argv


def _cwd(member: str, value: object, _: RequestBounds) -> str:
    path = _argument(member, _text(member, value))
    if not path.startswith("/"):
        raise _wrong(member, 'must be an absolute path such as "/workspace"', path)
    return path


def _env(member: str, value: object, _: RequestBounds) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _wrong(member, 'must be an object of strings such as {"LANG": "C"}', value, show=False)
    environment: dict[str, str] = {}
    for name, entry in value.items():
        if not _ENV_NAME.fullmatch(name):
            raise _wrong(member, "names must match [A-Za-z_][A-Za-z0-9_]*", name)
        if name == EXEC_ID_VARIABLE:
            raise _wrong(f"{member}.{name}", "is reserved: it is how a command's processes are found", show=False)
        where = f"{member}.{_shown(name).strip(chr(34))}"
        environment[name] = _text(where, entry, show=False)
        _argument(where, f"{name}={entry}")
    return environment


def _stdin(member: str, value: object, _: RequestBounds) -> bytes:
    return _text(member, value, show=False).encode()


def _stdin_base64(member: str, value: object, _: RequestBounds) -> bytes:
    text = _text(member, value, show=False)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _wrong(member, "must be standard base64 (RFC 4648, section 4) with padding", show=False) from None


def _seconds(member: str, value: object, bounds: RequestBounds) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(member, "must be a number of seconds greater than 0", value)
    # An int too large for a float, or 1e999, is simply above the maximum.
    if value <= 0 or value > bounds.max_timeout_seconds or not math.isfinite(value):
        raise _wrong(
            member,
            "must be a number of seconds greater than 0 and at most "
            f"{bounds.max_timeout_seconds:g} (EXEC_TIMEOUT_MAX_SECONDS)",
            value,
        )
    return float(value)


def _bytes(member: str, value: object, _: RequestBounds) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one number type: 10.0 is an integer (RFC 8259; JSON Schema agrees)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _wrong(member, "must be an integer greater than 0", value)
    return value


_MEMBERS: dict[str, Callable[[str, object, RequestBounds], Any]] = {
    "command": _command,
    "cwd": _cwd,
    "env": _env,
    "stdin": _stdin,
    "stdinBase64": _stdin_base64,
    "timeoutSeconds": _seconds,
    "idleTimeoutSeconds": _seconds,
    "maxOutputBytes": _bytes,
}


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The first event of a stream."""

    id: str
    pod: str
    pod_uid: str
    container: str
    time: str


@dataclass(frozen=True, slots=True)
class Exit:
    """The last event of a stream, sent exactly once; see the outcomes in the README."""

    outcome: str
    exit_code: int | None
    error: str | None
    reason: str | None
    duration_ms: int
    stdout_bytes: int
    stderr_bytes: int
    reaped: bool | None


class Encoder(Protocol):
    """Turns the events of one stream into bytes. An instance serves one stream."""

    content_type: str
    pings: bool
    """Whether the format has a sign of life."""

    def start(self, event: Start) -> bytes:
        """Encode the first event."""

    def output(self, stream: str, data: bytes) -> bytes:
        """Encode what was printed on ``stream`` (``stdout`` or ``stderr``)."""

    def ping(self) -> bytes:
        """Encode a sign of life; empty where the format has none."""

    def exit(self, event: Exit) -> bytes:
        """Encode the last event."""


class TextEncoder:
    """Output verbatim, then the exit record as the last line."""

    content_type = "text/plain; charset=utf-8"
    pings = False

    def start(self, event: Start) -> bytes:
        """Nothing: the identifiers are in the headers."""
        del event
        return b""

    def output(self, stream: str, data: bytes) -> bytes:
        """Return the bytes as they are."""
        del stream
        return data

    def ping(self) -> bytes:
        """Nothing: a byte here would be taken for output."""
        return b""

    def exit(self, event: Exit) -> bytes:
        """Return the separator and the record."""
        record: dict[str, object] = {"exitCode": event.exit_code}
        if event.outcome != "exited":
            record = {"exitCode": -1, "outcome": event.outcome, "error": event.error or event.outcome}
        return b"\n---EXIT---\n" + json.dumps(record, separators=(",", ":")).encode() + b"\n"


_dumps = json.JSONEncoder(separators=(",", ":")).encode


class _EventEncoder:
    r"""What NDJSON and SSE share: numbering, and text that never breaks a character.

    Everything is ASCII on the wire (``\u`` escapes), so that no line splitter mistakes U+2028 for an end of line.
    """

    content_type = ""
    pings = True

    def __init__(self) -> None:
        self._seq = 0
        self._partial = {STDOUT: b"", STDERR: b""}

    def _frame(self, name: str, seq: int, members: str) -> str:
        raise NotImplementedError

    def _event(self, name: str, members: str = "") -> bytes:
        seq = self._seq
        self._seq += 1
        return self._frame(name, seq, f'{{"event":"{name}","seq":{seq}{members}}}').encode("ascii")

    def start(self, event: Start) -> bytes:
        """Encode the first event, seq 0."""
        values = {
            "id": event.id,
            "pod": event.pod,
            "podUid": event.pod_uid,
            "container": event.container,
            "time": event.time,
        }
        return self._event("start", "," + _dumps(values)[1:-1])

    def output(self, stream: str, data: bytes) -> bytes:
        """Encode as ``text`` when valid UTF-8, holding back up to three bytes of a split character; else ``base64``."""
        data = self._partial[stream] + data
        self._partial[stream] = b""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return self._base64(stream, data)
            self._partial[stream] = data[error.start :]
            text = data[: error.start].decode("utf-8")
        return self._event(stream, f',"text":{_dumps(text)}') if text else b""

    def _base64(self, stream: str, data: bytes) -> bytes:
        return self._event(stream, f',"base64":"{binascii.b2a_base64(data, newline=False).decode("ascii")}"')

    def ping(self) -> bytes:
        """Encode a ping event."""
        return self._event("ping")

    def exit(self, event: Exit) -> bytes:
        """Encode what is held back of each stream, then the exit event."""
        held = b"".join(self._base64(stream, data) for stream, data in self._partial.items() if data)
        values = {
            "outcome": event.outcome,
            "exitCode": event.exit_code,
            "error": event.error,
            "reason": event.reason,
            "durationMs": event.duration_ms,
            "stdoutBytes": event.stdout_bytes,
            "stderrBytes": event.stderr_bytes,
            "reaped": event.reaped,
        }
        return held + self._event("exit", "," + _dumps(values)[1:-1])


class NdjsonEncoder(_EventEncoder):
    """One event a line."""

    content_type = NDJSON

    def _frame(self, name: str, seq: int, members: str) -> str:
        del name, seq
        return members + "\n"


class SseEncoder(_EventEncoder):
    """Server-sent events (WHATWG HTML, section 9.2): ``id`` is the seq, ``event`` the name, ``data`` the JSON."""

    content_type = SSE + "; charset=utf-8"

    def _frame(self, name: str, seq: int, members: str) -> str:
        return f"id: {seq}\nevent: {name}\ndata: {members}\n\n"


_FORMATS: dict[str, Callable[[], Encoder]] = {TEXT: TextEncoder, NDJSON: NdjsonEncoder, SSE: SseEncoder}


def encoder_for(accept: str | None) -> Encoder:
    """Choose the format by ``Accept`` (RFC 9110, section 12.5.1); text for ``*/*`` and none.

    Raises NotAcceptableError when no format matches.
    """
    if accept is None or not accept.strip():
        return TextEncoder()
    ranges = [_media_range(part) for part in accept.split(",")]
    chosen: Callable[[], Encoder] | None = None
    best = 0.0
    for name, make in _FORMATS.items():
        # The most specific range that matches decides a format's quality; the first format wins a tie.
        candidates = ("*/*", name.partition("/")[0] + "/*", name)
        matching = [(candidates.index(pattern), quality) for pattern, quality in ranges if pattern in candidates]
        quality = max(matching)[1] if matching else 0.0
        if quality > best:
            best, chosen = quality, make
    if chosen is None:
        raise NotAcceptableError(f"Accept must allow one of {', '.join(_FORMATS)}, not only {_shown(accept)}")
    return chosen()


def _media_range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = 0.0
    return name.lower(), quality if 0.0 <= quality <= 1.0 else 0.0
