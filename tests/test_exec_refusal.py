"""What must not run does not run, and the caller learns why."""

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import OWNER, Daemon, StartDaemon, add_workspace

from session_proxy import app, wire
from session_proxy.devcluster import DevCluster, workspace_manifest

Json = dict[str, Any]


async def refusal(daemon: Daemon, seconds: float = 5) -> Json:
    """Ask for a command that leaves a trace; return the refusal after checking that there is no trace."""
    trace = daemon.cluster.root / "ran"
    async with asyncio.timeout(seconds):
        problem = await daemon.refused({"command": ["touch", str(trace)]})
    await daemon.idle()
    assert not trace.exists()
    return problem


# --- the workspace ----------------------------------------------------------------------------------------------------


async def test_no_pod_is_a_503_with_retry_after(cluster: DevCluster, start: StartDaemon) -> None:
    problem = await refusal(await start(cluster))
    assert (problem["status"], problem["reason"]) == (503, "workspace_not_found")
    assert problem["retryAfter"]
    assert "session=s1,type=workspace" in problem["detail"]


async def test_two_pods_are_ambiguous(daemon: Daemon) -> None:
    add_workspace(daemon.cluster, "another")
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (503, "workspace_ambiguous")
    assert "another, workspace" in problem["detail"]


async def test_a_terminating_pod_beside_a_live_one_does_not_count(daemon: Daemon) -> None:
    add_workspace(daemon.cluster, "another")
    daemon.cluster.mark_deleting("another")
    assert (await daemon.run("true"))[0]["exitCode"] == 0


async def test_a_pod_being_deleted_is_not_running(daemon: Daemon) -> None:
    daemon.cluster.mark_deleting("workspace")
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (503, "workspace_not_running")
    assert "being deleted" in problem["detail"]


async def test_a_crashed_container_is_not_running(daemon: Daemon) -> None:
    daemon.cluster.crash_container("workspace")
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (503, "workspace_not_running")
    assert "CrashLoopBackOff" in problem["detail"]


async def test_a_pod_that_has_not_started_is_not_running(cluster: DevCluster, start: StartDaemon) -> None:
    cluster.add_pod(workspace_manifest("workspace", session="s1", owner_uid=OWNER), running=False)
    problem = await refusal(await start(cluster))
    assert problem["reason"] == "workspace_not_running"


@pytest.mark.parametrize("owner", [None, "99999999-2222-4333-8444-555555555555"])
async def test_a_pod_of_another_owner_is_refused(cluster: DevCluster, start: StartDaemon, owner: str | None) -> None:
    add_workspace(cluster, owner_uid=owner)
    problem = await refusal(await start(cluster))
    assert (problem["status"], problem["reason"]) == (403, "workspace_not_owned")
    assert OWNER in problem["detail"]


def spec(change: Callable[[Json], object]) -> Callable[[Json], None]:
    return lambda pod: (change(pod["spec"]), None)[1]


def container(change: Callable[[Json], object]) -> Callable[[Json], None]:
    return lambda pod: (change(pod["spec"]["containers"][0]), None)[1]


VIOLATIONS: dict[str, tuple[Callable[[Json], None], str]] = {
    "privileged": (
        container(lambda c: c["securityContext"].update(privileged=True)),
        "spec.containers[0].securityContext.privileged",
    ),
    "root": (
        container(lambda c: c["securityContext"].update(runAsUser=0)),
        "spec.containers[0].securityContext.runAsUser",
    ),
    "host network": (spec(lambda s: s.update(hostNetwork=True)), "spec.hostNetwork"),
    "token": (spec(lambda s: s.update(automountServiceAccountToken=True)), "spec.automountServiceAccountToken"),
    "shared processes": (spec(lambda s: s.update(shareProcessNamespace=True)), "spec.shareProcessNamespace"),
}


@pytest.mark.parametrize("kind", VIOLATIONS)
async def test_a_pod_that_violates_the_policy_is_refused_with_the_field(
    cluster: DevCluster, start: StartDaemon, kind: str
) -> None:
    change, path = VIOLATIONS[kind]
    manifest = workspace_manifest("workspace", session="s1", owner_uid=OWNER)
    change(manifest)
    cluster.add_pod(manifest)
    daemon = await start(cluster)
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (403, "workspace_policy_violation")
    assert path in [violation["field"] for violation in problem["violations"]]
    assert set(problem["violations"][0]) == {"field", "value", "expected", "rule", "message"}
    status, body = await daemon.get("/workspace")
    assert (status, body["acceptable"], body["policy"]["ok"]) == (200, False, False)


async def test_an_image_that_is_not_allowed_is_refused(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    problem = await refusal(
        await start(cluster, ALLOWED_IMAGES="registry.example.com/team", REQUIRE_IMAGE_DIGEST="true")
    )
    assert {violation["rule"] for violation in problem["violations"]} == {"session_image", "session_image_digest"}


async def test_the_pod_may_be_named_instead(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster, "mine")
    add_workspace(cluster, "other")
    daemon = await start(cluster, WORKSPACE_POD="mine")
    assert (await daemon.run("true"))[1].seen[0]["pod"] == "mine"
    cluster.delete_pod("mine")
    assert (await refusal(daemon))["reason"] == "workspace_not_found"


async def test_ownership_by_this_very_pod(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    right = await start(cluster, OWNER_UID="", OWNER_MODE="self", POD_UID=OWNER)
    assert (await right.run("true"))[0]["exitCode"] == 0
    wrong = await start(cluster, OWNER_UID="", OWNER_MODE="self", POD_UID="someone-else")
    assert (await refusal(wrong))["reason"] == "workspace_not_owned"


async def test_ownership_by_the_same_controller(cluster: DevCluster, start: StartDaemon) -> None:
    runner = workspace_manifest("runner", session="s1", owner_uid=OWNER)
    runner["metadata"]["labels"]["type"] = "runner"
    uid = cluster.add_pod(runner)["metadata"]["uid"]
    add_workspace(cluster)
    settings = {"OWNER_UID": "", "OWNER_MODE": "sibling", "POD_NAME": "runner"}
    right = await start(cluster, POD_UID=uid, **settings)
    assert (await right.run("true"))[0]["exitCode"] == 0
    wrong = await start(cluster, POD_UID="someone-else", **settings)
    assert (await refusal(wrong))["reason"] == "workspace_not_owned"


# --- between the check and the gate -----------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[DevCluster], object], str]] = {
    "replaced": (lambda cluster: cluster.replace_pod("workspace"), "workspace_not_running"),
    "restarted": (lambda cluster: cluster.restart_container("workspace"), "workspace_not_running"),
    "deleted": (lambda cluster: cluster.delete_pod("workspace"), "workspace_not_found"),
    "terminating": (lambda cluster: cluster.mark_deleting("workspace"), "workspace_not_running"),
    "disowned": (
        lambda cluster: cluster.patch_pod("workspace", lambda pod: pod["metadata"].update(ownerReferences=[])),
        "workspace_not_owned",
    ),
    "given a privileged ephemeral container": (
        lambda cluster: cluster.patch_pod(
            "workspace",
            lambda pod: pod["spec"].update(
                ephemeralContainers=[{"name": "debug", "image": "x", "securityContext": {"privileged": True}}]
            ),
        ),
        "workspace_policy_violation",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_pod_that_changes_before_the_gate_gets_no_command(
    any_cluster: DevCluster, start: StartDaemon, change: str
) -> None:
    act, reason = CHANGES[change]
    add_workspace(any_cluster)
    daemon = await start(any_cluster)
    any_cluster.faults.replace_before_gate = lambda: (act(any_cluster), None)[1]
    trace = any_cluster.root / "ran"
    async with daemon.post({"command": ["touch", str(trace)]}) as response:
        text = await response.text()
    await daemon.idle()
    assert not trace.exists()
    if response.status == 200:  # the container had gone before the wrapper could start in it
        exit_event = json.loads(text.splitlines()[-1])
        assert (exit_event["outcome"], exit_event["reason"]) == ("failed", "container_not_found")
    else:
        assert json.loads(text)["reason"] == reason


async def test_the_gate_believes_only_the_second_look(daemon: Daemon) -> None:
    def restarted(pod: Json) -> Json:
        pod["status"]["containerStatuses"][0]["containerID"] = "containerd://another"
        return pod

    daemon.cluster.faults.get_pod_override = restarted
    problem = await refusal(daemon)
    assert (problem["reason"], "restarted" in problem["detail"]) == ("workspace_not_running", True)


# --- the API server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["list pods", "get pods/exec", "create pods/exec", "get pods"])
async def test_a_missing_permission_is_named(daemon: Daemon, what: str) -> None:
    daemon.cluster.faults.forbidden.add(what)
    problem = await refusal(daemon)
    verb, resource = what.split(" ")
    assert (problem["status"], problem["reason"]) == (502, "kube_forbidden")
    assert (problem["verb"], problem["resource"]) == (verb, resource)
    assert what in problem["detail"]
    status, body = await daemon.get("/readyz")
    assert (status, body["reasons"][-1]["reason"]) == (503, "kube_forbidden")


async def test_a_403_without_a_status_is_no_word_of_rbac(daemon: Daemon) -> None:
    daemon.cluster.faults.forbidden_empty_body = True
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (502, "kube_unavailable")


async def test_a_rejected_credential_is_read_again_once(daemon: Daemon) -> None:
    daemon.cluster.faults.unauthorized = 1
    assert (await daemon.run("true"))[0]["exitCode"] == 0
    daemon.cluster.faults.unauthorized = -1
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (502, "kube_unauthorized")


async def test_an_api_server_that_is_away_is_unavailable(daemon: Daemon) -> None:
    daemon.cluster.faults.unavailable = -1
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (502, "kube_unavailable")
    daemon.cluster.faults.unavailable = 0
    await daemon.cluster.stop()
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"], problem["retryAfter"]) == (502, "kube_unavailable", "2")
    assert (await daemon.get("/livez"))[0] == 200


@pytest.mark.parametrize("what", ["list pods", "exec", "get pods"])
async def test_an_api_server_that_does_not_answer_times_out(
    daemon: Daemon, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("session_proxy.kube.REQUEST_SECONDS", 0.3)
    monkeypatch.setattr("session_proxy.kube.UPGRADE_SECONDS", 0.3)
    daemon.cluster.faults.hang.add(what)
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (504, "kube_timeout")


async def test_a_container_that_gives_no_sign_of_life_times_out(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("session_proxy.executor.GATE_SECONDS", 0.3)
    daemon.cluster.faults.slow_start_seconds = 30
    problem = await refusal(daemon)
    assert (problem["status"], problem["reason"]) == (504, "kube_timeout")


# --- limits -----------------------------------------------------------------------------------------------------------


async def test_more_than_the_slots_is_refused_with_retry_after(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, MAX_CONCURRENT_EXECS="2")
    streams = [await daemon.open("sleep", "60") for _ in range(2)]
    problem = await refusal_while_busy(daemon)
    assert (problem["status"], problem["reason"], problem["retryAfter"]) == (429, "too_many_execs", "1")
    assert (await daemon.get("/limits"))[1]["running"] == 2
    for stream in streams:
        stream.response.close()
    await daemon.idle()
    assert (await daemon.run("true"))[0]["exitCode"] == 0


async def refusal_while_busy(daemon: Daemon) -> Json:
    return await daemon.refused()


async def test_more_than_the_rate_is_refused_with_retry_after(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, EXEC_RATE_PER_SECOND="0.5", EXEC_BURST="2")
    for _ in range(2):
        assert (await daemon.run("true"))[0]["exitCode"] == 0
    problem = await daemon.refused()
    assert (problem["status"], problem["reason"], problem["retryAfter"]) == (429, "rate_limited", "2")


async def test_the_limits_in_force_are_told(cluster: DevCluster, start: StartDaemon) -> None:
    daemon = await start(cluster, EXEC_TIMEOUT_MAX_SECONDS="77", EXEC_TIMEOUT_SECONDS="7", MAX_REQUEST_BYTES="5000")
    _, limits = await daemon.get("/limits")
    assert (limits["maxTimeoutSeconds"], limits["timeoutSeconds"], limits["maxRequestBytes"]) == (77, 7, 5000)
    assert (await daemon.refused({"command": ["true"], "timeoutSeconds": 78}))["member"] == "timeoutSeconds"


# --- the request ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str | None]] = {
    "no object": ([], None),
    "not JSON": (b"{", None),
    "not UTF-8": (b'{"command":["\xff"]}', None),
    "duplicate key": (b'{"command":["true"],"command":["true"]}', "command"),
    "deep": (b"[" * 100_000, None),
    "no command": ({}, "command"),
    "empty command": ({"command": []}, "command"),
    "unknown member": ({"command": ["true"], "tty": True}, "tty"),
    "NUL": ({"command": ["a\0b"]}, "command[0]"),
    "relative cwd": ({"command": ["true"], "cwd": "here"}, "cwd"),
    "both stdin": ({"command": ["true"], "stdin": "", "stdinBase64": ""}, "stdinBase64"),
    "bad base64": ({"command": ["true"], "stdinBase64": "*"}, "stdinBase64"),
    "timeout": ({"command": ["true"], "timeoutSeconds": 0}, "timeoutSeconds"),
    "long argument": ({"command": ["true", "x" * 131_072]}, "command[1]"),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_request_names_the_member_and_starts_nothing(daemon: Daemon, kind: str) -> None:
    body, member = BAD[kind]
    problem = await daemon.refused(body)
    assert (problem["status"], problem["reason"]) == (400, "invalid_request")
    assert problem.get("member") == member
    assert len(problem["detail"]) < 500
    assert not daemon.cluster.execs
    assert daemon.executor.running == 0


async def test_a_body_that_is_too_large_is_refused(cluster: DevCluster, start: StartDaemon) -> None:
    daemon = await start(cluster, MAX_REQUEST_BYTES="2000")
    problem = await daemon.refused({"command": ["true"], "stdin": "x" * 2000})
    assert (problem["status"], problem["reason"]) == (413, "request_too_large")

    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 100

    async with daemon.http.post(f"{daemon.url}/exec", data=chunks()) as response:
        assert response.status == 413


async def test_a_half_sent_body_is_closed_after_a_bounded_time(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    host, port = daemon.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    answer = await asyncio.wait_for(reader.read(), 5)
    assert b" 408 " in answer.splitlines()[0]
    assert b"request_timeout" in answer
    writer.close()
    assert daemon.executor.running == 0


async def test_a_half_sent_head_is_closed_after_a_bounded_time(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    host, port = daemon.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /exec HTTP/1.1\r\nHost: local")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_unknown_routes_methods_and_formats_are_problems(daemon: Daemon) -> None:
    for method, path, headers, status, reason in (
        ("GET", "/nope", {}, 404, "not_found"),
        ("GET", "/exec", {}, 405, "method_not_allowed"),
        ("GET", "/execs/0123456789abcdef", {}, 404, "not_found"),
        ("DELETE", "/execs/nope", {}, 404, "not_found"),
        ("POST", "/exec", {"Accept": "image/png"}, 406, "not_acceptable"),
    ):
        async with daemon.http.request(method, daemon.url + path, headers=headers) as response:
            problem = await response.json(content_type="application/problem+json")
            assert (response.status, problem["reason"]) == (status, reason)
            assert response.headers["X-Request-Id"] == problem["requestId"]


# --- who may talk to it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8080", "127.9.9.9", "a.localhost"])
async def test_loopback_hosts_are_let_in(daemon: Daemon, host: str) -> None:
    async with daemon.http.get(f"{daemon.url}/livez", headers={"Host": host}) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "10.0.0.1:8080",
        "",
        "127.0.0.1.nip.io",
        "[fe80::1]",
        "[::1]evil.example",
        "localhost:80@evil.example",
        "localhost:8080:80",
    ],
)
async def test_other_hosts_are_refused(daemon: Daemon, host: str) -> None:
    problem = await daemon.refused(headers={"Host": host})
    assert (problem["status"], problem["reason"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://localhost"}, {"Origin": "null"}, {"Sec-Fetch-Site": "same-origin"}]
)
async def test_web_pages_are_refused(daemon: Daemon, headers: dict[str, str]) -> None:
    problem = await daemon.refused(headers=headers)
    assert (problem["status"], problem["reason"]) == (403, "origin_not_allowed")


async def test_a_token_is_demanded_when_set(cluster: DevCluster, start: StartDaemon, tmp_path: Path) -> None:
    add_workspace(cluster)
    (tmp_path / "token").write_text("s3cret\n")
    daemon = await start(cluster, LISTEN_TOKEN_FILE=str(tmp_path / "token"))
    for wrong in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer s3cre"},
        {"Authorization": "Basic s3cret"},
    ):
        problem = await daemon.refused(headers=wrong)
        assert (problem["status"], problem["reason"]) == (401, "unauthorized")
    async with daemon.post({"command": ["true"]}, {"Authorization": "bearer s3cret"}) as response:
        assert response.status == 200


async def test_a_unix_socket_checks_who_connects(cluster: DevCluster, start: StartDaemon, tmp_path: Path) -> None:
    add_workspace(cluster)
    import os

    path = tmp_path / "proxy.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    uid = os.getuid()
    daemon = await start(cluster, LISTEN_SOCKET=str(path), LISTEN_SOCKET_UIDS=f"{uid},4242")
    assert path.stat().st_mode & 0o777 == 0o660
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http:
        async with http.post("http://localhost/exec", json={"command": ["true"]}) as response:
            assert (response.status, json.loads((await response.text()).splitlines()[-1])) == (200, {"exitCode": 0})
    stranger = await start(cluster, LISTEN_SOCKET=str(tmp_path / "other.sock"), LISTEN_SOCKET_UIDS="4242")
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "other.sock"))) as http:
        async with http.post("http://localhost/exec", json={"command": ["true"]}) as response:
            assert (response.status, (await response.json(content_type=None))["reason"]) == (403, "peer_not_allowed")
    assert daemon.executor.running == stranger.executor.running == 0


async def test_form_data_content_types_are_read_as_json(daemon: Daemon) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with daemon.post({"command": ["echo", "hi"]}, headers) as response:
        assert (await response.text()).startswith("hi\n")


async def test_stdin_may_be_base64(daemon: Daemon) -> None:
    _, stream = await daemon.run("cat", stdinBase64=base64.b64encode(b"\xff\0").decode())
    assert stream.data("stdout") == b"\xff\0"


# --- what HTTP makes possible -------------------------------------------------------------------------------------------


async def answer_to(daemon: Daemon, head: str, body: bytes = b'{"command":["true"]}') -> bytes:
    host, port = daemon.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = f"POST /exec HTTP/1.1\r\n{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(request.encode() + body)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


async def test_a_body_that_is_not_what_its_encoding_says_is_a_400(daemon: Daemon) -> None:
    answer = await answer_to(daemon, "Host: localhost\r\nContent-Encoding: gzip\r\n", b"not gzip")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"invalid_request"' in answer


async def test_expect_is_not_answered_before_the_host_was_checked(daemon: Daemon) -> None:
    for expect in ("100-continue", "something"):
        answer = await answer_to(daemon, f"Host: evil.example\r\nExpect: {expect}\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert b'"host_not_allowed"' in answer


async def test_accept_may_come_in_two_lines(daemon: Daemon) -> None:
    head = "Host: localhost\r\nAccept: text/html\r\nAccept: application/x-ndjson\r\n"
    assert b"\r\nContent-Type: application/x-ndjson\r\n" in await answer_to(daemon, head)


async def test_a_defect_in_mid_response_ends_the_exec_and_the_connection(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise KeyError("a defect")

    monkeypatch.setattr(wire.NdjsonEncoder, "output", fail)
    async with asyncio.timeout(5), daemon.post({"command": ["sh", "-c", "echo x; exec sleep 60"]}) as response:
        with contextlib.suppress(Exception):
            await response.read()
    await daemon.idle()


async def test_no_header_is_quoted_in_the_log(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    await answer_to(daemon, "Host: localhost\r\nAuthorization: Bearer s3cr3t\x00\r\n")
    assert "s3cr3t" not in caplog.text
    assert "s3cr3t" not in repr(daemon.logs)


async def test_large_bodies_are_read_a_few_at_a_time(cluster: DevCluster, start: StartDaemon) -> None:
    """Half-sent bodies are bounded in number, too; small requests get through beside them."""
    add_workspace(cluster)
    daemon = await start(cluster, MAX_CONCURRENT_EXECS="2")
    host, port = daemon.url.removeprefix("http://").split(":")
    large = json.dumps({"command": ["wc", "-c"], "stdin": "x" * 200_000}).encode()
    head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(large)}\r\n\r\n".encode()
    writers = []
    for _ in range(2):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + large[:100_000])
        writers.append(writer)
    async with asyncio.timeout(5):
        while (problem := await daemon.refused_or_run(large)) is None:
            pass
    assert (problem["status"], problem["reason"], problem["retryAfter"]) == (429, "too_many_execs", "1")
    assert (await daemon.run("echo", "small"))[1].data("stdout") == b"small\n"
    for writer in writers:
        writer.close()
    async with asyncio.timeout(5):
        while await daemon.refused_or_run(large) is not None:
            pass
