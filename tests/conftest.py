"""A daemon in front of the embedded API server, over real sockets, and a client that reads its streams."""

import asyncio
import base64
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from session_proxy import log, server
from session_proxy.config import parse_config
from session_proxy.devcluster import DevCluster, workspace_manifest
from session_proxy.executor import Executor

OWNER = "11111111-2222-4333-8444-555555555555"
NDJSON = {"Accept": "application/x-ndjson"}
PATIENCE = 20.0


@dataclass
class Stream:
    """One answer of POST /exec in NDJSON, event by event."""

    response: aiohttp.ClientResponse
    seen: list[dict[str, Any]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.response.headers["X-Exec-Id"]

    async def next(self) -> dict[str, Any] | None:
        line = await asyncio.wait_for(self.response.content.readuntil(b"\n"), PATIENCE)
        if not line:
            return None
        event: dict[str, Any] = json.loads(line)
        self.seen.append(event)
        return event

    async def until(self, stream: str, text: bytes) -> None:
        while text not in self.data(stream):
            assert await self.next() is not None, f"ended before {text!r}: {self.seen}"

    async def rest(self) -> dict[str, Any]:
        """Read to the end; return the terminal event after checking that the stream is well formed."""
        with contextlib.suppress(aiohttp.ClientPayloadError):
            while await self.next() is not None:
                pass
        assert [event["seq"] for event in self.seen] == list(range(len(self.seen)))
        assert [event["event"] for event in self.seen].count("start") == 1
        assert self.seen[0]["event"] == "start"
        assert [event["event"] for event in self.seen].count("exit") == 1
        assert self.seen[-1]["event"] == "exit"
        return self.seen[-1]

    def data(self, stream: str) -> bytes:
        parts = [event for event in self.seen if event["event"] == stream]
        return b"".join(
            base64.b64decode(part["base64"]) if "base64" in part else part["text"].encode() for part in parts
        )


@dataclass
class Daemon:
    """The daemon under test and its HTTP client."""

    cluster: DevCluster
    executor: Executor
    http: aiohttp.ClientSession
    url: str
    logs: list[dict[str, Any]]
    closing: contextlib.AsyncExitStack

    def post(self, body: Any, headers: Mapping[str, str] = NDJSON) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(f"{self.url}/exec", data=data, headers=headers)

    async def open(self, *command: str, **members: Any) -> Stream:
        response = await self.post({"command": command, **members})
        self.closing.callback(response.close)
        assert response.status == 200, await response.text()
        return Stream(response)

    async def run(self, *command: str, **members: Any) -> tuple[dict[str, Any], Stream]:
        """Run a command to its end; return the terminal event and the stream."""
        stream = await self.open(*command, **members)
        return await stream.rest(), stream

    async def refused(self, body: Any = None, headers: Mapping[str, str] = NDJSON) -> dict[str, Any]:
        """Post something that must be refused; return the problem document."""
        async with self.post({"command": ["true"]} if body is None else body, headers) as response:
            assert response.content_type == "application/problem+json", await response.text()
            problem: dict[str, Any] = await response.json()
            assert problem["status"] == response.status
            assert {"type", "title", "status", "detail", "reason"} <= set(problem)
            return problem | {"retryAfter": response.headers.get("Retry-After")}

    async def refused_or_run(self, body: bytes) -> dict[str, Any] | None:
        """Post something that may be refused; return the problem document, None when it ran."""
        async with self.post(body) as response:
            if response.status == 200:
                await response.read()
                return None
            problem: dict[str, Any] = await response.json(content_type=None)
            return problem | {"retryAfter": response.headers.get("Retry-After")}

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(f"{self.url}{path}") as response:
            return response.status, await response.json()

    async def exec_of(self, exec_id: str) -> dict[str, Any]:
        status, body = await self.get(f"/execs/{exec_id}")
        assert status == 200
        return dict(body)

    async def ended(self, exec_id: str) -> dict[str, Any]:
        """Wait for the verdict of an exec whose stream is not read any more."""
        execution = self.executor.get(exec_id)
        async with asyncio.timeout(PATIENCE):
            while execution.verdict is None:
                await asyncio.sleep(0.01)
        return await self.exec_of(exec_id)

    async def idle(self) -> None:
        """Wait until no slot is held."""
        async with asyncio.timeout(PATIENCE):
            while self.executor.running:
                await asyncio.sleep(0.01)

    def commands_started(self) -> list[list[str]]:
        """Everything the cluster was asked to start that was not a wrapper: nothing, when the gate stayed shut."""
        return [list(record.command) for record in self.cluster.execs if record.command[:2] != ("sh", "-c")]


DEFAULTS = {
    "SESSION_NAME": "s1",
    "NAMESPACE": "default",
    "OWNER_UID": OWNER,
    "LISTEN_ADDR": "127.0.0.1:0",
    "EXEC_RATE_PER_SECOND": "1000",
    "EXEC_BURST": "1000",
    "KILL_GRACE_SECONDS": "1",
}

StartDaemon = Callable[..., Awaitable[Daemon]]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[DevCluster]:
    root = tmp_path / "workspace"
    root.mkdir()
    async with DevCluster(root=root) as embedded:
        yield embedded


@pytest.fixture(params=["v5.channel.k8s.io", "v4.channel.k8s.io"])
async def any_cluster(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[DevCluster]:
    """The embedded server, once for each subprotocol."""
    root = tmp_path / "workspace"
    root.mkdir()
    async with DevCluster(root=root, subprotocols=(request.param,)) as embedded:
        yield embedded


def add_workspace(cluster: DevCluster, name: str = "workspace", **arguments: Any) -> dict[str, Any]:
    arguments.setdefault("owner_uid", OWNER)
    return cluster.add_pod(workspace_manifest(name, session="s1", **arguments))


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartDaemon]:
    """Start a daemon in this process: ``await start(cluster, MAX_CONCURRENT_EXECS="1")``."""
    async with contextlib.AsyncExitStack() as stack:

        async def run(cluster: DevCluster, **settings: str) -> Daemon:
            path = cluster.write_kubeconfig(tmp_path / "kubeconfig")
            logs: list[dict[str, Any]] = []

            def capture(_: Any, method: str, event: MutableMapping[str, Any]) -> Any:
                logs.append(dict(event) | {"level": method})
                raise structlog.DropEvent

            logger = structlog.wrap_logger(
                None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(0)
            )
            daemon = await stack.enter_async_context(
                server.running(parse_config(DEFAULTS | settings), {"KUBECONFIG": str(path)}, logger)
            )
            http = await stack.enter_async_context(
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 24)
            )
            host, port = daemon.address
            return Daemon(cluster, daemon.executor, http, f"http://{host}:{port}", logs, stack)

        yield run


@pytest.fixture
async def daemon(cluster: DevCluster, start: StartDaemon) -> Daemon:
    """The usual daemon, with a workspace that it accepts."""
    add_workspace(cluster)
    return await start(cluster)


def processes_with(text: str) -> list[int]:
    """Processes of this machine, zombies aside, whose command line or environment holds ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(") ")[2][:1]
                if state in "ZX":
                    continue
                if text.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


async def gone(text: str, seconds: float) -> bool:
    """Whether no process with ``text`` is left within so many seconds; kills those that are."""
    try:
        async with asyncio.timeout(seconds):
            while processes_with(text):
                await asyncio.sleep(0.02)
    except TimeoutError:
        for pid in processes_with(text):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return False
    return True


@pytest.fixture(autouse=True)
def _plain_logs() -> None:
    log.configure("error", "json")
