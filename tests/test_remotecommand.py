"""The channel.k8s.io codec: what the bytes of a websocket message mean."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from session_proxy.errors import RemoteCommandProtocolError
from session_proxy.remotecommand import (
    CLOSE_STDIN,
    MAX_STATUS_BYTES,
    STDIN_FRAME_BYTES,
    SUBPROTOCOLS,
    V4,
    V5,
    Channel,
    Output,
    Status,
    decode,
    decode_status,
    start_failure,
    stdin_messages,
)

SUCCESS = {"metadata": {}, "status": "Success"}


def nonzero(causes: Any, **more: Any) -> dict[str, Any]:
    return {
        "metadata": {},
        "status": "Failure",
        "message": "command terminated with non-zero exit code",
        "reason": "NonZeroExitCode",
        "details": {"causes": causes},
        **more,
    }


def exit_code_cause(message: Any) -> dict[str, Any]:
    return {"reason": "ExitCode", "message": message}


def decoded(status: Any) -> Status:
    return decode_status(json.dumps(status).encode())


def test_the_newest_subprotocol_is_offered_first_and_never_alone() -> None:
    assert SUBPROTOCOLS == (V5, V4)


@pytest.mark.parametrize("channel", [Channel.STDOUT, Channel.STDERR])
def test_output_keeps_its_channel_and_its_bytes(channel: Channel) -> None:
    data = bytes(range(256))
    assert decode(bytes([channel]) + data) == Output(channel, data)


@pytest.mark.parametrize("channel", [Channel.STDOUT, Channel.STDERR, Channel.ERROR])
def test_a_frame_without_data_carries_nothing(channel: Channel) -> None:
    assert decode(bytes([channel])) is None


@pytest.mark.parametrize("message", [b"\0data", b'\4{"Width":80}', b"\xff\1", b"\5future", b"\x80"])
def test_channels_that_are_not_ours_carry_nothing(message: bytes) -> None:
    assert decode(message) is None


def test_a_message_without_a_channel_is_an_error() -> None:
    with pytest.raises(RemoteCommandProtocolError, match="without a channel"):
        decode(b"")


def test_success_is_exit_code_zero() -> None:
    assert decode(b"\3" + json.dumps(SUCCESS).encode()) == Status(0, "")


@pytest.mark.parametrize("code", range(1, 256))
def test_every_nonzero_exit_code_is_read(code: int) -> None:
    status = decoded(nonzero([exit_code_cause(str(code))]))
    assert status == Status(code, "command terminated with non-zero exit code")


@pytest.mark.parametrize(
    "causes",
    [
        [exit_code_cause("7"), {"reason": "Other", "message": "1"}],
        [{"reason": "Other", "message": "1"}, exit_code_cause("7")],
        [{"message": "free text"}, "not an object", None, 3, [], exit_code_cause("7")],
        [exit_code_cause(7)],
    ],
)
def test_the_exit_code_is_looked_up_by_reason_never_by_position(causes: list[Any]) -> None:
    assert decoded(nonzero(causes)).exit_code == 7


@pytest.mark.parametrize(
    "causes",
    [
        None,
        [],
        {},
        "ExitCode",
        [None],
        [{"reason": "Other", "message": "7"}],
        [{"message": "7"}],
        [exit_code_cause(None)],
        [exit_code_cause([7])],
        [exit_code_cause(True)],
    ],
)
def test_a_nonzero_status_without_a_code_is_not_success(causes: Any) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="without an exit code"):
        decoded(nonzero(causes))


@pytest.mark.parametrize("details", [None, [], "x", 7])
def test_a_nonzero_status_whose_details_are_garbage_is_not_success(details: Any) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="without an exit code"):
        decoded(nonzero([], details=details))


@pytest.mark.parametrize(
    "text", ["0", "00", "256", "999", "1000", "-1", "+1", "1.0", "1e2", " 1", "", "0x1", "²", "٣", "1\n", "9" * 5000]
)
def test_only_codes_from_1_to_255_count(text: str) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="from 1 to 255"):
        decoded(nonzero([exit_code_cause(text)]))


def test_an_internal_error_has_no_exit_code_and_keeps_its_text() -> None:
    text = 'exec: "nosuch": executable file not found in $PATH: unknown'
    status = {
        "status": "Failure",
        "reason": "InternalError",
        "message": f"Internal error occurred: {text}",
        "details": {"causes": [{"message": text}]},
        "code": 500,
    }
    assert decoded(status) == Status(None, f"Internal error occurred: {text}")


@pytest.mark.parametrize("message", [None, 7, ["x"], {}, ""])
def test_a_failure_without_a_message_still_says_something(message: Any) -> None:
    status = decoded({"status": "Failure", "reason": "InternalError", "message": message})
    assert status == Status(None, "the API server gives no message")


@pytest.mark.parametrize("word", ["success", "SUCCESS", "Success ", "", None, True, 0, ["Success"], {}])
def test_nothing_but_the_word_success_is_success(word: Any) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="neither Success nor Failure"):
        decoded({"status": word, "code": 200})


@pytest.mark.parametrize("status", [None, [], "Success", 0, True])
def test_a_status_must_be_an_object(status: Any) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="not an object"):
        decoded(status)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"Success", b'{"status":"Success"', b"[" * 60_000, b"9" * 60_000])
def test_a_status_must_be_json(data: bytes) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="not JSON"):
        decode(b"\3" + data)


def test_a_status_at_the_limit_is_read_and_one_above_is_not() -> None:
    padding = MAX_STATUS_BYTES - len(json.dumps(SUCCESS | {"message": ""}))
    data = json.dumps(SUCCESS | {"message": "x" * padding}).encode()
    assert decode_status(data).exit_code == 0
    with pytest.raises(RemoteCommandProtocolError, match=f"{MAX_STATUS_BYTES + 1} bytes"):
        decode_status(data + b" ")


def test_half_closing_stdin_is_two_bytes() -> None:
    assert CLOSE_STDIN == b"\xff\x00"


def test_no_stdin_is_no_message() -> None:
    assert stdin_messages(b"") == []


@settings(max_examples=50)
@given(st.integers(0, 4), st.integers(-1, 1), st.binary(min_size=1, max_size=8))
def test_stdin_in_messages_is_the_same_stdin(frames: int, offset: int, pattern: bytes) -> None:
    size = max(0, frames * STDIN_FRAME_BYTES + offset)
    data = (pattern * (size // len(pattern) + 1))[:size]
    messages = stdin_messages(data)
    assert all(message[0] == Channel.STDIN for message in messages)
    assert all(1 < len(message) <= STDIN_FRAME_BYTES + 1 for message in messages)
    assert b"".join(message[1:] for message in messages) == data
    assert len(messages) == -(-len(data) // STDIN_FRAME_BYTES)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "command_not_found",
            (
                "Internal error occurred: error executing command in container: failed to exec in container: failed to "
                'start exec "0a1b": OCI runtime exec failed: exec failed: unable to start container process: exec: '
                '"nosuch": executable file not found in $PATH: unknown'
            ),
        ),
        (
            "command_not_found",
            (
                "OCI runtime exec failed: exec failed: unable to start container process: exec: "
                '"/bin/nosuch": stat /bin/nosuch: no such file or directory: unknown'
            ),
        ),
        ("container_not_found", 'container not found ("workspace")'),
        ("container_not_found", 'unable to upgrade connection: container not found ("workspace")'),
        ("container_not_found", "container is not created or running"),
        ("container_not_found", "container workspace is not valid for pod demo"),
        (
            "cwd_not_found",
            (
                "OCI runtime exec failed: exec failed: unable to start container process: chdir to cwd "
                '("/nosuch") set in config.json failed: no such file or directory: unknown'
            ),
        ),
        (
            "start_failed",
            (
                "OCI runtime exec failed: exec failed: unable to start container process: exec: "
                '"/etc/passwd": permission denied: unknown'
            ),
        ),
        ("start_failed", "the API server gives no message"),
        ("start_failed", "stat /var/lib: no such file or directory"),
        ("start_failed", ""),
    ],
)
def test_a_start_failure_is_told_by_the_runtimes_text(reason: str, message: str) -> None:
    assert start_failure(message) == reason
    assert start_failure(message.upper()) == reason


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_cause = st.fixed_dictionaries(
    {},
    optional={
        "reason": st.just("ExitCode") | _json,
        "message": st.integers(-2, 300).map(str) | st.integers(-2, 300) | _json,
    },
)
_status_json = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["Success", "Failure", "success", ""]) | _json,
        "reason": st.sampled_from(["NonZeroExitCode", "InternalError"]) | _json,
        "message": _json,
        "details": st.fixed_dictionaries({}, optional={"causes": st.lists(_cause | _json, max_size=3) | _json}) | _json,
        "code": _json,
    },
)


def check_truthful(message: bytes) -> None:
    """Only a protocol error may be raised, and code 0 needs the word."""
    try:
        event = decode(message)
    except RemoteCommandProtocolError:
        return
    if isinstance(event, Output):
        assert message == bytes([event.channel]) + event.data
        assert event.data
    elif isinstance(event, Status):
        assert message[0] == Channel.ERROR
        document = json.loads(message[1:])
        assert (event.exit_code == 0) == (document["status"] == "Success")
        assert event.exit_code is None or 0 <= event.exit_code <= 255


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"\3null")
@example(b"\3" + b'{"status":' * 20_000)
def test_arbitrary_bytes_raise_nothing_but_a_protocol_error(message: bytes) -> None:
    check_truthful(message)


@settings(max_examples=200)
@given(_status_json | _json)
def test_arbitrary_statuses_never_claim_a_success_that_was_not_said(status: Any) -> None:
    check_truthful(b"\3" + json.dumps(status).encode())
