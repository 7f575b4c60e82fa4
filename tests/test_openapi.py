"""The OpenAPI document: valid, and true of what the daemon takes and sends."""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from conftest import Daemon
from hypothesis import given, settings
from hypothesis import strategies as st

from session_proxy import errors
from session_proxy.app import STATUS_BY_REASON, problem
from session_proxy.errors import InvalidRequestError, RefusedError, Violation
from session_proxy.execution import Outcome
from session_proxy.openapi import OUTCOMES, document
from session_proxy.wire import Exit, NdjsonEncoder, RequestBounds, Start, parse_request

BOUNDS = RequestBounds()
DOCUMENT = document(BOUNDS, 4_194_304, STATUS_BY_REASON)


def validator(name: str, of: Mapping[str, Any] = DOCUMENT) -> jsonschema_rs.Validator:
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": of["components"]}, validate_formats=True
    )


def nodes(value: Any) -> Iterator[Any]:
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from nodes(child)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_document_is_valid_openapi_31(wrapped: bool) -> None:
    found = document(RequestBounds(wrapped=wrapped), 1024, STATUS_BY_REASON)
    assert found["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(json.loads(json.dumps(found))).validate()


def test_the_validity_check_itself_can_fail() -> None:
    broken = {**DOCUMENT, "paths": {"/exec": {"post": {"responses": {"200": {}}, "parameters": [{"name": "x"}]}}}}
    with pytest.raises(jsonschema_rs.ValidationError):
        schemathesis.openapi.from_dict(broken).validate()


@pytest.mark.parametrize("name", sorted(DOCUMENT["components"]["schemas"]))
def test_each_schema_is_a_json_schema_and_refuses_something(name: str) -> None:
    jsonschema_rs.meta.validate(DOCUMENT["components"]["schemas"][name])
    wrong: list[Any] = [None, 7, "text", [], {"unheard": "of"}]
    assert not any(validator(name).is_valid(value) for value in wrong)


def test_every_reference_leads_somewhere() -> None:
    references = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node, dict) and "$ref" in node}
    assert references
    for reference in references:
        assert reference.removeprefix("#/components/schemas/") in DOCUMENT["components"]["schemas"]


def test_every_route_is_documented_with_a_name_of_its_own() -> None:
    operations = {
        f"{method.upper()} {path}": operation
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }
    assert set(operations) == {
        "POST /exec",
        "GET /execs",
        "GET /execs/{id}",
        "DELETE /execs/{id}",
        "GET /workspace",
        "GET /limits",
        "GET /livez",
        "GET /readyz",
        "GET /health",
        "GET /metrics",
        "GET /openapi.json",
    }
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    assert all(operation["summary"] and operation["responses"] for operation in operations.values())


GOOD_BODIES: list[dict[str, Any]] = [
    {"command": ["ls"]},
    {"command": ["ls", "", "-l", "a\nb", "ü"]},
    {"command": ["cat"], "stdin": ""},
    {"command": ["cat"], "stdinBase64": "AAEC"},
    {
        "command": ["env"],
        "cwd": "/work\nspace",
        "env": {"_A9": "x\ny", "B": ""},
        "timeoutSeconds": 0.5,
        "idleTimeoutSeconds": 3600,
        "maxOutputBytes": 1,
    },
]

BAD_BODIES: list[Any] = [
    None,
    [],
    "ls",
    {},
    {"command": []},
    {"command": "ls"},
    {"command": [1]},
    {"command": ["ls", None]},
    {"command": [""]},
    {"command": ["a\0"]},
    {"command": ["a", "b\0"]},
    {"command": ["a"], "Command": ["b"]},
    {"command": ["a"], "cwd": "work"},
    {"command": ["a"], "cwd": "/\0"},
    {"command": ["a"], "cwd": None},
    {"command": ["a"], "env": []},
    {"command": ["a"], "env": {"A": 1}},
    {"command": ["a"], "env": {"A": "\0"}},
    {"command": ["a"], "env": {"A-B": "x"}},
    {"command": ["a"], "env": {"1": "x"}},
    {"command": ["a"], "env": {"SESSION_PROXY_EXEC_ID": "x"}},
    {"command": ["a"], "stdin": "x", "stdinBase64": "eA=="},
    {"command": ["a"], "stdin": "\0"},
    {"command": ["a"], "timeoutSeconds": 0},
    {"command": ["a"], "timeoutSeconds": 3601},
    {"command": ["a"], "timeoutSeconds": "5"},
    {"command": ["a"], "timeoutSeconds": True},
    {"command": ["a"], "idleTimeoutSeconds": -1},
    {"command": ["a"], "maxOutputBytes": 0},
    {"command": ["a"], "maxOutputBytes": 1.5},
]


@pytest.mark.parametrize("body", GOOD_BODIES)
def test_a_body_that_the_daemon_takes_is_one_by_the_document(body: Any) -> None:
    parse_request(json.dumps(body).encode(), BOUNDS)
    validator("ExecRequest").validate(body)


@pytest.mark.parametrize("body", BAD_BODIES)
def test_a_body_that_the_daemon_refuses_is_none_by_the_document(body: Any) -> None:
    with pytest.raises(InvalidRequestError):
        parse_request(json.dumps(body).encode(), BOUNDS)
    assert not validator("ExecRequest").is_valid(body)


def test_without_the_wrapper_the_document_has_no_working_directory_and_no_environment() -> None:
    bare = document(RequestBounds(wrapped=False), 1024, STATUS_BY_REASON)
    for body in ({"command": ["a"], "cwd": "/"}, {"command": ["a"], "env": {"A": "x"}}):
        assert validator("ExecRequest").is_valid(body)
        assert not validator("ExecRequest", bare).is_valid(body)


def test_the_bounds_in_force_are_in_the_document() -> None:
    found = document(RequestBounds(default_timeout_seconds=5, max_timeout_seconds=9), 2048, STATUS_BY_REASON)
    properties = found["components"]["schemas"]["ExecRequest"]["properties"]
    assert properties["timeoutSeconds"]["maximum"] == properties["idleTimeoutSeconds"]["maximum"] == 9
    assert properties["timeoutSeconds"]["default"] == 5
    assert "2048" in found["paths"]["/exec"]["post"]["requestBody"]["description"]


_anything = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_bodies = st.fixed_dictionaries(
    {"command": st.lists(st.text(), max_size=2) | _anything},
    optional={
        "cwd": st.text().map("/{}".format) | _anything,
        "env": st.dictionaries(st.sampled_from(["A", "_", "A-", "9"]) | st.text(), st.text(), max_size=2) | _anything,
        "stdin": _anything,
        "stdinBase64": st.binary().map(lambda data: base64.b64encode(data).decode()) | st.integers(),
        "timeoutSeconds": st.floats(0, 4000) | _anything,
        "idleTimeoutSeconds": st.integers(-1, 4000) | _anything,
        "maxOutputBytes": st.integers(-1, 9) | _anything,
        "other": st.none(),
    },
)
_EXEC_REQUEST = validator("ExecRequest")


@settings(max_examples=100, deadline=None)
@given(_bodies)
def test_the_document_and_the_parser_agree_on_any_body(body: dict[str, Any]) -> None:
    text = json.dumps(body)
    try:
        parse_request(text.encode(), BOUNDS)
        taken = True
    except InvalidRequestError:
        taken = False
    assert _EXEC_REQUEST.is_valid(body) == taken


START = Start(id="0123456789abcdef", pod="ws", pod_uid="u", container="workspace", time="2025-01-01T00:00:00.000Z")


def an_exit(outcome: str, exit_code: int | None, reaped: bool | None) -> Exit:
    return Exit(outcome, exit_code, None if exit_code == 0 else "why", None, 1, 2, 3, reaped)


def encoded() -> list[dict[str, Any]]:
    """Return real events of every kind."""
    encoder = NdjsonEncoder()
    body = encoder.start(START)
    body += encoder.output("stdout", b"text") + encoder.output("stderr", b"\xff") + encoder.ping()
    body += encoder.output("stdout", b"\xc3")
    body += b"".join(encoder.exit(an_exit(outcome, None, False)) for outcome in OUTCOMES if outcome != "exited")
    body += encoder.exit(an_exit("exited", 0, None)) + encoder.exit(an_exit("exited", 255, True))
    return [json.loads(line) for line in body.splitlines()]


@pytest.mark.parametrize("event", encoded(), ids=lambda event: f"{event['seq']}-{event['event']}")
def test_each_real_event_is_one_by_the_document_and_its_members_are_all_needed(event: dict[str, Any]) -> None:
    validator("Event").validate(event)
    for member in event:
        assert not validator("Event").is_valid({name: value for name, value in event.items() if name != member})


@pytest.mark.parametrize(
    "event",
    [
        {"event": "stdout", "seq": 1, "text": "a", "base64": "YQ=="},
        {"event": "stdin", "seq": 1, "text": "a"},
        {"event": "ping", "seq": -1},
        json.loads(NdjsonEncoder().exit(an_exit("exited", 256, None))),
        json.loads(NdjsonEncoder().exit(an_exit("crashed", None, None))),
    ],
)
def test_an_event_that_is_never_sent_is_none_by_the_document(event: dict[str, Any]) -> None:
    assert not validator("Event").is_valid(event)


def test_the_outcomes_are_those_of_the_executor() -> None:
    assert set(OUTCOMES) == set(Outcome)


def refusals() -> list[type[RefusedError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RefusedError)]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("kind", refusals())
def test_each_refusal_has_a_status_and_is_a_problem_by_the_document(kind: type[RefusedError]) -> None:
    violation = Violation("spec.hostPID", "true", "false", "hostNamespaces", "host namespaces (hostPID=true)")
    error = kind("why", violations=[violation], retry_after=0.2, extra={"member": "cwd"})
    response = problem(error, "0123")
    assert response.text is not None
    body = json.loads(response.text)
    validator("Problem").validate(body)
    assert body["status"] == response.status == STATUS_BY_REASON[kind.reason]
    assert body["violations"] == [violation.to_json()]
    assert response.headers["Retry-After"] == "1"


def test_every_reason_that_has_a_status_is_raised_by_some_error() -> None:
    assert {kind.reason for kind in refusals()} == set(STATUS_BY_REASON)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/limits", "Limits"),
        ("/workspace", "Workspace"),
        ("/livez", "Health"),
        ("/health", "Health"),
        ("/readyz", "Readiness"),
    ],
)
async def test_the_answers_of_a_daemon_are_as_documented(daemon: Daemon, path: str, name: str) -> None:
    status, body = await daemon.get(path)
    assert status == 200
    validator(name).validate(body)
    schema = DOCUMENT["components"]["schemas"][name]
    assert set(body) == set(schema["properties"])


async def test_an_exec_is_described_as_documented_while_it_runs_and_after(daemon: Daemon) -> None:
    stream = await daemon.open("cat", stdin="x")
    validator("Exec").validate(await daemon.exec_of(stream.id))
    await stream.rest()
    ended = await daemon.exec_of(stream.id)
    validator("Exec").validate(ended)
    assert set(ended) == set(DOCUMENT["components"]["schemas"]["Exec"]["properties"])


async def test_the_document_of_a_daemon_is_this_one(daemon: Daemon) -> None:
    status, body = await daemon.get("/openapi.json")
    assert status == 200
    assert body == json.loads(json.dumps(DOCUMENT))


def test_a_token_that_is_demanded_is_in_the_document() -> None:
    found = document(RequestBounds(), 1024, STATUS_BY_REASON, bearer=True)
    assert found["security"] == [{"bearer": []}]
    assert found["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert "security" not in DOCUMENT
