"""Codec of the channel.k8s.io streaming protocol (v4 and v5): websocket messages in, events out. No sockets here.

Source: k8s.io/apimachinery/pkg/util/remotecommand and KEP-4006 (v5, which adds the CLOSE signal).
"""

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from session_proxy.errors import RemoteCommandProtocolError

V4 = "v4.channel.k8s.io"
V5 = "v5.channel.k8s.io"
SUBPROTOCOLS = (V5, V4)
"""What is offered, best first. Never v5 alone: an old server answers that with 403 and no body, as if RBAC said no."""

MAX_STATUS_BYTES = 65_536
"""A Status larger than this is not read; the stream then counts as ended without one."""

STDIN_FRAME_BYTES = 32_768
"""Largest stdin message sent. The server drops connections over 32 MiB a message and copies in 32 KiB pieces."""


class Channel(IntEnum):
    """The first byte of every message."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4
    CLOSE = 255


class Output(NamedTuple):
    """Bytes the command printed on ``channel`` (STDOUT or STDERR); never empty.

    A tuple and not a dataclass: one is made for each message.
    """

    channel: Channel
    data: bytes


_OUTPUT_CHANNELS = {int(channel): channel for channel in (Channel.STDOUT, Channel.STDERR)}


@dataclass(frozen=True, slots=True)
class Status:
    """How Kubernetes says the command ended: ``exit_code`` 0-255, or None when it says that it failed to run it."""

    exit_code: int | None
    message: str


def decode(message: bytes) -> Output | Status | None:
    """Decode one websocket message; None for those that carry nothing (empty data, channels we do not use).

    Raises RemoteCommandProtocolError for an empty message or a Status that is not one.
    """
    if not message:
        raise RemoteCommandProtocolError("an empty message without a channel")
    channel = message[0]
    if output := _OUTPUT_CHANNELS.get(channel):
        return Output(output, message[1:]) if len(message) > 1 else None
    if channel == Channel.ERROR:
        return decode_status(message[1:]) if len(message) > 1 else None
    return None


def decode_status(data: bytes) -> Status:
    """Decode the ``meta/v1`` Status of channel 3.

    Success is exit code 0. ``NonZeroExitCode`` holds the code in the cause whose reason is ``ExitCode``; it is looked
    up by that reason, never by position. Any other failure has no exit code: the runtime could not run the command.
    """
    if len(data) > MAX_STATUS_BYTES:
        raise RemoteCommandProtocolError(f"a Status of {len(data)} bytes (at most {MAX_STATUS_BYTES})")
    try:
        status = json.loads(data)
    except (ValueError, RecursionError):
        raise RemoteCommandProtocolError("a Status that is not JSON") from None
    if not isinstance(status, dict):
        raise RemoteCommandProtocolError("a Status that is not an object")
    message = status.get("message")
    text = message if isinstance(message, str) else ""
    match status.get("status"):
        case "Success":
            return Status(0, text)
        case "Failure" if status.get("reason") == "NonZeroExitCode":
            return Status(_exit_code(status), text)
        case "Failure":
            return Status(None, text or "the API server gives no message")
    raise RemoteCommandProtocolError("a Status that is neither Success nor Failure")


def _exit_code(status: dict[str, Any]) -> int:
    details = status.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    for cause in causes if isinstance(causes, list) else ():
        if isinstance(cause, dict) and cause.get("reason") == "ExitCode":
            text = str(cause.get("message"))
            # A "non-zero exit code" of zero contradicts itself, and must never read as success.
            if text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= 255:  # noqa: PLR2004
                return int(text)
    raise RemoteCommandProtocolError("a NonZeroExitCode Status without an exit code from 1 to 255")


def stdin_messages(data: bytes) -> list[bytes]:
    """Return the messages that carry ``data`` to standard input."""
    prefix = bytes([Channel.STDIN])
    return [prefix + data[at : at + STDIN_FRAME_BYTES] for at in range(0, len(data), STDIN_FRAME_BYTES)]


CLOSE_STDIN = bytes([Channel.CLOSE, Channel.STDIN])
"""Half-closes standard input. v5 only; v4 has no way to say it."""


def start_failure(message: str) -> str:
    """Return the ``reason`` for a runtime that could not start the command, from its free-text message."""
    text = message.lower()
    if "executable file not found" in text or ("exec: " in text and "no such file or directory" in text):
        return "command_not_found"
    if "container not found" in text or "container is not created or running" in text or "not valid for pod" in text:
        return "container_not_found"
    if "chdir to cwd" in text:
        return "cwd_not_found"
    return "start_failed"
