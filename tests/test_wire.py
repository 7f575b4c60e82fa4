"""The caller's contract: requests read from JSON, events written as text, NDJSON and SSE."""

import base64
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from session_proxy.errors import InvalidRequestError, NotAcceptableError
from session_proxy.wire import (
    MAX_ENTRIES,
    Encoder,
    ExecRequest,
    Exit,
    NdjsonEncoder,
    RequestBounds,
    SseEncoder,
    Start,
    TextEncoder,
    encoder_for,
    parse_request,
)

BOUNDS = RequestBounds()
LONGEST = 131_071
SECRET = "hunter2"


def parsed(bounds: RequestBounds = BOUNDS, /, **members: Any) -> ExecRequest:
    return parse_request(json.dumps({"command": ["true"]} | members).encode(), bounds)


def refused(body: bytes | Mapping[str, Any], bounds: RequestBounds = BOUNDS) -> InvalidRequestError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(InvalidRequestError) as refusal:
        parse_request(data, bounds)
    assert str(refusal.value) == refusal.value.detail
    assert len(refusal.value.detail) < 400
    assert "\n" not in refusal.value.detail
    return refusal.value


def refused_member(member: str, value: Any, bounds: RequestBounds = BOUNDS) -> str:
    """Return what is said about one wrong member; it must be named."""
    error = refused({"command": ["true"]} | {member: value}, bounds)
    assert error.detail.startswith(member)
    assert str(error.extra["member"]).startswith(member)
    return error.detail


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_command_is_enough() -> None:
    request = parse_request(b'{"command": ["ls", "-l", ""]}', BOUNDS)
    assert request == ExecRequest(command=("ls", "-l", ""), timeout_seconds=600)
    assert request.stdin is None
    assert request.max_output_bytes is None


def test_every_member_is_read() -> None:
    request = parsed(
        command=["a", "ü\n$(b) *", "-c"],
        cwd="/work space/ü",
        env={"A": "", "_b9": "x=y\nz"},
        stdin="ü\n",
        timeoutSeconds=1.5,
        idleTimeoutSeconds=3600,
        maxOutputBytes=7,
    )
    assert request == ExecRequest(
        command=("a", "ü\n$(b) *", "-c"),
        timeout_seconds=1.5,
        cwd="/work space/ü",
        env={"A": "", "_b9": "x=y\nz"},
        stdin="ü\n".encode(),
        idle_timeout_seconds=3600,
        max_output_bytes=7,
    )


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256))])
def test_base64_stdin_is_any_bytes(data: bytes) -> None:
    assert parsed(stdinBase64=base64.b64encode(data).decode()).stdin == data


def test_an_empty_stdin_is_not_the_same_as_none() -> None:
    assert parsed(stdin="").stdin == b""
    assert parsed().stdin is None


def test_surrogate_pairs_are_one_character() -> None:
    assert parse_request(rb'{"command": ["\ud83d\ude00"]}', BOUNDS).command == ("😀",)


@pytest.mark.parametrize(
    ("asked", "cap", "got"), [(None, 0, None), (5, 0, 5), (None, 9, 9), (5, 9, 5), (10, 9, 9), (10.0, 0, 10)]
)
def test_the_smaller_output_limit_counts(asked: float | None, cap: int, got: int | None) -> None:
    members = {} if asked is None else {"maxOutputBytes": asked}
    request = parsed(RequestBounds(max_output_bytes=cap), **members)
    assert request.max_output_bytes == got
    assert request.max_output_bytes is None or isinstance(request.max_output_bytes, int)


def test_a_request_without_a_timeout_gets_the_default() -> None:
    assert parsed(RequestBounds(default_timeout_seconds=7)).timeout_seconds == 7


@pytest.mark.parametrize("body", [b"", b" ", b"{", b"command=ls", b"{'command': ['ls']}", b"\xef\xbb\xbf{}", b"{} {}"])
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    assert refused(body).detail.startswith("the body must be a JSON object")


@pytest.mark.parametrize("body", [b"[]", b'"ls"', b"1", b"null", b"true", b'["ls"]'])
def test_a_body_that_is_not_an_object_is_refused(body: bytes) -> None:
    assert "must be a JSON object such as" in refused(body).detail


@pytest.mark.parametrize("body", [b"\xff", b'{"command": ["\xe9"]}', '{"command": ["ls"]}'.encode("utf-16")])
def test_a_body_that_is_not_utf8_is_refused(body: bytes) -> None:
    assert "must be UTF-8; byte" in refused(body).detail


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"command":[', '{"command":{"a":'])
def test_no_depth_of_nesting_is_anything_but_an_invalid_request(opening: str) -> None:
    closing = {"[": "]", "{": "}"}
    limit = sys.getrecursionlimit()
    for depth in [*range(limit - 150, limit + 10), 100_000]:
        ends = "".join(closing[character] for character in reversed(opening) if character in closing)
        refused((opening * depth + "1" + ends * depth).encode())
        body = opening + "[" * depth + "]" * depth + ends
        refused(body.encode())


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"command": ["a"], "command": ["b"]}', '"command"'),
        (b'{"command": ["a"], "env": {"A": "1", "A": "2"}}', '"A"'),
        (b'{"command": ["a"], "x": [{"y": {"z": 1, "z": 1}}]}', '"z"'),
        (b'{"command": ["a"], "env": {"A": "1", "\\u0041": "2"}}', '"A"'),
        (b'{"command": ["a"], "\\ud800": 1, "\\ud800": 2}', '"\\ud800"'),
    ],
)
def test_a_name_given_twice_is_refused_at_any_depth(body: bytes, name: str) -> None:
    assert refused(body).detail == f"the body names a member twice: {name}"


def test_finding_a_name_given_twice_among_many_takes_no_time() -> None:
    names = [*range(300_000), 299_999]
    body = "{" + ",".join(f'"{name}":0' for name in names) + "}"
    assert '"299999"' in refused(body.encode()).detail


def test_a_missing_command_is_named() -> None:
    error = refused({"cwd": "/"})
    assert error.detail == 'command: required: a non-empty array of strings such as ["ls", "-l"]'
    assert error.extra == {"member": "command"}


def test_an_unknown_member_is_named_with_those_there_are() -> None:
    error = refused({"command": ["ls"], "timeout": 5})
    assert error.extra == {"member": "timeout"}
    assert error.detail.startswith("timeout: unknown member; a request has command, cwd, env, stdin, stdinBase64, ")


@pytest.mark.parametrize("name", ["", "\ud800", "x" * 5000, "a\nb", '"'])
def test_an_odd_unknown_member_is_shown_safely(name: str) -> None:
    error = refused({"command": ["ls"], name: 5})
    assert "unknown member" in error.detail
    assert error.detail.isascii() or "…" in error.detail


@pytest.mark.parametrize("value", [None, "ls", {}, [], 1, True])
def test_a_command_must_be_a_list_with_something_in_it(value: Any) -> None:
    assert "must be a non-empty array of strings" in refused_member("command", value)


@pytest.mark.parametrize("item", [None, 1, 1.5, True, [], {}, ["ls"]])
def test_an_argument_must_be_a_string(item: Any) -> None:
    assert refused_member("command", ["ls", item]).startswith("command[1]: must be a string, not ")


def test_a_program_must_have_a_name() -> None:
    assert refused_member("command", ["", "x"]) == 'command[0]: must name a program, not ""'


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("command", ["a\0b"]),
        ("cwd", "/\0"),
        ("env", {"A": "\0"}),
        ("stdin", "\0"),
        ("stdinBase64", "AAA=\0"),
    ],
)
def test_a_nul_character_is_refused_in_any_string(member: str, value: Any) -> None:
    assert "must not hold a NUL character" in refused_member(member, value)


@pytest.mark.parametrize(
    ("member", "value"), [("command", ["\ud800"]), ("cwd", "/\udfff"), ("env", {"A": "\ud800"}), ("stdin", "\ude00x")]
)
def test_half_of_a_surrogate_pair_is_refused(member: str, value: Any) -> None:
    assert "must be valid Unicode" in refused_member(member, value)


@pytest.mark.parametrize("path", ["", ".", "work", "./work", "~", " /"])
def test_a_relative_working_directory_is_refused(path: str) -> None:
    assert "must be an absolute path" in refused_member("cwd", path)


@pytest.mark.parametrize("member", ["cwd", "stdin", "stdinBase64"])
@pytest.mark.parametrize("value", [None, 1, True, ["/"], {}])
def test_text_must_be_a_string(member: str, value: Any) -> None:
    assert "must be a string" in refused_member(member, value)


@pytest.mark.parametrize("value", [None, [], "A=1", 1, True])
def test_the_environment_must_be_an_object(value: Any) -> None:
    assert "must be an object of strings" in refused_member("env", value)


@pytest.mark.parametrize("value", [None, 1, True, ["x"], {}])
def test_the_environments_values_must_be_strings(value: Any) -> None:
    assert refused_member("env", {"A": value}) == "env.A: must be a string"


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A.B", "A=B", "A B", "Ä", "A\n", "A\0"])
def test_the_environments_names_are_checked(name: str) -> None:
    assert refused_member("env", {name: "x"}).startswith("env: names must match [A-Za-z_][A-Za-z0-9_]*, not ")


def test_the_variable_by_which_processes_are_found_is_reserved() -> None:
    assert "is reserved" in refused_member("env", {"SESSION_PROXY_EXEC_ID": "x"})


def test_stdin_can_be_given_only_once() -> None:
    error = refused({"command": ["cat"], "stdin": "x", "stdinBase64": "eA=="})
    assert error.detail == "stdinBase64: give stdin or stdinBase64, not both"


@pytest.mark.parametrize("text", ["x", "eA", "eA=", "eA===", "e A=", "eA==\n", "_-8=", "ä", "=", "eA==eA=="])
def test_base64_must_be_standard_with_padding(text: str) -> None:
    assert "must be standard base64" in refused_member("stdinBase64", text)


@pytest.mark.parametrize("member", ["timeoutSeconds", "idleTimeoutSeconds"])
@pytest.mark.parametrize("value", ["0", "-0.0", "-1", "1e-999", "3600.001", "1e999", "-1e999", "1e308", "9" * 400])
def test_a_time_out_of_range_is_refused_and_the_maximum_named(member: str, value: str) -> None:
    detail = refused(f'{{"command": ["ls"], "{member}": {value}}}'.encode()).detail
    assert detail.startswith(f"{member}: must be a number of seconds greater than 0 and at most 3600")
    assert "EXEC_TIMEOUT_MAX_SECONDS" in detail


@pytest.mark.parametrize("member", ["timeoutSeconds", "idleTimeoutSeconds"])
@pytest.mark.parametrize("value", [True, False, None, "5", [5], {}])
def test_a_time_must_be_a_number(member: str, value: Any) -> None:
    assert "must be a number of seconds" in refused_member(member, value)


@pytest.mark.parametrize("value", [0.001, 1, 3600, 3600.0])
def test_a_time_within_range_is_taken(value: float) -> None:
    request = parsed(timeoutSeconds=value, idleTimeoutSeconds=value)
    assert request.timeout_seconds == request.idle_timeout_seconds == value


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_json_are_refused(constant: str) -> None:
    body = f'{{"command": ["ls"], "timeoutSeconds": {constant}}}'
    assert f"{constant} is not JSON" in refused(body.encode()).detail


def test_a_number_with_more_digits_than_can_be_read_is_refused() -> None:
    body = f'{{"command": ["ls"], "timeoutSeconds": {"9" * 10_000}}}'
    assert refused(body.encode()).detail.startswith("the body must be a JSON object: ")


@pytest.mark.parametrize("value", [0, -1, 1.5, "5", True, None, [], {}, -1e308])
def test_an_output_limit_must_be_a_positive_integer(value: Any) -> None:
    assert "must be an integer greater than 0" in refused_member("maxOutputBytes", value)


def test_an_endless_output_limit_is_refused() -> None:
    assert "must be an integer" in refused(b'{"command": ["ls"], "maxOutputBytes": 1e999}').detail


@pytest.mark.parametrize("text", ["x" * LONGEST, "ü" * (LONGEST // 2)])
def test_the_longest_argument_linux_takes_is_taken(text: str) -> None:
    assert parsed(command=["a", text], cwd="/" + text[:-1]).command[1] == text
    assert parsed(env={"A": text[:-2]}).env == {"A": text[:-2]}


@pytest.mark.parametrize(
    ("member", "where", "value"),
    [
        ("command", "command[1]", ["a", "x" * (LONGEST + 1)]),
        ("command", "command[1]", ["a", "ü" * (LONGEST // 2 + 1)]),
        ("command", "command[0]", ["x" * (LONGEST + 1)]),
        ("cwd", "cwd", "/" * (LONGEST + 1)),
        ("env", "env.A", {"A": "x" * (LONGEST - 1)}),
    ],
)
def test_a_longer_argument_is_refused_and_points_to_stdin(member: str, where: str, value: Any) -> None:
    detail = refused_member(member, value)
    assert detail.startswith(f"{where}: is {LONGEST + 1} bytes long; Linux takes at most {LONGEST} in one argument")
    assert "as stdin instead" in detail


def test_too_many_members_of_command_and_environment_are_refused() -> None:
    assert len(parsed(command=["a"] * MAX_ENTRIES).command) == MAX_ENTRIES
    assert "at most" in refused({"command": ["a"] * MAX_ENTRIES, "env": {"A": ""}}).detail


@pytest.mark.parametrize("member", [{"cwd": "/"}, {"env": {"A": "1"}}, {"env": {}}])
def test_without_the_wrapper_there_is_no_working_directory_and_no_environment(member: dict[str, Any]) -> None:
    bare = RequestBounds(wrapped=False)
    (name,) = member
    assert "not available with WRAPPER=none" in refused_member(name, member[name], bare)
    assert parsed(bare, stdin="x").stdin == b"x"


@pytest.mark.parametrize(
    "body",
    [
        {"command": ["a"], "env": SECRET},
        {"command": ["a"], "env": [SECRET]},
        {"command": ["a"], "env": {"A": [SECRET]}},
        {"command": ["a"], "env": {"A": SECRET + "\0"}},
        {"command": ["a"], "env": {"A": SECRET + "\ud800"}},
        {"command": ["a"], "env": {"A": SECRET + "x" * LONGEST}},
        {"command": ["a"], "env": {"A": SECRET, "1": SECRET}},
        {"command": ["a"], "env": {"A": SECRET, "SESSION_PROXY_EXEC_ID": SECRET}},
        {"command": ["a"], "stdin": [SECRET]},
        {"command": ["a"], "stdin": SECRET + "\0"},
        {"command": ["a"], "stdin": SECRET + "\ud800"},
        {"command": ["a"], "stdinBase64": SECRET + "!"},
        {"command": ["a"], "stdinBase64": {"x": SECRET}},
        {"command": ["a"], "stdin": SECRET, "stdinBase64": SECRET},
        {"command": ["a"], "Env": {"A": SECRET}},
        {"env": {"A": SECRET}},
        [{"env": {"A": SECRET}}],
        [SECRET],
        SECRET,
    ],
)
def test_no_secret_is_repeated(body: Any) -> None:
    for bounds in (BOUNDS, RequestBounds(wrapped=False)):
        error = refused(json.dumps(body).encode(), bounds)
        assert SECRET not in error.detail
        assert SECRET not in repr(error.extra)


@pytest.mark.parametrize("tail", [b"", b"}", b',"stdin":}', b"\xff"])
def test_no_secret_of_a_broken_body_is_repeated(tail: bytes) -> None:
    assert SECRET not in refused(b'{"command": ["a"], "env": {"A": "' + SECRET.encode() + b'"' + tail).detail


def test_a_long_wrong_value_is_shortened() -> None:
    detail = refused_member("command", "x" * 10_000)
    assert "x" * 50 in detail
    assert "…" in detail


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_texts = st.text(max_size=6)
_requests = st.fixed_dictionaries(
    {"command": st.lists(_texts, min_size=1, max_size=3) | _json},
    optional={
        "cwd": _texts.map("/{}".format) | _json,
        "env": st.dictionaries(st.sampled_from(["A", "_b", "PATH"]) | _texts, _texts | _json, max_size=3) | _json,
        "stdin": _texts | _json,
        "stdinBase64": st.binary(max_size=8).map(lambda data: base64.b64encode(data).decode()) | _json,
        "timeoutSeconds": st.floats(0, 4000) | _json,
        "idleTimeoutSeconds": st.integers(0, 4000) | _json,
        "maxOutputBytes": st.integers(-2, 10) | _json,
        "other": _json,
    },
)


def check_request(body: bytes) -> None:
    """Nothing but an InvalidRequestError may be raised, and what is accepted must be what was said."""
    try:
        request = parse_request(body, BOUNDS)
    except InvalidRequestError:
        return
    members = json.loads(body)
    assert list(request.command) == members["command"]
    assert request.command[0]
    assert not any("\0" in text for text in [*request.command, *request.env.values(), request.cwd or ""])
    assert 0 < request.timeout_seconds <= BOUNDS.max_timeout_seconds
    assert request.timeout_seconds == members.get("timeoutSeconds", BOUNDS.default_timeout_seconds)
    assert request.idle_timeout_seconds == members.get("idleTimeoutSeconds")
    assert request.max_output_bytes == members.get("maxOutputBytes")
    assert request.env == members.get("env", {})
    assert request.cwd == members.get("cwd")
    if "stdinBase64" in members:
        assert request.stdin == base64.b64decode(members["stdinBase64"])
    else:
        assert (request.stdin.decode() if request.stdin is not None else None) == members.get("stdin")


@settings(max_examples=150)
@given(st.binary(max_size=100) | _json.map(lambda value: json.dumps(value).encode()))
@example(b'{"command": ["a"], "timeoutSeconds": 1e999}')
def test_arbitrary_bodies_raise_nothing_but_an_invalid_request(body: bytes) -> None:
    check_request(body)


@settings(max_examples=200)
@given(_requests)
def test_arbitrary_members_are_read_exactly_or_refused(members: dict[str, Any]) -> None:
    check_request(json.dumps(members).encode())


# --- events ---------------------------------------------------------------------------------------------------------

START = Start(id="0123456789abcdef", pod="ws", pod_uid="u-1", container="workspace", time="2025-01-01T00:00:00.000Z")


def an_exit(**values: Any) -> Exit:
    usual: dict[str, Any] = {
        "outcome": "exited",
        "exit_code": 0,
        "error": None,
        "reason": None,
        "duration_ms": 1,
        "stdout_bytes": 0,
        "stderr_bytes": 0,
        "reaped": None,
    }
    return Exit(**usual | values)


def server_sent(body: bytes) -> list[dict[str, str]]:
    """Parse a stream by the algorithm of WHATWG HTML, section 9.2.6."""
    events: list[dict[str, str]] = []
    data, name, last_id = "", "", ""
    for line in re.split("\r\n|\n|\r", body.decode("utf-8").removeprefix("\ufeff")):
        if not line:
            if data:
                events.append({"id": last_id, "event": name or "message", "data": data.removesuffix("\n")})
            data, name = "", ""
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            last_id = value
    return events


def events_of(encoder: Encoder, body: bytes) -> list[dict[str, Any]]:
    assert body.isascii()
    if isinstance(encoder, NdjsonEncoder):
        assert body.endswith(b"\n")
        return [json.loads(line) for line in body.removesuffix(b"\n").split(b"\n")]
    events = []
    for item in server_sent(body):
        event = json.loads(item["data"])
        assert item["event"] == event["event"]
        assert item["id"] == str(event["seq"])
        events.append(event)
    return events


def data_of(event: Mapping[str, Any]) -> bytes:
    assert ("text" in event) != ("base64" in event)
    return base64.b64decode(event["base64"], validate=True) if "base64" in event else event["text"].encode()


_fragments = st.one_of(
    st.binary(max_size=6),
    st.text(max_size=4).map(str.encode),
    st.sampled_from([b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"\n", b"\r\n\r\n"]),
)
_steps = st.lists(st.tuples(st.sampled_from(["stdout", "stderr", "ping"]), _fragments), max_size=15)


@pytest.mark.parametrize("make", [NdjsonEncoder, SseEncoder])
@settings(max_examples=200)
@given(steps=_steps)
def test_joining_the_data_of_a_stream_gives_back_its_bytes(make: type[Encoder], steps: list[tuple[str, bytes]]) -> None:
    encoder = make()
    pieces = [encoder.start(START)]
    pieces += [encoder.ping() if stream == "ping" else encoder.output(stream, data) for stream, data in steps]
    body = b"".join([*pieces, encoder.exit(an_exit())])
    events = events_of(encoder, body)
    assert [event["seq"] for event in events] == list(range(len(events)))
    names = [event["event"] for event in events]
    assert names[0] == "start"
    assert names[-1] == "exit"
    assert names.count("start") == names.count("exit") == 1
    assert names.count("ping") == [stream for stream, _ in steps].count("ping")
    for stream in ("stdout", "stderr"):
        printed = b"".join(data for name, data in steps if name == stream)
        assert b"".join(data_of(event) for event in events if event["event"] == stream) == printed
        assert all(data_of(event) for event in events if event["event"] == stream)


@pytest.mark.parametrize("make", [NdjsonEncoder, SseEncoder])
@settings(max_examples=100)
@given(texts=st.tuples(st.text(), st.text()), cuts=st.lists(st.integers(0, 1), min_size=1))
def test_a_character_split_over_frames_is_never_broken(
    make: type[Encoder], texts: tuple[str, str], cuts: list[int]
) -> None:
    encoder = make()
    left = {"stdout": texts[0].encode(), "stderr": texts[1].encode()}
    pieces = [encoder.start(START)]
    at = 0
    while left["stdout"] or left["stderr"]:
        stream = ("stdout", "stderr")[cuts[at % len(cuts)]]
        stream = stream if left[stream] else ("stderr" if stream == "stdout" else "stdout")
        size = 1 + at % 3
        pieces.append(encoder.output(stream, left[stream][:size]))
        left[stream] = left[stream][size:]
        at += 1
    events = events_of(encoder, b"".join([*pieces, encoder.exit(an_exit())]))
    assert not [event for event in events if "base64" in event]
    for stream, text in zip(("stdout", "stderr"), texts, strict=True):
        assert "".join(event["text"] for event in events if event["event"] == stream) == text


def test_output_is_passed_on_at_once_but_for_an_unfinished_character() -> None:
    encoder = NdjsonEncoder()
    encoder.start(START)
    assert json.loads(encoder.output("stdout", b"caf\xc3"))["text"] == "caf"
    assert encoder.output("stderr", b"\xf0\x9f\x98") == b""
    assert json.loads(encoder.output("stdout", b"\xa9"))["text"] == "é"
    held, exit_line = encoder.exit(an_exit()).splitlines()
    assert json.loads(held) == {"event": "stderr", "seq": 3, "base64": base64.b64encode(b"\xf0\x9f\x98").decode()}
    assert json.loads(exit_line)["seq"] == 4


def test_output_that_is_not_utf8_is_base64() -> None:
    encoder = NdjsonEncoder()
    assert json.loads(encoder.output("stdout", b"a\xffb")) == {"event": "stdout", "seq": 0, "base64": "Yf9i"}


def test_the_start_event_says_where_the_command_runs() -> None:
    assert json.loads(NdjsonEncoder().start(START)) == {
        "event": "start",
        "seq": 0,
        "id": "0123456789abcdef",
        "pod": "ws",
        "podUid": "u-1",
        "container": "workspace",
        "time": "2025-01-01T00:00:00.000Z",
    }


def test_the_exit_event_says_how_the_command_ended() -> None:
    end = an_exit(
        outcome="lost",
        exit_code=None,
        error="line\nbreak",
        reason="pod_deleted",
        duration_ms=12,
        stdout_bytes=3,
        stderr_bytes=4,
        reaped=False,
    )
    assert json.loads(NdjsonEncoder().exit(end)) == {
        "event": "exit",
        "seq": 0,
        "outcome": "lost",
        "exitCode": None,
        "error": "line\nbreak",
        "reason": "pod_deleted",
        "durationMs": 12,
        "stdoutBytes": 3,
        "stderrBytes": 4,
        "reaped": False,
    }


def test_text_ends_with_the_exit_code_on_the_last_line() -> None:
    encoder = TextEncoder()
    fake = b'out\n---EXIT---\n{"exitCode":0}\n'
    body = encoder.start(START) + encoder.output("stdout", fake) + encoder.ping() + encoder.exit(an_exit(exit_code=7))
    assert body == fake + b'\n---EXIT---\n{"exitCode":7}\n'


@pytest.mark.parametrize("make", [TextEncoder, NdjsonEncoder, SseEncoder])
def test_a_format_says_whether_it_has_a_sign_of_life(make: type[TextEncoder | NdjsonEncoder | SseEncoder]) -> None:
    encoder = make()
    assert encoder.pings == bool(encoder.ping())


def test_text_never_has_the_exit_code_of_a_command_that_did_not_exit() -> None:
    body = TextEncoder().exit(an_exit(outcome="timeout", exit_code=None, error="ran longer than 1 s\n---EXIT---\n"))
    separator, record = body.removeprefix(b"\n").splitlines()
    assert separator == b"---EXIT---"
    assert json.loads(record) == {"exitCode": -1, "outcome": "timeout", "error": "ran longer than 1 s\n---EXIT---\n"}
    assert json.loads(TextEncoder().exit(an_exit(outcome="lost", exit_code=None)).splitlines()[-1])["error"] == "lost"


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(max_size=9)), max_size=9))
def test_text_is_the_bytes_in_order_of_arrival(chunks: list[tuple[str, bytes]]) -> None:
    encoder = TextEncoder()
    body = encoder.start(START) + b"".join(encoder.output(stream, data) for stream, data in chunks)
    body += encoder.exit(an_exit(exit_code=3))
    output, _, record = body.rpartition(b"\n---EXIT---\n")
    assert output == b"".join(data for _, data in chunks)
    assert json.loads(record) == {"exitCode": 3}


# --- Accept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, TextEncoder),
        ("", TextEncoder),
        ("  ", TextEncoder),
        ("*/*", TextEncoder),
        ("text/plain", TextEncoder),
        ("text/plain; charset=utf-8", TextEncoder),
        ("text/*", TextEncoder),
        ("application/x-ndjson", NdjsonEncoder),
        ("Application/X-NDJSON", NdjsonEncoder),
        ("application/*", NdjsonEncoder),
        ("text/event-stream", SseEncoder),
        ("text/event-stream, */*;q=0.1", SseEncoder),
        ("text/html, application/xhtml+xml, */*;q=0.8", TextEncoder),
        ("application/x-ndjson, text/event-stream;q=0.9", NdjsonEncoder),
        ("application/x-ndjson;q=0.5, text/event-stream;q=0.9", SseEncoder),
        ("text/plain;q=0, text/*", SseEncoder),
        ("text/*;q=0, */*", NdjsonEncoder),
        ("*/*;q=0, text/event-stream", SseEncoder),
        ("text/plain;q=0, text/event-stream;q=0, */*;q=0.001", NdjsonEncoder),
        ("application/x-ndjson ; q=1.0", NdjsonEncoder),
        ("text/plain;q=0.5;q=0.5, application/x-ndjson;Q=0.4", TextEncoder),
        ("application/json, application/x-ndjson", NdjsonEncoder),
        ("text/plain, application/x-ndjson", TextEncoder),
        (",, application/x-ndjson ,", NdjsonEncoder),
    ],
)
def test_accept_chooses_the_format(accept: str | None, expected: type[Encoder]) -> None:
    assert type(encoder_for(accept)) is expected


@pytest.mark.parametrize(
    "accept",
    [
        "application/json",
        "text/html",
        "image/*",
        "*/*;q=0",
        "text/plain;q=0",
        "text/plain;q=x",
        "text/plain;q=nan",
        "text/plain;q=2",
        "text/plain;q=-1",
        "text",
        "*",
        ";q=1",
        "plain/text",
    ],
)
def test_an_accept_that_nothing_matches_is_refused_with_what_there_is(accept: str) -> None:
    with pytest.raises(NotAcceptableError, match="text/plain, application/x-ndjson, text/event-stream"):
        encoder_for(accept)


@settings(max_examples=200)
@given(st.text(max_size=30) | st.from_regex(r"([a-z*]{1,5}/[a-z*]{1,5}(; ?q=[0-9.]{0,4})?,? ?){1,3}", fullmatch=True))
def test_an_arbitrary_accept_raises_nothing_but_not_acceptable(accept: str) -> None:
    try:
        encoder = encoder_for(accept)
    except NotAcceptableError:
        return
    assert encoder.content_type.partition(";")[0] in ("text/plain", "application/x-ndjson", "text/event-stream")


def test_each_format_names_its_content_type() -> None:
    assert TextEncoder().content_type == "text/plain; charset=utf-8"
    assert NdjsonEncoder().content_type == "application/x-ndjson"
    assert SseEncoder().content_type == "text/event-stream; charset=utf-8"
