"""`session up|status|down` against a small API server over real sockets, which refuses, loses and delays on demand."""

import asyncio
import copy
import http
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from session_proxy import kube, session
from session_proxy.cli import main
from session_proxy.errors import KubeUnauthorizedError, KubeUnavailableError
from session_proxy.session import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_NOTHING_THERE, EXIT_UNKNOWN

PATIENCE = 10.0
NAMESPACE = "team"
RBAC = "rbac.authorization.k8s.io"
IMAGES = ("--proxy-image", "p.example/p", "--runner-image", "r.example/r", "--workspace-image", "w.example/w")
ACCESS = ("serviceaccounts/demo-proxy", "roles/demo-proxy", "rolebindings/demo-proxy")
NAMES = (*ACCESS, "pods/demo-runner", "pods/demo-workspace")
ALWAYS = range(1, sys.maxsize)
Json = dict[str, Any]
Proceed = Callable[[], Awaitable[web.Response]]
Fault = Callable[[web.Request, Proceed], Awaitable[web.StreamResponse]]


def status_of(code: int, reason: str, message: str) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
    return web.json_response(body | {"code": code}, status=code)


@dataclass
class _Planned:
    method: str
    place: str
    when: range
    fault: Fault
    seen: int = 0


@dataclass
class FakeApi:
    """What a session needs of an API server. It runs in a thread of its own; `faults` change what a request gets."""

    objects: dict[str, Json] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    denied: set[tuple[str, str]] = field(default_factory=set)
    release: str = "v1.29.4+k3s1"
    token: str = "t0ken"
    pod_seconds: float = 0.03
    pod_status: Callable[[Json], Json] = lambda _: {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [{"name": "runner", "ready": True, "state": {"running": {}}}],
    }
    planned: list[_Planned] = field(default_factory=list)
    made: int = 0
    port: int = 0

    def fault(self, method: str, place: str, fault: Fault, nth: int | range = 1) -> None:
        """Let the nth request from now on of ``method`` to a path that ends in ``place`` meet with ``fault``."""
        when = nth if isinstance(nth, range) else range(nth, nth + 1)
        self.planned.append(_Planned(method, place, when, fault))

    def add(self, place: str, **members: Any) -> Json:
        """Put an object there, as somebody else would."""
        self.made += 1
        manifest = {"metadata": {"name": place.rpartition("/")[2], "uid": f"uid-{self.made}"}, **members}
        self.objects[place] = manifest
        return manifest

    @property
    def present(self) -> set[str]:
        """Which of the session's objects are there."""
        return {place for place in self.objects if place in NAMES}

    @property
    def changes(self) -> list[tuple[str, str]]:
        return [(method, place) for method, place in self.requests if method in ("POST", "PATCH", "DELETE")]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        place = request.path.partition(f"/namespaces/{NAMESPACE}/")[2] or request.path
        reviewing = place.endswith("selfsubjectaccessreviews")
        if not reviewing:
            self.requests.append((request.method, place))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return status_of(401, "Unauthorized", "Unauthorized")
        body = await request.json() if request.can_read_body else {}

        async def proceed() -> web.Response:
            return self.review(body) if reviewing else self.answer(request, place, body)

        for planned in self.planned:
            if planned.method == request.method and place.endswith(planned.place):
                planned.seen += 1
                if planned.seen in planned.when:
                    return await planned.fault(request, proceed)
        return await proceed()

    def review(self, body: Json) -> web.Response:
        asked = body["spec"]["resourceAttributes"]
        resource = asked["resource"] + "/" * bool(asked["subresource"]) + asked["subresource"]
        assert asked["namespace"] == NAMESPACE
        assert asked["group"] == (RBAC if resource.startswith("role") else "")
        assert bool(asked["name"]) == (asked["verb"] != "create" or resource == "pods/exec")
        return web.json_response({"status": {"allowed": (asked["verb"], resource) not in self.denied}})

    def answer(self, request: web.Request, place: str, body: Json) -> web.Response:
        found = self.objects.get(place)
        match request.method:
            case "GET" if place == "/version":
                return web.json_response({"major": "", "minor": "", "gitVersion": self.release})
            case "GET" if place == f"/api/v1/namespaces/{NAMESPACE}":
                return web.json_response({"kind": "Namespace", "metadata": {"name": NAMESPACE}})
            case "GET" if found is not None:
                return web.json_response(found)
            case "GET" if "limit" in request.query:
                items = [item for name, item in self.objects.items() if name.rpartition("/")[0] == place]
                return web.json_response({"items": items[: int(request.query["limit"])]})
            case "POST":
                place = f"{place}/{body['metadata']['name']}"
                if place in self.objects:
                    return status_of(409, "AlreadyExists", f"{place} already exists")
                self.made += 1
                body["metadata"]["uid"] = f"uid-{self.made}"
                if body["kind"] == "Pod":
                    body["status"] = self.pod_status(body)
                self.objects[place] = body
                return web.json_response(body, status=201)
            case "PATCH" if found is not None:
                assert request.content_type == "application/merge-patch+json"
                found["metadata"] |= body["metadata"]
                return web.json_response(found)
            case "DELETE" if found is not None:
                if body["preconditions"]["uid"] != found["metadata"]["uid"]:
                    return status_of(409, "Conflict", "the UID in the precondition is another")
                self.delete(place, found, body.get("gracePeriodSeconds"))
                return web.json_response(found)
        return status_of(404, "NotFound", f"{place} not found")

    def delete(self, place: str, found: Json, grace: int | None) -> None:
        if found.get("kind") != "Pod" or grace == 0:
            del self.objects[place]
        elif "deletionTimestamp" not in found["metadata"]:
            found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            asyncio.get_running_loop().call_later(self.pod_seconds, self.objects.pop, place, None)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()
    loop = asyncio.new_event_loop()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)

    async def begin() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.port = runner.addresses[0][1]

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(begin(), loop).result(PATIENCE)
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path, fake)))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield fake
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(PATIENCE)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


def write_kubeconfig(directory: Path, fake: FakeApi, **context: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{fake.port}"}}],
        "users": [{"name": "u", "user": {"token": "t0ken"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE} | context}],
        "current-context": "x",
    }
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, seconds in (
        (session, "POLL_SECONDS", 0.01),
        (session, "RETRY_SECONDS", 0.01),
        (session, "SETTLE_SECONDS", 0.25),
        (session, "ROLLBACK_SECONDS", 2.0),
        (kube, "REQUEST_SECONDS", 0.5),
        (kube, "TLS_CLOSE_SECONDS", 0.02),
    ):
        monkeypatch.setattr(module, name, seconds)


def up(*arguments: str) -> int:
    return main(["session", "up", "demo", *IMAGES, *arguments])


def down(*arguments: str) -> int:
    return main(["session", "down", "demo", *arguments])


def status() -> int:
    return main(["session", "status", "demo"])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Everything on standard error; standard output must be empty."""
    out, err = capsys.readouterr()
    assert out == ""
    return err


def last(text: str) -> str:
    return text.splitlines()[-1].removeprefix("session-proxy: ")


# --- faults ---------------------------------------------------------------------------------------------------------


def refuse(code: int, reason: str, message: str) -> Fault:
    async def fault(_: web.Request, __: Proceed) -> web.StreamResponse:
        return status_of(code, reason, message)

    return fault


async def lose_request(request: web.Request, _: Proceed) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def lose_answer(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    await proceed()
    return await lose_request(request, proceed)


async def too_late(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Lose the connection, and do what was asked for all the same, a little later."""
    asyncio.get_running_loop().call_later(0.1, asyncio.ensure_future, proceed())
    return await lose_request(request, proceed)


async def no_answer(_: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Do what was asked for, and answer only when nobody waits any more."""
    answer = await proceed()
    await asyncio.sleep(kube.REQUEST_SECONDS + 0.2)
    return answer


async def not_json(_: web.Request, proceed: Proceed) -> web.StreamResponse:
    await proceed()
    return web.Response(text="<html>a proxy's own words</html>")


def interrupt(number: signal.Signals = signal.SIGINT, *, first: bool) -> Fault:
    async def fault(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        if first:
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.05)
        answer = await proceed()
        if not first:
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.05)
        return answer

    return fault


STEPS = [
    ("POST", "serviceaccounts", 1),
    ("POST", "pods", 1),
    ("PATCH", "serviceaccounts/demo-proxy", 1),
    ("POST", "roles", 1),
    ("POST", "rolebindings", 1),
    ("POST", "pods", 2),
]
"""What `up` changes, in order."""


def steps(*steps: tuple[str, str, int]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("step", steps, ids=[" ".join(map(str, step)) for step in steps])


each_step = steps(*STEPS)
each_creation = steps(*(step for step in STEPS if step[0] == "POST"))


def created_by(step: tuple[str, str, int]) -> str:
    name = "proxy" if step[1] != "pods" else "runner" if step[2] == 1 else "workspace"
    return f"{step[1]}/demo-{name}"


# --- up -------------------------------------------------------------------------------------------------------------


def test_up_creates_a_session_and_says_how_to_use_it(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert up() == EXIT_DONE
    assert api.changes == [(method, place) for method, place, _ in STEPS]
    assert api.present == set(NAMES)
    runner, workspace = api.objects["pods/demo-runner"], api.objects["pods/demo-workspace"]
    uid = runner["metadata"]["uid"]
    for place in set(NAMES) - {"pods/demo-runner"}:
        (reference,) = api.objects[place]["metadata"]["ownerReferences"]
        assert (reference["kind"], reference["name"], reference["uid"]) == ("Pod", "demo-runner", uid)
    assert "ownerReferences" not in runner["metadata"]
    assert workspace["metadata"]["ownerReferences"][0]["controller"] is True
    assert {item["metadata"]["annotations"]["session-proxy/run"] for item in api.objects.values()} != {None}
    out, err = capsys.readouterr()
    assert "checks: passed; creating session demo in namespace team" in err
    for item in ("pod/demo-runner", "pod/demo-workspace"):
        assert f"  {item}: created\n" in err
        assert f"  {item}: ready\n" in err
    assert last(err) == "session demo is ready"
    assert (
        'kubectl exec --namespace team demo-runner --container runner -- curl -sN -d \'{"command":["id"]}\' '
        "http://127.0.0.1:8080/exec\n"
    ) in out
    assert out.endswith("session-proxy session down demo --namespace team\n")


def test_each_change_of_a_pod_is_said_once(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    states = [
        {"phase": "Pending"},
        {"phase": "Running", "containerStatuses": [{"name": "workspace", "ready": False, "state": {"running": {}}}]},
        {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    ]
    looks = 0

    async def slowly(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        nonlocal looks
        if place := api.objects.get("pods/demo-workspace"):
            place["status"] = states[min(looks // 3, 2)]
            looks += 1
        return await proceed()

    api.fault("GET", "pods/demo-workspace", slowly, nth=ALWAYS)
    assert up() == EXIT_DONE
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().err.splitlines() if "demo-workspace: " in line]
    assert lines == [
        "pod/demo-workspace: created",
        "pod/demo-workspace: pending",
        "pod/demo-workspace: running, not ready yet: workspace",
        "pod/demo-workspace: ready",
    ]


@each_step
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (refuse(403, "Forbidden", "exceeded quota: tight"), "exceeded quota: tight"),
        (refuse(500, "InternalError", "etcdserver: request timed out"), "kube_unavailable: "),
        (lose_request, "kube_unavailable: the API server cannot be reached"),
        (lose_answer, "kube_unavailable: the API server cannot be reached"),
        (no_answer, "kube_timeout: the API server did not answer"),
        (not_json, "no JSON object"),
    ],
    ids=["quota", "server error", "lost request", "lost answer", "no answer", "not JSON"],
)
def test_a_step_that_fails_leaves_nothing_behind(
    api: FakeApi, capsys: pytest.CaptureFixture[str], step: tuple[str, str, int], fault: Fault, words: str
) -> None:
    api.fault(*step[:2], fault, nth=step[2])
    assert up() == EXIT_FAILED
    assert api.objects == {}
    assert (
        api.changes[: STEPS.index(step) + 1]
        == [(method, place) for method, place, _ in STEPS][: len(api.changes)][: STEPS.index(step) + 1]
    )
    err = said(capsys)
    assert words in last(err)
    assert last(err).endswith("; everything that was created is removed again")
    assert "failed: " in err
    assert "Traceback" not in err


def test_an_answer_that_makes_no_sense_leaves_nothing_behind(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    async def empty(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        await proceed()
        return web.json_response({}, status=201)

    api.fault("POST", "pods", empty)
    assert up() == EXIT_FAILED
    assert api.objects == {}
    assert last(said(capsys)) == "KeyError: 'metadata'; everything that was created is removed again"


@each_creation
def test_what_a_lost_request_creates_later_is_found_and_removed(api: FakeApi, step: tuple[str, str, int]) -> None:
    api.fault(*step[:2], too_late, nth=step[2])
    assert up() == EXIT_FAILED
    time.sleep(0.2)  # longer than the request is late
    assert api.objects == {}
    assert ("DELETE", created_by(step)) in api.changes


@each_step
@pytest.mark.parametrize("first", [True, False], ids=["before it is done", "after it is done"])
def test_an_interrupt_at_any_step_leaves_nothing_behind(
    api: FakeApi, capsys: pytest.CaptureFixture[str], step: tuple[str, str, int], first: bool
) -> None:
    api.fault(*step[:2], interrupt(first=first), nth=step[2])
    assert up() == EXIT_FAILED
    assert api.objects == {}
    assert last(said(capsys)) == "interrupted; everything that was created is removed again"
    index = STEPS.index(step)
    made = [(method, place) for method, place in api.changes if method != "DELETE"]
    assert made == [(method, place) for method, place, _ in STEPS[: index + 1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_whatever_ends_a_program_removes_what_waits_to_be_ready(
    api: FakeApi, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    api.pod_status = lambda _: {"phase": "Pending"}
    api.fault("GET", "pods/demo-workspace", interrupt(number, first=True), nth=3)
    assert up() == EXIT_FAILED
    assert api.objects == {}
    assert last(said(capsys)) == "interrupted; everything that was created is removed again"


def test_a_signal_that_is_ignored_stays_ignored(api: FakeApi) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        api.fault("POST", "roles", interrupt(signal.SIGHUP, first=True))
        assert up() == EXIT_DONE
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_during_the_checks_creates_nothing(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.fault("GET", "/version", interrupt(first=True))
    assert up() == EXIT_FAILED
    assert api.changes == []
    assert said(capsys) == "session-proxy: interrupted; nothing was created\n"


def test_an_interrupt_waits_for_the_answer_that_is_under_way(api: FakeApi) -> None:
    meanwhile: list[tuple[str, str]] = []

    async def slowly(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        before = len(api.requests)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.3)
        meanwhile.extend(api.requests[before:])
        return await proceed()

    api.fault("POST", "pods", slowly)
    assert up() == EXIT_FAILED
    assert meanwhile == []  # else it might have been looked for before it was there
    assert ("DELETE", "pods/demo-runner") in api.changes
    assert api.objects == {}


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_does_not_stop_the_rollback(
    api: FakeApi, capsys: pytest.CaptureFixture[str], again: signal.Signals
) -> None:
    api.fault("POST", "pods", interrupt(first=False), nth=2)
    for place in NAMES:
        api.fault("DELETE", place, interrupt(again, first=True))
    assert up() == EXIT_FAILED
    assert api.objects == {}
    err = said(capsys)
    assert "stopping already; it takes at most 2.5 s" in err
    assert last(err) == "interrupted; everything that was created is removed again"


def test_an_interrupt_during_the_rollback_of_a_failure_does_not_stop_it(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.fault("POST", "pods", refuse(403, "Forbidden", "exceeded quota"), nth=2)
    api.fault("DELETE", "roles/demo-proxy", interrupt(first=True))
    assert up() == EXIT_FAILED
    assert api.objects == {}
    assert "exceeded quota; everything that was created is removed again" in last(said(capsys))


@pytest.mark.parametrize(
    "fault",
    [lose_request, lose_answer, refuse(503, "ServiceUnavailable", "starting"), refuse(403, "Forbidden", "not synced")],
    ids=["lost request", "lost answer", "503", "403"],
)
def test_a_rollback_outlasts_a_restart_of_the_api_server(api: FakeApi, fault: Fault) -> None:
    for place in NAMES:
        api.fault("DELETE", place, fault, nth=range(1, 4))
    api.fault("GET", "pods/demo-runner", fault, nth=range(2, 9))  # the first is the check that the name is free
    api.fault("POST", "pods", refuse(403, "Forbidden", "exceeded quota"), nth=2)
    assert up() == EXIT_FAILED
    assert api.objects == {}


def test_a_rollback_that_does_not_succeed_ends_in_time_and_says_what_is_left(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ROLLBACK_SECONDS", 0.5)
    api.fault("POST", "pods", refuse(403, "Forbidden", "exceeded quota"), nth=2)
    api.fault("DELETE", "pods/demo-runner", refuse(403, "Forbidden", "a webhook says no"), nth=ALWAYS)
    api.fault("DELETE", "roles/demo-proxy", no_answer, nth=ALWAYS)
    began = time.monotonic()
    assert up() == EXIT_UNKNOWN
    assert time.monotonic() - began < 2
    err = said(capsys)
    assert "pod/demo-runner cannot be deleted: a webhook says no" in err
    # What gets no answer holds up none of the others.
    assert set(api.objects) == {"pods/demo-runner"}
    assert last(err).endswith(
        "exceeded quota; after 0.5 s there may be left: pod/demo-runner, role/demo-proxy; "
        "to remove it: session-proxy session down demo --namespace team"
    )


def test_an_api_server_that_is_gone_for_good_does_not_hold_the_rollback(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ROLLBACK_SECONDS", 0.5)

    async def gone(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        for method in ("GET", "POST", "PATCH", "DELETE"):
            api.fault(method, "", lose_request, nth=ALWAYS)
        return await lose_request(request, proceed)

    api.fault("POST", "roles", gone)
    assert up() == EXIT_UNKNOWN
    err = said(capsys)
    assert all(item in last(err) for item in ("pod/demo-runner", "serviceaccount/demo-proxy"))


def test_the_terminal_that_went_away_does_not_stop_the_rollback(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, _: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    api.fault("POST", "pods", refuse(403, "Forbidden", "exceeded quota"), nth=2)
    monkeypatch.setattr(sys, "stderr", Gone())
    assert up() == EXIT_FAILED
    assert api.objects == {}


# --- names that something else has ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", NAMES)
def test_a_name_that_is_taken_is_refused_before_anything_is_created(
    api: FakeApi, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    api.add(place)
    before = copy.deepcopy(api.objects)
    assert up() == EXIT_CONFIG
    assert api.objects == before
    assert api.changes == []
    kind, _, name = place.partition("/")
    assert said(capsys) == (
        f"session-proxy: NAME is 'demo'; it must be free in namespace team, where there is {kind[:-1]}/{name}\n"
    )


@each_creation
def test_a_name_that_is_taken_in_the_meantime_keeps_its_owner(
    api: FakeApi, capsys: pytest.CaptureFixture[str], step: tuple[str, str, int]
) -> None:
    place = created_by(step)
    foreign: Json = {}

    async def be_faster(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        # Of the same session, even: only the run tells the two apart.
        labels = {"app.kubernetes.io/managed-by": "session-proxy", "session": "demo"}
        foreign.update(api.add(place))
        api.objects[place]["metadata"] |= {"labels": labels, "annotations": {"session-proxy/run": "another"}}
        return await proceed()

    api.fault(*step[:2], be_faster, nth=step[2])
    assert up() == EXIT_FAILED
    assert set(api.objects) == {place}
    assert api.objects[place]["metadata"]["uid"] == foreign["metadata"]["uid"]
    assert ("DELETE", place) not in api.changes
    assert "the name is taken" in last(said(capsys))


def test_a_namesake_that_takes_the_place_of_what_is_removed_stays(api: FakeApi) -> None:
    async def replace(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        api.objects.pop("pods/demo-runner", None)
        api.add("pods/demo-runner", kind="Pod")
        return await proceed()

    api.fault("POST", "pods", refuse(403, "Forbidden", "exceeded quota"), nth=2)
    api.fault("DELETE", "pods/demo-runner", replace)
    assert up() == EXIT_FAILED
    assert set(api.objects) == {"pods/demo-runner"}


# --- waiting --------------------------------------------------------------------------------------------------------


def test_a_pod_that_cannot_become_ready_is_not_waited_for(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = {"reason": "ErrImageNeverPull", "message": 'image "w.example/w" is not present'}
    container = {"name": "workspace", "ready": False, "state": {"waiting": waiting}}
    api.pod_status = lambda _: {"phase": "Pending", "containerStatuses": [container]}
    assert up() == EXIT_FAILED
    assert api.objects == {}
    assert 'container workspace: ErrImageNeverPull: image "w.example/w" is not present; everything' in last(
        said(capsys)
    )


def test_what_is_not_ready_in_time_is_removed_and_its_state_told(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes: \x1b[31mred",
    }
    api.pod_status = lambda _: {"phase": "Pending", "conditions": [condition]}
    assert up("--timeout", "1") == EXIT_FAILED
    assert api.objects == {}
    err = said(capsys)
    assert "not ready in --timeout 1 s: pod/demo-runner: not scheduled: Unschedulable: 0/3 nodes: " in last(err)
    assert "\x1b" not in err
    assert "\\x1b[31mred" in err


def test_the_timeout_counts_the_creating_too(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    async def slowly(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        await asyncio.sleep(0.45)
        return await proceed()

    api.fault("POST", "pods", slowly, nth=ALWAYS)
    api.fault("POST", "roles", slowly, nth=ALWAYS)
    assert up("--timeout", "1") == EXIT_FAILED
    assert api.objects == {}
    assert "not ready in --timeout 1 s: pod/demo-runner: created; pod/demo-workspace: not created" in last(said(capsys))


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_pod_that_somebody_takes_away_is_not_waited_for(
    api: FakeApi, capsys: pytest.CaptureFixture[str], replaced: bool
) -> None:
    async def take(_: web.Request, proceed: Proceed) -> web.StreamResponse:
        pod = api.objects.pop("pods/demo-workspace")
        if replaced:
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            api.objects["pods/demo-workspace"] = {"metadata": pod["metadata"] | {"uid": "another"}, "status": ready}
        return await proceed()

    api.pod_status = lambda _: {"phase": "Pending"}
    api.fault("GET", "pods/demo-workspace", take, nth=3)
    assert up() == EXIT_FAILED
    assert api.objects == {}
    assert "pod/demo-workspace was removed by somebody else" in last(said(capsys))


def test_an_api_server_that_is_away_for_a_while_is_waited_for(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.fault("GET", "pods/demo-workspace", lose_request, nth=range(2, 9))
    assert up() == EXIT_DONE
    assert "API server: the API server cannot be reached" in capsys.readouterr().err


# --- checks before anything is created ------------------------------------------------------------------------------


def refused(api: FakeApi, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run `up`, which must be refused with nothing created; return the problems."""
    assert up(*arguments) == EXIT_CONFIG
    assert api.changes == []
    return [line.removeprefix("session-proxy: ") for line in said(capsys).splitlines()]


def test_an_older_cluster_needs_the_sidecar_as_a_container(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.release = "v1.28.9"
    assert refused(api, capsys) == [
        "--sidecar is 'native', which needs Kubernetes 1.29; it must be container on this one (1.28)"
    ]
    assert up("--sidecar", "container") == EXIT_DONE


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ({"gitVersion": "v1.20.2", "major": "", "minor": ""}, (1, 20)),
        ({"gitVersion": "v1.29.3-eks-adc7111", "major": "1", "minor": "29+"}, (1, 29)),
        ({"gitVersion": "v1.31.0-rc.1"}, (1, 31)),
        ({"gitVersion": "v2.0.0"}, (2, 0)),
        ({"gitVersion": "unknown"}, (0, 0)),
        ({}, (0, 0)),
    ],
)
def test_the_release_is_read_from_the_version(version: Json, release: tuple[int, int]) -> None:
    assert session.server_release(version) == release


REFERENCES = [
    ("--workspace-claim", "data", "persistentvolumeclaims"),
    ("--runtime-class", "gvisor", "/apis/node.k8s.io/v1/runtimeclasses"),
    ("--node-name", "node1", "/api/v1/nodes"),
]


@pytest.mark.parametrize(("flag", "value", "place"), REFERENCES)
def test_what_an_option_names_must_exist(
    api: FakeApi, capsys: pytest.CaptureFixture[str], flag: str, value: str, place: str
) -> None:
    assert refused(api, capsys, flag, value) == [f"{flag} is {value!r}; it must be one that exists; there is none"]
    for number in range(12):
        api.add(f"{place}/other-{number}")
    (problem,) = refused(api, capsys, flag, value)
    assert problem.startswith(f"{flag} is {value!r}; it must be one that exists, such as other-0, other-1")
    assert problem.endswith("other-9")
    api.add(f"{place}/{value}")["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert refused(api, capsys, flag, value) == [f"{flag} is {value!r}; it must be one that is not being deleted"]
    api.add(f"{place}/{value}")
    assert up(flag, value) == EXIT_DONE


def test_the_namespace_must_exist(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("/api/v1/namespaces/team")
    api.fault("GET", "/api/v1/namespaces/team", refuse(404, "NotFound", "no"), nth=ALWAYS)
    assert refused(api, capsys) == ["--namespace is 'team'; it must be one that exists, such as team"]


@pytest.mark.parametrize("place", ["/version", "/api/v1/namespaces/team", *(place for _, _, place in REFERENCES[1:])])
def test_what_the_person_may_not_read_is_no_problem_by_itself(api: FakeApi, place: str) -> None:
    api.add("/apis/node.k8s.io/v1/runtimeclasses/gvisor")
    api.add("/api/v1/nodes/node1")
    name = {"/api/v1/nodes": "/node1", "/apis/node.k8s.io/v1/runtimeclasses": "/gvisor"}.get(place, "")
    api.fault("GET", place + name, refuse(403, "Forbidden", "no"), nth=ALWAYS)
    assert up("--node-name", "node1", "--runtime-class", "gvisor") == EXIT_DONE


def test_what_exists_is_not_told_to_who_may_not_list_it(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.fault("GET", "/apis/node.k8s.io/v1/runtimeclasses", refuse(403, "Forbidden", "no"), nth=ALWAYS)
    assert refused(api, capsys, "--runtime-class", "gvisor") == [
        "--runtime-class is 'gvisor'; it must be one that exists"
    ]


NEEDED = [
    *((verb, resource) for resource in ("pods", "serviceaccounts") for verb in ("create", "get", "delete")),
    *((verb, resource) for resource in ("roles", "rolebindings") for verb in ("create", "get", "delete")),
    ("patch", "serviceaccounts"),
]


@pytest.mark.parametrize(("verb", "resource"), NEEDED)
def test_every_permission_that_is_needed_is_asked_for(
    api: FakeApi, capsys: pytest.CaptureFixture[str], verb: str, resource: str
) -> None:
    api.denied = {(verb, resource)}
    full = f"{resource}.{RBAC}" if resource.startswith("role") else resource
    assert refused(api, capsys) == [f"KUBECONFIG's user may not {verb} {full} in namespace team; RBAC must allow it"]


@pytest.mark.parametrize("verb", ["escalate", "bind"])
def test_who_may_not_grant_freely_must_hold_what_the_role_grants(
    api: FakeApi, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    api.denied = {(verb, "roles"), ("watch", "pods"), ("create", "pods/exec")}
    assert refused(api, capsys) == [
        "KUBECONFIG's user may not watch pods in namespace team; RBAC must allow it",
        "KUBECONFIG's user may not create pods/exec in namespace team; RBAC must allow it",
    ]
    api.denied -= {(verb, "roles")}
    assert up() == EXIT_DONE


def test_a_claim_must_be_one_that_may_be_read(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.denied = {("get", "persistentvolumeclaims")}
    api.fault("GET", "persistentvolumeclaims/data", refuse(403, "Forbidden", "no"), nth=ALWAYS)
    assert refused(api, capsys, "--workspace-claim", "data") == [
        "KUBECONFIG's user may not get persistentvolumeclaims in namespace team; RBAC must allow it"
    ]


def test_all_that_is_wrong_with_a_cluster_is_said_at_once(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.release = "v1.27.0"
    api.denied = {("create", "pods"), ("delete", "pods"), ("patch", "serviceaccounts")}
    api.add("roles/demo-proxy")
    api.add("pods/demo-runner")
    problems = refused(api, capsys, "--runtime-class", "kata", "--workspace-claim", "data")
    assert [problem.partition(";")[0] for problem in problems] == [
        "--sidecar is 'native', which needs Kubernetes 1.29",
        "--workspace-claim is 'data'",
        "--runtime-class is 'kata'",
        "KUBECONFIG's user may not create, delete pods in namespace team",
        "KUBECONFIG's user may not patch serviceaccounts in namespace team",
        "NAME is 'demo'",
    ]
    assert problems[-1].endswith("where there is pod/demo-runner, role/demo-proxy")


def test_wrong_options_are_refused_before_the_cluster_is_asked(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = refused(api, capsys, "--workspace-memory", "512m", "--runner-image", "No")
    assert [problem.split()[0] for problem in problems] == ["--runner-image", "--workspace-memory"]
    assert api.requests == []


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_a_kubeconfig_that_cannot_be_used_is_named(
    api: FakeApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
) -> None:
    argv = ["session", command, "demo", *(IMAGES if command == "up" else ())]
    missing = str(tmp_path / "nosuch")
    monkeypatch.setenv("KUBECONFIG", missing)
    assert main(argv) == EXIT_CONFIG
    assert last(said(capsys)) == f"KUBECONFIG is {missing!r}; it must be a kubeconfig file that can be read"
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(argv) == EXIT_CONFIG
    assert last(said(capsys)).startswith("KUBECONFIG is not set, and ~/.kube/config is no file; it must be")
    (tmp_path / "bad").write_text("apiVersion: v1\nkind: Config\n")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "bad"))
    assert main(argv) == EXIT_CONFIG
    assert f"KUBECONFIG ({tmp_path / 'bad'}) cannot be used: " in last(said(capsys))
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path, api, namespace="")))
    assert main(argv) == EXIT_CONFIG
    assert last(said(capsys)).startswith("--namespace is not given and the kubeconfig names none; it must be")
    assert api.requests == []


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_a_credential_that_is_not_accepted_is_refused(
    api: FakeApi, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    api.token = "another"
    assert main(["session", command, "demo", *(IMAGES if command == "up" else ())]) == EXIT_CONFIG
    assert last(said(capsys)).startswith("KUBECONFIG's credential is refused: ")


def test_the_kubeconfig_goes_before_the_pods_own_credential(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert up() == EXIT_DONE
    assert api.present == set(NAMES)


def test_without_a_kubeconfig_a_pod_uses_its_own_credential(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert up() == EXIT_CONFIG  # because this is no pod
    assert last(said(capsys)).startswith("the service account's files cannot be used: ")
    assert api.requests == []


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_an_api_server_that_is_not_there_is_said(
    api: FakeApi, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    api.port = closed_port()
    write_kubeconfig(tmp_path, api)
    assert up() == EXIT_FAILED
    assert last(said(capsys)).startswith("kube_unavailable: the API server cannot be reached: ")
    assert down() == EXIT_UNKNOWN
    assert status() == EXIT_UNKNOWN
    assert "kube_unavailable: the API server cannot be reached: " in said(capsys)


def test_a_check_is_tried_again_when_it_gets_no_answer(api: FakeApi) -> None:
    for method, place in (("GET", "/version"), ("POST", "selfsubjectaccessreviews"), ("GET", "roles/demo-proxy")):
        api.fault(method, place, lose_request, nth=range(1, 3))
    assert up() == EXIT_DONE


# --- dry run --------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_what_would_be_created_and_asks_nobody(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = os.environ["KUBECONFIG"]
    monkeypatch.setenv("KUBECONFIG", "/nosuch")
    assert up("--dry-run", "--namespace", "team") == EXIT_DONE
    assert api.requests == []
    out, err = capsys.readouterr()
    assert err == ""
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert any("00000000-0000-0000-0000-000000000000 is a placeholder" in comment for comment in comments)
    assert "&id" not in out
    printed = list(yaml.safe_load_all(out))
    assert {document["metadata"].pop("namespace") for document in printed} == {"team"}
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    assert up() == EXIT_DONE
    created = [copy.deepcopy(item) for item in api.objects.values()]
    for item in created:
        item.pop("status", None)
        del item["metadata"]["annotations"], item["metadata"]["uid"]
        for reference in item["metadata"].get("ownerReferences", ()):
            reference["uid"] = "00000000-0000-0000-0000-000000000000"
    assert printed == created


def test_a_dry_run_refuses_what_is_wrong_and_names_no_namespace_that_was_not_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert up("--dry-run", "--runner-cpu", "much") == EXIT_CONFIG
    assert said(capsys).startswith("session-proxy: --runner-cpu is 'much'; it must be a quantity of CPU")
    assert up("--dry-run") == EXIT_DONE
    assert "namespace" not in yaml.safe_load(capsys.readouterr().out.split("---\n")[1])["metadata"]


# --- down -----------------------------------------------------------------------------------------------------------


def test_down_removes_everything_and_may_be_repeated(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert up() == EXIT_DONE
    capsys.readouterr()
    assert down() == EXIT_DONE
    assert api.objects == {}
    assert sorted(place for method, place in api.changes if method == "DELETE") == sorted(NAMES)
    err = said(capsys)
    assert "pod/demo-runner: being deleted" in err
    assert last(err) == "session demo in namespace team: removed"
    assert down() == EXIT_DONE
    assert last(said(capsys)) == "session demo in namespace team: nothing was there"


@pytest.mark.parametrize("missing", NAMES)
def test_down_removes_what_is_left_of_a_session(api: FakeApi, missing: str) -> None:
    assert up() == EXIT_DONE
    del api.objects[missing]
    assert down() == EXIT_DONE
    assert api.objects == {}


def test_down_does_not_touch_what_up_did_not_make(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert up() == EXIT_DONE
    foreign: dict[str, Json] = {
        "roles/demo-proxy": {"name": "demo-proxy"},
        "pods/demo-runner": {"name": "demo-runner", "labels": {"session": "demo"}},
        "serviceaccounts/demo-proxy": {
            "name": "demo-proxy",
            "labels": {"app.kubernetes.io/managed-by": "session-proxy", "session": "other"},
        },
    }
    for place, metadata in foreign.items():
        api.objects[place]["metadata"] = {**metadata, "uid": place}
    capsys.readouterr()
    assert down() == EXIT_DONE
    assert set(api.objects) == set(foreign)
    err = said(capsys)
    assert "not touched, because `session up` did not make it: serviceaccount/demo-proxy, pod/demo-runner, role/" in err
    assert last(err) == "session demo in namespace team: removed"
    assert down() == EXIT_DONE
    assert last(said(capsys)) == "session demo in namespace team: nothing was there"


def test_pods_end_gracefully_but_nobody_waits_for_one_in_which_nothing_runs(api: FakeApi) -> None:
    asked: list[int | None] = []

    async def look(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        asked.append((await request.json()).get("gracePeriodSeconds"))
        return await proceed()

    async def end(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        answer = await proceed()
        pod = api.objects["pods/demo-workspace"]
        pod["status"]["containerStatuses"] = [container(terminated={"exitCode": 0, "reason": "Completed"})]
        return answer

    api.pod_seconds = 60
    api.fault("DELETE", "pods/demo-workspace", end)  # the other pod never says that it ended
    api.fault("DELETE", "pods/demo-runner", look, nth=ALWAYS)
    assert up() == EXIT_DONE
    assert down("--timeout", "1") == EXIT_FAILED
    assert api.present == {"pods/demo-runner"}
    assert asked == [None]
    api.objects["pods/demo-runner"]["status"] = {
        "containerStatuses": [container(waiting={"reason": "ContainerCreating"})]
    }
    assert down() == EXIT_DONE
    assert api.objects == {}
    assert asked == [None, 0]


def test_a_rollback_gives_the_pods_one_second(api: FakeApi) -> None:
    asked: list[int | None] = []

    async def look(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        asked.append((await request.json()).get("gracePeriodSeconds"))
        return await proceed()

    api.fault("DELETE", "pods/demo-runner", look, nth=ALWAYS)
    api.fault("POST", "rolebindings", refuse(403, "Forbidden", "no"))
    assert up() == EXIT_FAILED
    assert asked == [1]


def test_down_ends_in_time_and_says_what_is_still_there(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert up() == EXIT_DONE
    api.pod_seconds = 60
    capsys.readouterr()
    assert down("--timeout", "1") == EXIT_FAILED
    assert last(said(capsys)) == (
        "session demo in namespace team: after --timeout 1 s there is still pod/demo-runner, pod/demo-workspace"
    )


def test_down_outlasts_a_restart_of_the_api_server(api: FakeApi) -> None:
    assert up() == EXIT_DONE
    for place in NAMES:
        api.fault("DELETE", place, refuse(503, "ServiceUnavailable", "starting"))
        api.fault("DELETE", place, lose_answer)
    assert down() == EXIT_DONE
    assert api.objects == {}


def test_who_may_not_remove_a_session_is_told_what_is_missing(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert up() == EXIT_DONE
    before = set(api.objects)
    capsys.readouterr()
    api.denied = {("delete", "pods"), ("get", "roles"), ("create", "pods"), ("patch", "serviceaccounts")}
    assert down() == EXIT_CONFIG
    assert set(api.objects) == before
    assert said(capsys).splitlines() == [
        "session-proxy: KUBECONFIG's user may not delete pods in namespace team; RBAC must allow it",
        f"session-proxy: KUBECONFIG's user may not get roles.{RBAC} in namespace team; RBAC must allow it",
    ]
    assert status() == EXIT_CONFIG
    assert "may not get roles" in said(capsys)


def test_who_may_not_ask_learns_nothing_of_a_session(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither that something is still there, nor that it is not ready."""
    api.fault("POST", "selfsubjectaccessreviews", refuse(403, "Forbidden", "no"), range(1, 100))
    for command in (down, status):
        assert command() == EXIT_UNKNOWN
        assert "permissions cannot be asked for" in said(capsys)


def test_an_interrupted_down_knows_nothing(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert up() == EXIT_DONE
    capsys.readouterr()
    api.fault("DELETE", "pods/demo-runner", interrupt(first=True))
    assert down() == EXIT_UNKNOWN
    assert last(said(capsys)) == "interrupted"
    assert down() == EXIT_DONE
    assert api.objects == {}


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_says_what_is_there_before_between_and_after(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert status() == EXIT_NOTHING_THERE
    assert capsys.readouterr() == ("session demo in namespace team: nothing there\n", "")
    assert up() == EXIT_DONE
    capsys.readouterr()
    assert status() == EXIT_DONE
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split(maxsplit=1) for line in out.splitlines()[:-1]] == [
        ["serviceaccount/demo-proxy", "there"],
        ["pod/demo-runner", "ready"],
        ["role/demo-proxy", "there"],
        ["rolebinding/demo-proxy", "there"],
        ["pod/demo-workspace", "ready"],
    ]
    assert out.splitlines()[-1] == "session demo in namespace team: ready"
    del api.objects["pods/demo-workspace"]
    api.objects["roles/demo-proxy"]["metadata"]["labels"] = {}
    assert status() == EXIT_FAILED
    out = capsys.readouterr().out
    assert "pod/demo-workspace         missing\n" in out
    assert "role/demo-proxy            not made by `session up`\n" in out
    assert "session demo in namespace team: not ready\n" in out
    assert out.endswith("demo-runner --container session-proxy -- session-proxy health --ready\n")
    assert down() == EXIT_DONE
    capsys.readouterr()
    assert status() == EXIT_NOTHING_THERE


def test_status_shows_why_a_pod_is_not_ready_and_changes_nothing(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert up() == EXIT_DONE
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off \x1b]0;title\x07 40s"}
    api.objects["pods/demo-workspace"]["status"] = {
        "phase": "Running",
        "containerStatuses": [{"name": "workspace", "ready": False, "state": {"waiting": waiting}}],
    }
    capsys.readouterr()
    api.requests.clear()
    assert status() == EXIT_FAILED
    out = capsys.readouterr().out
    assert "container workspace: CrashLoopBackOff: back-off \\x1b]0;title\\x07 40s" in out
    assert api.changes == []


# --- what a pod does ------------------------------------------------------------------------------------------------


def container(name: str = "runner", *, ready: bool = False, before: Json | None = None, **state: Any) -> Json:
    return {"name": name, "ready": ready, "state": state, "lastState": {"terminated": before} if before else {}}


SCHEDULED = {"type": "PodScheduled", "status": "True"}
UNREADY = {"type": "Ready", "status": "False", "reason": "ContainersNotReady"}


@pytest.mark.parametrize(
    ("pod", "words", "hopeless"),
    [
        pytest.param({}, "pending", False, id="no status"),
        pytest.param({"status": {"phase": "Pending"}}, "pending", False, id="new"),
        pytest.param(
            {
                "status": {
                    "phase": "Pending",
                    "conditions": [
                        {
                            "type": "PodScheduled",
                            "status": "False",
                            "reason": "Unschedulable",
                            "message": "0/1 nodes are available: 1 Insufficient memory.",
                        }
                    ],
                }
            },
            "not scheduled: Unschedulable: 0/1 nodes are available: 1 Insufficient memory.",
            False,
            id="unschedulable",
        ),
        pytest.param(
            {
                "status": {
                    "phase": "Pending",
                    "conditions": [SCHEDULED, UNREADY],
                    "containerStatuses": [container(waiting={"reason": "ContainerCreating"})],
                }
            },
            "container runner: ContainerCreating",
            False,
            id="creating",
        ),
        pytest.param(
            {
                "status": {
                    "phase": "Pending",
                    "initContainerStatuses": [container("session-proxy", running={"startedAt": "x"})],
                    "containerStatuses": [container(waiting={"reason": "PodInitializing"})],
                }
            },
            "pending",
            False,
            id="native sidecar starting",
        ),
        pytest.param(
            {
                "status": {
                    "phase": "Pending",
                    "containerStatuses": [
                        container("session-proxy", waiting={"reason": "ContainerCreating"}),
                        container(waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image"}),
                    ],
                }
            },
            "container runner: ImagePullBackOff: Back-off pulling image",
            True,
            id="a hopeless one behind another",
        ),
        pytest.param(
            {
                "status": {
                    "phase": "Running",
                    "conditions": [SCHEDULED, UNREADY],
                    "containerStatuses": [
                        container("session-proxy", running={}, ready=True),
                        container(
                            waiting={"reason": "CrashLoopBackOff", "message": "back-off 10s restarting"},
                            before={"exitCode": 127, "reason": "Error"},
                        ),
                    ],
                }
            },
            "container runner: CrashLoopBackOff: back-off 10s restarting: exit code 127, Error",
            True,
            id="crashing",
        ),
        pytest.param(
            {
                "status": {
                    "phase": "Running",
                    "containerStatuses": [container(terminated={"exitCode": 137, "reason": "OOMKilled"})],
                }
            },
            "container runner: ended: exit code 137, OOMKilled",
            False,
            id="between two starts",
        ),
        pytest.param(
            {
                "status": {
                    "phase": "Running",
                    "conditions": [SCHEDULED, UNREADY],
                    "initContainerStatuses": [
                        container("network-init", terminated={"exitCode": 0, "reason": "Completed"}, ready=True),
                        container("session-proxy", running={}),
                    ],
                    "containerStatuses": [container(running={}, ready=True)],
                }
            },
            "running, not ready yet: session-proxy",
            False,
            id="running",
        ),
        pytest.param(
            {"status": {"phase": "Running", "conditions": [SCHEDULED, {"type": "Ready", "status": "True"}]}},
            "ready",
            False,
            id="ready",
        ),
        pytest.param(
            {
                "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
            },
            "being deleted",
            True,
            id="being deleted",
        ),
        pytest.param(
            {"status": {"phase": "Failed", "reason": "OutOfcpu", "message": "Node didn't have enough resource: cpu"}},
            "Failed: OutOfcpu: Node didn't have enough resource: cpu",
            True,
            id="turned away by the node",
        ),
        pytest.param({"status": {"phase": "Succeeded"}}, "Succeeded", True, id="at its end"),
        pytest.param(
            {"status": {"phase": "Pending", "containerStatuses": [container(waiting={})]}},
            "pending",
            False,
            id="waiting without a reason",
        ),
        pytest.param({"status": {"conditions": None, "containerStatuses": None}}, "pending", False, id="nulls"),
    ],
)
def test_the_state_of_a_pod_in_words(pod: Json, words: str, hopeless: bool) -> None:
    assert session.pod_state(pod) == (words, hopeless)


# --- the call itself ------------------------------------------------------------------------------------------------


@pytest.fixture
async def client(api: FakeApi) -> Any:
    credentials = await kube.load_credentials({"KUBECONFIG": os.environ["KUBECONFIG"]})
    client = kube.KubeClient(credentials, namespace=NAMESPACE)
    yield client
    await client.close()


async def test_a_credential_is_read_again_once_when_it_is_refused(
    api: FakeApi, client: kube.KubeClient, tmp_path: Path
) -> None:
    api.token = "renewed"
    path = Path(os.environ["KUBECONFIG"])
    path.write_text(path.read_text().replace("t0ken", "renewed"))
    code, answer = await client.call("GET", "/version")
    assert (code, answer["gitVersion"]) == (200, api.release)
    assert api.requests == [("GET", "/version")] * 2
    api.token = "again another"
    with pytest.raises(KubeUnauthorizedError):
        await client.call("GET", "/version")
    assert len(api.requests) == 4


async def test_an_answer_without_end_is_not_kept(
    api: FakeApi, client: kube.KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "MAX_RESPONSE_BYTES", 1000)

    async def flood(request: web.Request, _: Proceed) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 500)

    api.fault("GET", "/version", flood)
    with pytest.raises(KubeUnavailableError, match="over 1000 bytes"):
        await client.call("GET", "/version")


async def test_refusals_are_answers_and_their_words_are_kept(api: FakeApi, client: kube.KubeClient) -> None:
    api.fault("GET", "/version", refuse(http.HTTPStatus.FORBIDDEN, "Forbidden", "no " + json.dumps("é")))
    code, answer = await client.call("GET", "/version")
    assert (code, answer["reason"]) == (403, "Forbidden")
    assert answer["message"].startswith("no ")
