"""A slow reader slows the command down; it does not grow memory, and one that stops loses its exec."""

import asyncio
import asyncio.sslproto
import contextlib
import json
import secrets
import socket
import ssl
from typing import Any

import pytest
from conftest import Daemon, StartDaemon, add_workspace, gone

from session_proxy import kube
from session_proxy.devcluster import DevCluster
from session_proxy.limits import OUTPUT_BUFFER_BYTES
from session_proxy.remotecommand import STDIN_FRAME_BYTES


async def stalled_reader(daemon: Daemon, *command: str, accept: str = "text/plain") -> socket.socket:
    """Send a request and read nothing of its answer."""
    loop = asyncio.get_running_loop()
    host, port = daemon.url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    sock.setblocking(False)
    await loop.sock_connect(sock, (host, int(port)))
    body = json.dumps({"command": command}).encode()
    head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(sock, head.encode() + body)
    return sock


async def settled(daemon: Daemon, count: int) -> list[dict[str, Any]]:
    """Wait until ``count`` execs run and none of them makes progress any more."""
    before: list[int] = []
    async with asyncio.timeout(30):
        while True:
            await asyncio.sleep(0.3)
            execs = (await daemon.get("/execs"))[1]["execs"]
            now = [record["stdoutBytes"] for record in execs]
            if len(now) == count and now == before and all(now):
                return list(execs)
            before = now


async def test_a_reader_that_stops_holds_a_bounded_amount(daemon: Daemon) -> None:
    mark = secrets.token_hex(8)
    sock = await stalled_reader(daemon, "sh", "-c", "exec cat /dev/zero", mark)
    (record,) = await settled(daemon, 1)
    execution = daemon.executor.get(record["id"])
    assert execution.output.size <= OUTPUT_BUFFER_BYTES + STDIN_FRAME_BYTES
    # Buffers of ours, of both sockets and of the client: nothing near what an unbounded producer made.
    assert record["stdoutBytes"] < 16 << 20
    assert (await daemon.run("true"))[0]["exitCode"] == 0
    sock.close()
    await daemon.idle()
    assert await gone(mark, 0.1)


async def test_a_read_from_the_api_server_over_tls_is_bounded() -> None:
    # asyncio has no setting for it: this notices when the constant that stands for one is no longer heeded.
    context = ssl.create_default_context()
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    protocol = asyncio.sslproto.SSLProtocol(loop, asyncio.Protocol(), context, waiter, server_hostname="localhost")
    room = len(protocol.get_buffer(-1))
    protocol.connection_lost(None)
    assert room == kube.TLS_READ_BYTES


async def test_a_reader_that_stalls_too_long_loses_its_exec(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, STALL_SECONDS="1")
    mark = secrets.token_hex(8)
    sock = await stalled_reader(daemon, "sh", "-c", "exec cat /dev/zero", mark)
    (record,) = await settled(daemon, 1)
    verdict = await daemon.ended(record["id"])
    assert (verdict["outcome"], verdict["reason"], verdict["reaped"]) == ("cancelled", "client_stalled", True)
    assert await gone(mark, 0.1)
    await daemon.idle()
    sock.close()


async def test_a_slow_reader_is_not_a_stalled_one(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, STALL_SECONDS="1")
    size = 2 << 20
    sock = await stalled_reader(daemon, "head", "-c", str(size), "/dev/zero")
    loop = asyncio.get_running_loop()
    got = b""
    began = loop.time()
    while b"---EXIT---" not in got[-100:]:
        got += await asyncio.wait_for(loop.sock_recv(sock, 65_536), 5)
        await asyncio.sleep(0.05)
    assert loop.time() - began > 1  # longer than a stall may last
    assert got.count(b"\0") == size
    sock.close()


async def test_waiting_for_a_slow_reader_is_not_silence(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster)
    host, port = daemon.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    body = json.dumps({"command": ["head", "-c", "8000000", "/dev/zero"], "idleTimeoutSeconds": 0.3}).encode()
    writer.write(b"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await settled(daemon, 1)
    await asyncio.sleep(0.5)
    got = b""
    while b"---EXIT---" not in got:
        got = got[-200:] + await asyncio.wait_for(reader.read(65_536), 5)
    got += await asyncio.wait_for(reader.readuntil(b"}"), 5) if b"}" not in got else b""
    assert b'{"exitCode":0}' in got
    writer.close()


@pytest.mark.parametrize("accept", ["text/plain", "application/x-ndjson"])
async def test_many_stalled_readers_leave_and_everything_recovers(
    cluster: DevCluster, start: StartDaemon, accept: str
) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, MAX_CONCURRENT_EXECS="20")
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            sock = await stalled_reader(daemon, "cat", "/dev/zero", accept=accept)
            stack.callback(sock.close)
        await settled(daemon, 20)
        assert (await daemon.refused())["reason"] == "too_many_execs"
    await daemon.idle()
    assert (await daemon.run("echo", "ok"))[1].data("stdout") == b"ok\n"
    assert cluster.processes("workspace") == []
