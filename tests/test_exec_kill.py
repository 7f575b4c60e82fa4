"""A kill leaves nothing behind, and says so."""

import asyncio
import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import DEFAULTS, NDJSON, Daemon, StartDaemon, add_workspace, gone, processes_with

from session_proxy.devcluster import DevCluster

PYTHON = sys.executable

FAMILY = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("grandchild", flush=True)
        time.sleep(60)
    os._exit(0)
os.wait()
print("ready", flush=True)
time.sleep(60)
"""
"""A command whose grandchild called setsid, lost its parent, and ignores TERM."""


@pytest.fixture
async def killing(any_cluster: DevCluster, start: StartDaemon) -> tuple[Daemon, str]:
    add_workspace(any_cluster)
    return await start(any_cluster), secrets.token_hex(8)


async def run_family(daemon: Daemon, mark: str, **members: Any) -> Any:
    stream = await daemon.open(PYTHON, "-c", FAMILY, mark, **members)
    await stream.until("stdout", b"grandchild")
    await stream.until("stdout", b"ready")
    assert len(processes_with(mark)) >= 2
    return stream


async def test_a_timeout_kills_everything(killing: tuple[Daemon, str]) -> None:
    daemon, mark = killing
    stream = await run_family(daemon, mark, timeoutSeconds=0.5)
    exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["exitCode"], exit_event["reaped"]) == ("timeout", None, True), daemon.logs
    assert await gone(mark, 0.1)
    await daemon.idle()


async def test_an_idle_timeout_kills_everything(killing: tuple[Daemon, str]) -> None:
    daemon, mark = killing
    stream = await run_family(daemon, mark, idleTimeoutSeconds=0.5)
    exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reaped"]) == ("idle_timeout", True)
    assert await gone(mark, 0.1)


async def test_a_command_that_prints_is_not_idle(daemon: Daemon) -> None:
    script = "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done"
    exit_event, _ = await daemon.run("sh", "-c", script, idleTimeoutSeconds=0.4)
    assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 0)


async def test_the_output_limit_delivers_exactly_that_many_bytes(killing: tuple[Daemon, str]) -> None:
    daemon, mark = killing
    script = 'while :; do echo "0123456789"; done'
    exit_event, stream = await daemon.run("sh", "-c", script, mark, maxOutputBytes=100_001)
    assert (exit_event["outcome"], exit_event["reaped"]) == ("output_limit", True)
    assert len(stream.data("stdout")) == exit_event["stdoutBytes"] == 100_001
    assert await gone(mark, 0.1)


async def test_output_of_exactly_the_limit_is_no_breach(daemon: Daemon) -> None:
    exit_event, stream = await daemon.run("printf", "12345", maxOutputBytes=5)
    assert (exit_event["outcome"], exit_event["exitCode"], stream.data("stdout")) == ("exited", 0, b"12345")


async def test_the_setting_caps_the_output_of_every_exec(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, MAX_OUTPUT_BYTES="10")
    exit_event, stream = await daemon.run("head", "-c", "1000", "/dev/zero", maxOutputBytes=500)
    assert (exit_event["outcome"], len(stream.data("stdout"))) == ("output_limit", 10)


async def test_delete_kills_everything(killing: tuple[Daemon, str]) -> None:
    daemon, mark = killing
    stream = await run_family(daemon, mark)
    async with daemon.http.delete(f"{daemon.url}/execs/{stream.id}") as response:
        assert response.status == 202
        assert (await response.json())["state"] == "ending"
    exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reason"], exit_event["reaped"]) == ("cancelled", "deleted", True), (
        daemon.logs
    )
    assert await gone(mark, 0.1)
    async with daemon.http.delete(f"{daemon.url}/execs/{stream.id}") as response:
        assert response.status == 200
        assert (await response.json())["outcome"] == "cancelled"


async def test_what_a_command_prints_on_term_still_arrives(daemon: Daemon) -> None:
    stream = await daemon.open("sh", "-c", 'trap "echo goodbye; exit 0" TERM; echo ready; while :; do sleep 0.05; done')
    await stream.until("stdout", b"ready")
    async with daemon.http.delete(f"{daemon.url}/execs/{stream.id}"):
        pass
    exit_event = await stream.rest()
    assert stream.data("stdout") == b"ready\ngoodbye\n"
    assert (exit_event["outcome"], exit_event["exitCode"], exit_event["reaped"]) == ("cancelled", None, True)


async def test_a_client_that_goes_away_kills_everything(killing: tuple[Daemon, str]) -> None:
    daemon, mark = killing
    stream = await run_family(daemon, mark)
    stream.response.close()
    record = await daemon.ended(stream.id)
    assert (record["outcome"], record["reason"], record["reaped"]) == ("cancelled", "client_gone", True)
    assert await gone(mark, 0.1)
    await daemon.idle()


async def test_a_client_that_goes_away_before_the_gate_runs_nothing(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster)
    cluster.faults.hang.add("list pods")
    posting = asyncio.create_task(daemon.open("true"))
    async with asyncio.timeout(5):
        while not daemon.executor.running:
            await asyncio.sleep(0.01)
    posting.cancel()
    await asyncio.wait({posting})
    await daemon.idle()
    assert not cluster.execs


async def test_shutdown_ends_and_kills_everything_and_refuses(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster)
    mark = secrets.token_hex(8)
    stream = await run_family(daemon, mark)
    stopping = asyncio.create_task(daemon.executor.shutdown(6))
    await asyncio.sleep(0)
    problem = await daemon.refused()
    assert (problem["status"], problem["reason"]) == (503, "shutting_down")
    assert problem["retryAfter"]
    status, body = await daemon.get("/readyz")
    assert (status, body["reasons"][0]["reason"]) == (503, "shutting_down")
    exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reaped"]) == ("shutdown", True)
    await stopping
    assert await gone(mark, 0.1)


async def test_a_kill_needs_no_slot(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, MAX_CONCURRENT_EXECS="1")
    stream = await daemon.open("sleep", "60")
    assert (await daemon.refused())["reason"] == "too_many_execs"
    async with daemon.http.delete(f"{daemon.url}/execs/{stream.id}") as response:
        assert response.status == 202
    assert (await stream.rest())["reaped"] is True
    await daemon.idle()
    assert (await daemon.run("true"))[0]["exitCode"] == 0


async def test_another_exec_is_left_alone(daemon: Daemon) -> None:
    bystander = await daemon.open("sh", "-c", "read x; sleep 1.5; echo alive", stdin="x\n")
    exit_event, _ = await daemon.run("sleep", "60", timeoutSeconds=0.2)
    assert exit_event["reaped"] is True
    await bystander.rest()
    assert bystander.data("stdout") == b"alive\n"


async def test_a_reaper_that_cannot_be_opened_is_told_truthfully(daemon: Daemon) -> None:
    mark = secrets.token_hex(8)
    stream = await daemon.open("sh", "-c", "echo ready; sleep 60", mark, timeoutSeconds=0.5)
    await stream.until("stdout", b"ready")
    daemon.cluster.faults.forbidden.add("create pods/exec")
    exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reaped"]) == ("timeout", False)
    # The wrapper saw the end of its standard input all the same.
    assert await gone(mark, 3)


async def test_no_process_and_no_zombie_of_a_natural_end_is_left(daemon: Daemon) -> None:
    mark = secrets.token_hex(8)
    exit_event, stream = await daemon.run("sh", "-c", "echo done", mark, stdin="unread" * 50_000)
    assert exit_event["exitCode"] == 0
    assert await gone(mark, 1)
    assert await gone(stream.id, 1)


# --- the daemon as a process of its own ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def daemon_process(cluster: DevCluster, tmp_path: Path, **settings: str) -> AsyncIterator[tuple[Any, str]]:
    environment = DEFAULTS | {
        "KUBECONFIG": str(cluster.write_kubeconfig(tmp_path / "kubeconfig")),
        "PATH": os.environ["PATH"],
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        PYTHON, "-m", "session_proxy", "serve", env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        while True:
            line = json.loads(await asyncio.wait_for(process.stderr.readline(), 10))
            if line["event"] == "listening":
                break
        yield process, f"http://{line['address']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def open_on(http: aiohttp.ClientSession, url: str, *command: str) -> aiohttp.ClientResponse:
    return await http.post(f"{url}/exec", json={"command": command}, headers=NDJSON)


async def test_sigterm_ends_with_shutdown_and_exit_status_zero(cluster: DevCluster, tmp_path: Path) -> None:
    add_workspace(cluster)
    mark = secrets.token_hex(8)
    async with daemon_process(cluster, tmp_path) as (process, url), aiohttp.ClientSession() as http:
        response = await open_on(http, url, PYTHON, "-c", FAMILY, mark)
        text = b""
        while b"ready" not in text or b"grandchild" not in text:
            text += await response.content.readline()
        process.send_signal(signal.SIGTERM)
        events = [json.loads(line) async for line in response.content]
        assert (events[-1]["outcome"], events[-1]["reaped"]) == ("shutdown", True)
        assert await asyncio.wait_for(process.wait(), 8) == 0
        assert await gone(mark, 0.1)


async def test_the_drain_keeps_its_time_when_the_api_server_is_frozen(cluster: DevCluster, tmp_path: Path) -> None:
    """Nothing can be reaped then, no websocket says goodbye, and the readers take nothing either."""
    add_workspace(cluster)
    drain, slack = 4.0, 0.5  # the interpreter's own end is not the daemon's to bound
    async with daemon_process(cluster, tmp_path, DRAIN_SECONDS=str(drain)) as (process, url):
        async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as readers:
            host, port = url.removeprefix("http://").split(":")
            body = json.dumps({"command": ["cat", "/dev/zero"]})
            for _ in range(3):
                reader = readers.enter_context(socket.create_connection((host, int(port))))
                head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                reader.sendall((head + body).encode())
            async with asyncio.timeout(10):
                execs: list[dict[str, Any]] = []
                while len(execs) < 3 or any(record["stdoutBytes"] < 300_000 for record in execs):
                    await asyncio.sleep(0.05)
                    async with http.get(f"{url}/execs") as response:
                        execs = (await response.json())["execs"]
            ended = os.pidfd_open(process.pid)
            readers.callback(os.close, ended)
            process.send_signal(signal.SIGTERM)
            # The API server runs in this thread: while it waits here, nothing is answered.
            assert select.select([ended], [], [], drain + slack)[0]
        assert await asyncio.wait_for(process.wait(), 5) == 0


async def test_a_sigkilled_sidecar_leaves_no_process_of_the_commands_group(
    any_cluster: DevCluster, tmp_path: Path
) -> None:
    add_workspace(any_cluster)
    mark = secrets.token_hex(8)
    script = 'trap "" TERM; sleep 60 & sleep 61 & echo ready; wait'
    async with daemon_process(any_cluster, tmp_path) as (process, url), aiohttp.ClientSession() as http:
        response = await open_on(http, url, "sh", "-c", script, mark)
        while b"ready" not in await response.content.readline():
            pass
        process.send_signal(signal.SIGKILL)
        await process.wait()
        assert await gone(mark, 3)
        response.close()


async def test_a_sigkilled_client_leaves_nothing(cluster: DevCluster, tmp_path: Path) -> None:
    add_workspace(cluster)
    mark = secrets.token_hex(8)
    program = (
        "import http.client, json, sys\nc = http.client.HTTPConnection(sys.argv[1])\n"
        "c.request('POST', '/exec', json.dumps({'command': sys.argv[2:]}))\nr = c.getresponse()\n"
        "while True: print(r.read1(), flush=True)\n"
    )
    async with daemon_process(cluster, tmp_path) as (_, url):
        client = await asyncio.create_subprocess_exec(
            PYTHON, "-c", program, url.removeprefix("http://"), PYTHON, "-c", FAMILY, mark, stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        text = b""
        while b"ready" not in text or b"grandchild" not in text:
            text += await asyncio.wait_for(client.stdout.readline(), 10)
        client.kill()
        await client.communicate()
        assert await gone(mark, 3)


async def test_a_limit_met_just_before_the_status_is_still_the_outcome(daemon: Daemon) -> None:
    """A slow reader: what exceeds the limit and the Status wait in one queue, and are read in one go."""
    loop = asyncio.get_running_loop()
    host, port = daemon.url.removeprefix("http://").split(":")
    body = json.dumps({"command": ["head", "-c", "900000", "/dev/zero"], "maxOutputBytes": 895_000}).encode()
    for _ in range(3):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, (host, int(port)))
            head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            await loop.sock_sendall(sock, head.encode() + body)
            await asyncio.sleep(0.5)
            got = b""
            while data := await asyncio.wait_for(loop.sock_recv(sock, 1 << 20), 10):
                got += data
        assert b'"outcome":"output_limit"' in got[-300:]


async def test_a_command_that_ended_by_itself_is_not_cancelled_any_more(daemon: Daemon) -> None:
    """137 is believed only after a while; whoever says DELETE then is told that there is nothing to kill."""
    stream = await daemon.open("sh", "-c", "kill -KILL $$")
    async with asyncio.timeout(5):
        while (await daemon.exec_of(stream.id))["state"] != "ending":
            await asyncio.sleep(0.01)
    async with daemon.http.delete(f"{daemon.url}/execs/{stream.id}") as response:
        assert response.status == 200
    exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 137)


async def test_what_left_the_process_group_is_killed_in_a_pod_that_is_being_deleted(daemon: Daemon) -> None:
    """In its grace period the container goes on running, and so would a process that called setsid."""
    mark = secrets.token_hex(8)
    stream = await daemon.open(PYTHON, "-c", FAMILY, mark)
    await stream.until("stdout", b"ready")
    daemon.cluster.mark_deleting("workspace")
    exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reason"], exit_event["reaped"]) == ("lost", "pod_deleted", True)
    assert await gone(mark, 1)
