"""The OpenAPI 3.1 document of the HTTP interface, with the bounds that are in force."""

from collections.abc import Mapping
from typing import Any

from session_proxy import __version__
from session_proxy.wire import NDJSON, SSE, TEXT, RequestBounds
from session_proxy.wrapper import EXEC_ID_VARIABLE

Json = dict[str, Any]

OUTCOMES = ("exited", "failed", "timeout", "idle_timeout", "output_limit", "cancelled", "lost", "shutdown")

_NO_NUL = "^[^\\u0000]*$"


def _nullable(kind: str, **more: Any) -> Json:
    return {"type": [kind, "null"], **more}


def _object(properties: Mapping[str, Any], *, required: tuple[str, ...] | None = None, **more: Any) -> Json:
    needed = list(properties if required is None else required)
    return {"type": "object", "properties": dict(properties), "required": needed, **more}


def _exec_request(bounds: RequestBounds) -> Json:
    seconds = {"type": "number", "exclusiveMinimum": 0, "maximum": bounds.max_timeout_seconds}
    properties: Json = {
        "command": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "pattern": _NO_NUL},
            "prefixItems": [{"type": "string", "minLength": 1, "pattern": _NO_NUL}],
            "description": "argv, passed as it is; no shell expands it. One argument has at most 131071 bytes.",
        },
        "stdin": {"type": "string", "pattern": _NO_NUL, "description": "standard input, then end of file"},
        "stdinBase64": {
            "type": "string",
            "contentEncoding": "base64",
            "pattern": "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
            "description": "the same, for any bytes",
        },
        "timeoutSeconds": {**seconds, "default": bounds.default_timeout_seconds},
        "idleTimeoutSeconds": {**seconds, "description": "ends the command when it prints nothing for so long"},
        "maxOutputBytes": {"type": "integer", "minimum": 1, "description": "stdout and stderr together"},
    }
    if bounds.wrapped:
        properties["cwd"] = {"type": "string", "pattern": "^/[^\\u0000]*$", "description": "absolute path"}
        properties["env"] = {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "not": {"const": EXEC_ID_VARIABLE}},
            "additionalProperties": {"type": "string", "pattern": _NO_NUL},
        }
    return _object(
        properties,
        required=("command",),
        additionalProperties=False,
        **{"not": {"required": ["stdin", "stdinBase64"]}},
    )


def _schemas(bounds: RequestBounds, reasons: Mapping[str, int]) -> Json:
    text = {"type": "string"}
    count = {"type": "integer", "minimum": 0}
    violation = _object(dict.fromkeys(("field", "value", "expected", "rule", "message"), text))
    return {
        "ExecRequest": _exec_request(bounds),
        "Event": {
            "description": "One event of a stream. One start, then output and pings, then exactly one exit.",
            "oneOf": [
                {"$ref": f"#/components/schemas/{name}"}
                for name in ("StartEvent", "OutputEvent", "PingEvent", "ExitEvent")
            ],
        },
        "StartEvent": _object(
            {
                "event": {"const": "start"},
                "seq": {"const": 0},
                "id": text,
                "pod": text,
                "podUid": text,
                "container": text,
                "time": {"type": "string", "format": "date-time"},
            }
        ),
        "OutputEvent": _object(
            {
                "event": {"enum": ["stdout", "stderr"]},
                "seq": count,
                "text": text,
                "base64": {"type": "string", "contentEncoding": "base64"},
            },
            required=("event", "seq"),
            oneOf=[{"required": ["text"]}, {"required": ["base64"]}],
        ),
        "PingEvent": _object({"event": {"const": "ping"}, "seq": count}),
        "ExitEvent": _object(
            {
                "event": {"const": "exit"},
                "seq": count,
                "outcome": {"enum": list(OUTCOMES)},
                "exitCode": _nullable("integer", minimum=0, maximum=255),
                "error": _nullable("string"),
                "reason": _nullable("string"),
                "durationMs": count,
                "stdoutBytes": count,
                "stderrBytes": count,
                "reaped": _nullable("boolean"),
            }
        ),
        "Exec": _object(
            {
                "id": text,
                "requestId": text,
                "state": {"enum": ["starting", "running", "ending", "ended"]},
                "program": text,
                "argumentCount": count,
                "pod": _nullable("string"),
                "podUid": _nullable("string"),
                "container": _nullable("string"),
                "created": {"type": "string", "format": "date-time"},
                "durationMs": count,
                "stdoutBytes": count,
                "stderrBytes": count,
                "outcome": {"enum": [*OUTCOMES, None]},
                "exitCode": _nullable("integer"),
                "reason": _nullable("string"),
                "error": _nullable("string"),
                "reaped": _nullable("boolean"),
            }
        ),
        "Workspace": _object(
            {
                "pod": _nullable("string"),
                "podUid": _nullable("string"),
                "namespace": _nullable("string"),
                "node": _nullable("string"),
                "phase": _nullable("string"),
                "container": text,
                "containerId": _nullable("string"),
                "image": _nullable("string"),
                "imageId": _nullable("string"),
                "restartCount": _nullable("integer"),
                "startedAt": _nullable("string"),
                "running": _object({"ok": {"type": "boolean"}, "detail": _nullable("string")}),
                "owner": _object({"ok": {"type": "boolean"}, "mode": text, "detail": _nullable("string")}),
                "policy": _object(
                    {"ok": {"type": "boolean"}, "level": text, "violations": {"type": "array", "items": violation}}
                ),
                "acceptable": {"type": "boolean"},
            }
        ),
        "Limits": _object(
            {
                "maxConcurrentExecs": count,
                "running": count,
                "execRatePerSecond": {"type": "number"},
                "execBurst": count,
                "timeoutSeconds": {"type": "number"},
                "maxTimeoutSeconds": {"type": "number"},
                "maxOutputBytes": {"type": "integer", "description": "0: no limit"},
                "maxRequestBytes": count,
                "maxArgumentBytes": count,
                "heartbeatSeconds": {"type": "number"},
                "stallSeconds": {"type": "number"},
                "killGraceSeconds": {"type": "number"},
                "wrapper": text,
            }
        ),
        "Health": _object({"status": {"const": "ok"}}),
        "Readiness": _object(
            {
                "status": {"enum": ["ok", "unready"]},
                "reasons": {"type": "array", "items": _object({"reason": text, "detail": text})},
            }
        ),
        "Problem": _object(
            {
                "type": text,
                "title": text,
                "status": {"type": "integer", "minimum": 400, "maximum": 599},
                "detail": text,
                "reason": {"enum": list(reasons)},
                "requestId": text,
                "member": text,
                "verb": text,
                "resource": text,
                "violations": {"type": "array", "items": violation},
            },
            required=("type", "title", "status", "detail", "reason", "requestId"),
        ),
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _response(schema: str, description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _refusals(reasons: Mapping[str, int], statuses: set[int]) -> Json:
    """Return the problem responses of a route; those of the gatekeeper are every route's."""
    everywhere = {401, 403, 405, 500}
    found: Json = {}
    for status in sorted((statuses | everywhere) & set(reasons.values())):
        names = ", ".join(reason for reason, code in reasons.items() if code == status)
        found[str(status)] = {
            "description": names,
            "content": {"application/problem+json": {"schema": _ref("Problem")}},
        }
        if status in (429, 502, 503, 504):
            found[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    return found


def document(
    bounds: RequestBounds, max_request_bytes: int, reasons: Mapping[str, int], *, bearer: bool = False
) -> Json:
    """Return the document, complete enough to generate a client from. ``bearer``: whether a token is demanded."""
    kube = {403, 502, 503, 504}
    exec_id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9a-f]{16}$"}}
    headers = {
        "X-Exec-Id": {"required": True, "schema": {"type": "string"}},
        "X-Request-Id": {"required": True, "schema": {"type": "string"}},
        "Cache-Control": {"required": True, "schema": {"const": "no-store"}},
        "X-Content-Type-Options": {"required": True, "schema": {"const": "nosniff"}},
    }
    streams = {
        TEXT: {"schema": {"type": "string", "description": "output, then ---EXIT--- and the record on the last line"}},
        NDJSON: {"schema": {"type": "string", "description": "one Event a line"}},
        SSE: {"schema": {"type": "string", "description": "server-sent events whose data is an Event"}},
    }

    def get(operation: str, summary: str, schema: str, statuses: set[int] = frozenset()) -> Json:  # type: ignore[assignment]
        return {
            "get": {
                "operationId": operation,
                "summary": summary,
                "responses": {"200": _response(schema, summary), **_refusals(reasons, set(statuses))},
            }
        }

    paths: Json = {
        "/exec": {
            "post": {
                "operationId": "exec",
                "summary": "Run a command in the workspace and stream its output",
                "parameters": [
                    {
                        "name": "X-Request-Id",
                        "in": "header",
                        "description": "Taken over when it matches [A-Za-z0-9._:/+=-]{1,128}, else one is made.",
                        "schema": {"type": "string"},
                    }
                ],
                "requestBody": {
                    "required": True,
                    "description": f"At most {max_request_bytes} bytes; no Content-Type is demanded.",
                    "content": {"application/json": {"schema": _ref("ExecRequest")}},
                },
                "responses": {
                    "200": {
                        "description": "The stream; how the command ended is its last event.",
                        "headers": headers,
                        "content": streams,
                    },
                    **_refusals(reasons, {400, 406, 408, 413, 429, *kube}),
                },
            }
        },
        "/execs": {
            "get": {
                "operationId": "listExecs",
                "summary": "The running and recently ended execs",
                "responses": {
                    "200": {
                        "description": "Newest first, the running ones before the ended",
                        "content": {
                            "application/json": {"schema": _object({"execs": {"type": "array", "items": _ref("Exec")}})}
                        },
                    },
                    **_refusals(reasons, set()),
                },
            }
        },
        "/execs/{id}": {
            "parameters": [exec_id],
            "get": {
                "operationId": "showExec",
                "summary": "One exec",
                "responses": {"200": _response("Exec", "The exec"), **_refusals(reasons, {404})},
            },
            "delete": {
                "operationId": "killExec",
                "summary": "Kill an exec: TERM, grace, KILL; its own stream ends with cancelled",
                "responses": {
                    "202": _response("Exec", "It is being killed"),
                    "200": _response("Exec", "It had ended by itself before"),
                    **_refusals(reasons, {404}),
                },
            },
        },
        "/workspace": get("showWorkspace", "The workspace pod and every verdict on it", "Workspace", kube),
        "/limits": get("showLimits", "The limits in force", "Limits"),
        "/livez": get("livez", "Liveness; never depends on the API server", "Health"),
        "/health": get("health", "Alias of /livez", "Health"),
        "/readyz": get("readyz", "Readiness", "Readiness"),
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Prometheus metrics",
                "responses": {
                    "200": {
                        "description": "Text exposition",
                        "content": {"text/plain": {"schema": {"type": "string"}}},
                    },
                    **_refusals(reasons, set()),
                },
            }
        },
        "/openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This document",
                "responses": {
                    "200": {
                        "description": "OpenAPI 3.1",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    },
                    **_refusals(reasons, set()),
                },
            }
        },
    }
    paths["/readyz"]["get"]["responses"]["503"] = _response("Readiness", "Not ready, with the reasons")
    components: Json = {"schemas": _schemas(bounds, reasons)}
    security: Json = {}
    if bearer:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        security = {"security": [{"bearer": []}]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "session-proxy",
            "version": __version__,
            "description": "Runs commands in the workspace pod of this session and streams their output.",
        },
        "paths": paths,
        "components": components,
        **security,
    }
