"""The API server's answers, also those that come in pieces, in pages, or too late."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import Daemon
from yarl import URL

from session_proxy import kube
from session_proxy.executor import _start_error
from session_proxy.remotecommand import Status
from session_proxy.workspace import Target, lost_reason


@contextlib.asynccontextmanager
async def answering(*pieces: bytes) -> AsyncIterator[URL]:
    """A server that answers every request with these pieces, one at a time."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        yield URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


async def test_a_refusal_that_comes_in_pieces_is_read_whole(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    message = 'pods "workspace" is forbidden: User "x" cannot get resource "pods/exec" in API group ""'
    body = json.dumps({"kind": "Status", "status": "Failure", "message": message, "code": 403}).encode()
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    client: Any = daemon.executor.cluster
    url = client._url
    async with answering(head + body[:40], body[40:]) as other:

        def elsewhere(path: str, query: Any) -> URL:
            asked: URL = url(path, query)
            return asked.with_host(str(other.host)).with_port(other.port) if "exec" in path else asked

        monkeypatch.setattr(client, "_url", elsewhere)
        problem = await daemon.refused()
    assert (problem["reason"], problem["verb"], problem["resource"]) == ("kube_forbidden", "get", "pods/exec")


async def test_a_pod_deleted_before_the_upgrade_may_be_asked_for_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = kube.KubeClient.find_pods

    async def find_and_delete(client: kube.KubeClient) -> Any:
        found = await find(client)
        daemon.cluster.delete_pod("workspace")
        return found

    monkeypatch.setattr(kube.KubeClient, "find_pods", find_and_delete)
    problem = await daemon.refused()
    assert (problem["status"], problem["reason"]) == (503, "workspace_not_found")
    assert problem["retryAfter"]


async def test_every_page_of_the_list_is_read(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = daemon.executor.cluster
    pages = [
        {"metadata": {"continue": "next"}, "items": [{"metadata": {"name": "a"}}]},
        {"metadata": {}, "items": [{"metadata": {"name": "b"}}]},
    ]
    asked = []

    async def answer(_: str, __: str, query: dict[str, str], **___: str) -> Any:
        asked.append(query.get("continue"))
        return pages[len(asked) - 1]

    monkeypatch.setattr(client, "_json", answer)
    assert [pod["metadata"]["name"] for pod in await client.find_pods()] == ["a", "b"]
    assert asked == [None, "next"]


async def test_an_upgrade_without_a_subprotocol_is_given_up_in_bounded_time(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server goes on sending, so the closing handshake alone would have no end."""
    from aiohttp import web

    async def endless(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await socket.send_bytes(b"x")
                await asyncio.sleep(0.02)
        return socket

    application = web.Application()
    application.router.add_get("/{path:.*}", endless)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    client: Any = daemon.executor.cluster
    url = client._url
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        monkeypatch.setattr(
            client, "_url", lambda path, query: url(path, query).with_port(port) if "exec" in path else url(path, query)
        )
        async with asyncio.timeout(5):
            problem = await daemon.refused()
        assert (problem["reason"], "chose none of" in problem["detail"]) == ("kube_unavailable", True)
        await daemon.idle()
    finally:
        await runner.cleanup()


def test_an_image_without_sh_does_not_blame_the_command() -> None:
    message = 'OCI runtime exec failed: exec failed: exec: "sh": executable file not found in $PATH: unknown'
    error: Any = _start_error(Status(None, message), wrapped=True)
    assert error.reason == "start_failed"
    assert "WRAPPER=none" in error.message


TARGET = Target("workspace", "uid", "workspace", "containerd://1", "2026-01-01T00:00:00Z")


def status_of(**status: Any) -> dict[str, Any]:
    return {"metadata": {"uid": "uid"}, "status": {"containerStatuses": [{"name": "workspace", **status}]}}


def test_a_container_of_which_nothing_is_said_is_not_lost() -> None:
    """Else ``reaped`` would say that its processes are gone."""
    assert lost_reason(TARGET, {"metadata": {"uid": "uid"}, "status": {}}) is None
    assert lost_reason(TARGET, status_of(state={"waiting": {}})) is None
    assert lost_reason(TARGET, status_of(containerID="containerd://1", state={"waiting": {}})) == "container_restarted"
    assert lost_reason(TARGET, status_of(containerID="containerd://2", state={"running": {}})) == "container_restarted"


async def test_a_watch_survives_an_answer_without_metadata(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = daemon.executor.cluster
    read = client.read_pod
    answers = [{"metadata": None}]

    async def once(name: str) -> Any:
        return answers.pop() if answers else await read(name)

    monkeypatch.setattr(client, "read_pod", once)
    async with contextlib.aclosing(client.watch_pod("workspace")) as pods:
        assert await anext(pods) == {"metadata": None}
        assert (await anext(pods))["metadata"]["name"] == "workspace"
