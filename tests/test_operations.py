"""What operators rely on: logs without secrets, metrics, readiness, the service's own description."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEFAULTS, Daemon, StartDaemon, add_workspace
from prometheus_client.parser import text_string_to_metric_families

from session_proxy.devcluster import DevCluster

PYTHON = sys.executable


async def metrics(daemon: Daemon) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    async with daemon.http.get(f"{daemon.url}/metrics") as response:
        assert response.status == 200
        text = await response.text()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_each_exec_leaves_one_audit_record(daemon: Daemon) -> None:
    _, stream = await daemon.run("sh", "-c", "echo hunter2; exit 3", env={"PASSWORD": "hunter2"}, stdin="hunter2")
    (record,) = [line for line in daemon.logs if line["event"] == "exec"]
    assert record["id"] == stream.id
    assert record["request_id"] == stream.response.headers["X-Request-Id"]
    assert (record["program"], record["argument_count"]) == ("sh", 2)
    assert (record["outcome"], record["exit_code"], record["pod"]) == ("exited", 3, "workspace")
    assert (record["stdout_bytes"], record["stderr_bytes"]) == (8, 0)
    assert {"locate_ms", "upgrade_ms", "gate_ms", "first_byte_ms", "duration_ms"} <= set(record)


async def test_no_secret_and_no_command_is_logged(daemon: Daemon) -> None:
    await daemon.run("sh", "-c", "echo hunter2 # hunter2", env={"PASSWORD": "hunter2"}, stdin="hunter2")
    await daemon.refused({"command": ["true"], "env": {"PASSWORD": 5, "hunter2": "hunter2"}})
    await daemon.refused({"command": ["true"], "stdin": "hunter2\0"})
    daemon.cluster.faults.unauthorized = -1
    await daemon.refused()
    text = json.dumps(daemon.logs, default=str)
    assert len(daemon.logs) >= 5
    assert "hunter2" not in text
    assert daemon.cluster.token not in text
    async with daemon.http.get(f"{daemon.url}/metrics") as response:
        assert daemon.cluster.token not in await response.text()


async def test_commands_are_logged_when_asked_for(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, LOG_COMMANDS="true")
    await daemon.run("echo", "visible")
    (record,) = [line for line in daemon.logs if line["event"] == "exec"]
    assert record["command"] == ["echo", "visible"]


async def test_a_given_request_id_is_kept_and_a_bad_one_replaced(daemon: Daemon) -> None:
    for given, kept in (("trace-1", True), ("a b", False), ("x" * 200, False)):
        async with daemon.post({"command": ["true"]}, {"X-Request-Id": given}) as response:
            assert (response.headers["X-Request-Id"] == given) is kept


async def test_ownership_that_is_not_checked_is_said_out_loud(cluster: DevCluster, start: StartDaemon) -> None:
    daemon = await start(cluster, OWNER_UID="", OWNER_MODE="none")
    assert [line["level"] for line in daemon.logs if line["event"] == "ownership_not_checked"] == ["warning"]


async def test_metrics_count_what_happened(daemon: Daemon) -> None:
    await daemon.run("sh", "-c", "printf 12345; printf 123 >&2")
    await daemon.run("sleep", "60", timeoutSeconds=0.2)
    await daemon.refused([])
    seen = await metrics(daemon)
    assert seen["session_proxy_execs_total", (("outcome", "exited"),)] == 1
    assert seen["session_proxy_execs_total", (("outcome", "timeout"),)] == 1
    assert seen["session_proxy_exec_output_bytes_total", (("stream", "stdout"),)] == 5
    assert seen["session_proxy_exec_output_bytes_total", (("stream", "stderr"),)] == 3
    assert seen["session_proxy_refusals_total", (("reason", "invalid_request"),)] == 1
    assert seen["session_proxy_reaps_total", (("result", "verified"),)] == 1
    assert seen["session_proxy_execs_in_flight", ()] == 0
    assert seen["session_proxy_exec_first_byte_seconds_count", ()] == 1
    call = (("code", "101"), ("resource", "pods/exec"), ("verb", "get"))
    assert seen["session_proxy_kube_requests_total", call] == 3
    assert seen["session_proxy_exec_duration_seconds_count", (("outcome", "timeout"),)] == 1


async def test_execs_in_flight_are_counted(daemon: Daemon) -> None:
    stream = await daemon.open("sleep", "60")
    assert (await metrics(daemon))["session_proxy_execs_in_flight", ()] == 1
    stream.response.close()
    await daemon.idle()
    assert (await metrics(daemon))["session_proxy_execs_in_flight", ()] == 0


async def test_readiness_follows_the_workspace_and_rbac(
    cluster: DevCluster, start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("session_proxy.readiness.CACHE_SECONDS", 0)
    daemon = await start(cluster)
    status, body = await daemon.get("/readyz")
    assert (status, [reason["reason"] for reason in body["reasons"]]) == (503, ["workspace_not_found"])
    add_workspace(cluster)
    assert await daemon.get("/readyz") == (200, {"status": "ok", "reasons": []})
    cluster.faults.forbidden.add("watch pods")
    status, body = await daemon.get("/readyz")
    assert (status, "watch pods" in body["reasons"][0]["detail"]) == (503, True)
    cluster.faults.forbidden.clear()
    cluster.faults.unavailable = -1
    status, body = await daemon.get("/readyz")
    assert (status, body["reasons"][0]["reason"]) == (503, "kube_unavailable")
    assert (await daemon.get("/livez"))[0] == (await daemon.get("/health"))[0] == 200


async def test_readiness_is_asked_once_for_many_probes(daemon: Daemon) -> None:
    await asyncio.gather(*(daemon.get("/readyz") for _ in range(10)))
    assert sum(request == ("list", "pods") for request in daemon.cluster.requests) == 1


async def test_the_history_is_bounded(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        await daemon.run("true")
    _, body = await daemon.get("/execs")
    assert [record["state"] for record in body["execs"]] == ["ended"] * 3
    assert daemon.executor._ended.maxlen == 100


def serve(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **settings}
    return subprocess.run(
        [PYTHON, "-m", "session_proxy", "serve", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_all_wrong_settings_are_told_at_once_with_exit_status_78() -> None:
    done = serve("--listen-addr", "0.0.0.0:80", EXEC_BURST="many", OWNER_MODE="anyone")
    assert done.returncode == 78
    for text in ("SESSION_NAME", "LISTEN_ADDR", "0.0.0.0:80", "EXEC_BURST", "'many'", "OWNER_MODE", "'anyone'"):
        assert text in done.stderr


def test_a_missing_kubeconfig_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    done = serve(KUBECONFIG=str(tmp_path / "none"), **(DEFAULTS | {"LISTEN_ADDR": "127.0.0.1:0"}))
    assert done.returncode == 78
    assert "KUBECONFIG" in done.stderr


def test_an_empty_token_file_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" \n")
    done = serve(LISTEN_TOKEN_FILE=str(tmp_path / "token"), **DEFAULTS)
    assert done.returncode == 78
    assert "LISTEN_TOKEN_FILE" in done.stderr


async def test_an_address_in_use_is_told_with_exit_status_71(daemon: Daemon, tmp_path: Path) -> None:
    path = daemon.cluster.write_kubeconfig(tmp_path / "kubeconfig2")
    settings = DEFAULTS | {"LISTEN_ADDR": daemon.url.removeprefix("http://"), "KUBECONFIG": str(path)}
    done = await asyncio.to_thread(serve, **settings)
    assert done.returncode == 71
    assert "cannot_listen" in done.stderr


async def test_health_asks_the_running_daemon(daemon: Daemon) -> None:
    def health(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PYTHON, "-m", "session_proxy", "health", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )

    address = daemon.url.removeprefix("http://")
    assert (await asyncio.to_thread(health, "--listen-addr", address)).returncode == 0
    assert (await asyncio.to_thread(health, "--ready", "--listen-addr", address)).returncode == 0
    daemon.cluster.delete_pod("workspace")
    await asyncio.sleep(2.1)  # the readiness cache
    unready = await asyncio.to_thread(health, "--ready", "--listen-addr", address)
    assert unready.returncode == 1
    assert "workspace_not_found" in unready.stderr
    assert (await asyncio.to_thread(health, "--listen-addr", "127.0.0.1:1")).returncode == 1


async def test_dev_mode_serves_and_stops(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        PYTHON, "-m", "session_proxy", "dev", "--listen-addr", ":0", "--dir", str(tmp_path / "work"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        first = (await asyncio.wait_for(process.stdout.readline(), 10)).decode()
        address = first.split("http://")[1].strip()
        reader, writer = await asyncio.open_connection(*address.split(":"))
        body = b'{"command":["sh","-c","pwd; exit 6"]}'
        writer.write(b"POST /exec HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert b'{"exitCode":6}' in answer
        assert str(tmp_path / "work").encode() in answer
        writer.close()
        assert "not a sandbox" in (await process.stdout.readline()).decode()
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 0


async def test_the_history_keeps_nothing_of_a_request(daemon: Daemon) -> None:
    await daemon.run("true", "secret", env={"TOKEN": "secret"}, stdin="x" * 900_000)
    (execution,) = daemon.executor.list()
    assert execution.request.stdin is None
    assert "secret" not in repr(execution.request)
    assert (await daemon.exec_of(execution.id))["argumentCount"] == 1


async def test_health_asks_where_it_is_let_in(cluster: DevCluster, start: StartDaemon, tmp_path: Path) -> None:
    """The user ids of LISTEN_SOCKET_UIDS are the clients', and the sidecar's own need not be among them."""
    daemon = await start(cluster, LISTEN_SOCKET=str(tmp_path / "proxy.sock"), LISTEN_SOCKET_UIDS="4242")
    environment = {
        "PATH": os.environ["PATH"],
        "LISTEN_ADDR": daemon.url.removeprefix("http://"),
        "LISTEN_SOCKET": str(tmp_path / "proxy.sock"),
        "LISTEN_SOCKET_UIDS": "4242",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "session_proxy", "health", env=environment, stderr=subprocess.PIPE
    )
    _, said = await process.communicate()
    assert (process.returncode, said) == (0, b"")


async def test_a_workspace_that_is_named_needs_no_list(cluster: DevCluster, start: StartDaemon) -> None:
    """So the Role need not have it, and readiness does not ask for it."""
    add_workspace(cluster)
    cluster.faults.forbidden.add("list pods")
    named = await start(cluster, WORKSPACE_POD="workspace")
    assert await named.get("/readyz") == (200, {"status": "ok", "reasons": []})
    assert (await named.run("echo", "ok"))[1].data("stdout") == b"ok\n"
    by_selector = await start(cluster)
    status, readiness = await by_selector.get("/readyz")
    assert status == 503
    assert "list pods" in " ".join(reason["detail"] for reason in readiness["reasons"])
