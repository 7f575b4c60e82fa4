"""WRAPPER=none: there is no gate, so the upgrade itself starts the command, and what is not known is said."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

from conftest import Daemon, StartDaemon, add_workspace, gone, processes_with
from yarl import URL

from session_proxy.devcluster import DevCluster


class Meddler:
    """TCP before the stand-in that cuts, or holds back, the answer to the first exec upgrade."""

    def __init__(self, port: int, *, cut: bool) -> None:
        self._port = port
        self._cut = cut
        self.upgrades = 0
        self.asked = asyncio.Event()
        self.release = asyncio.Event()
        self.port = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["Meddler"]:
        async with await asyncio.start_server(self._connected, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield self
            self.release.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        chosen = False

        async def up() -> None:
            nonlocal chosen
            while data := await reader.read(65_536):
                if b"/exec?" in data.partition(b"\r\n")[0]:
                    self.upgrades += 1
                    chosen = self.upgrades == 1
                    self.asked.set()
                to_server.write(data)
            to_server.close()

        async def down() -> None:
            while data := await from_server.read(65_536):
                if chosen and self._cut:
                    await asyncio.sleep(0.3)  # the command has started meanwhile
                    writer.transport.abort()
                    return
                if chosen:
                    await self.release.wait()
                writer.write(data)
            writer.close()

        with contextlib.suppress(ConnectionError):
            await asyncio.gather(up(), down())
        for end in (writer, to_server):
            end.transport.abort()


async def behind(meddler: Meddler, cluster: DevCluster, start: StartDaemon) -> Daemon:
    add_workspace(cluster)
    daemon = await start(cluster, WRAPPER="none")
    client: Any = daemon.executor.cluster
    client._base = URL(str(client._base).replace(f":{client._base.port}", f":{meddler.port}"))
    return daemon


def port_of(cluster: DevCluster) -> int:
    return URL(cluster.server).port or 0


async def test_a_bare_command_never_runs_twice(cluster: DevCluster, start: StartDaemon) -> None:
    trace = cluster.root / "trace"
    async with Meddler(port_of(cluster), cut=True).listening() as meddler:
        daemon = await behind(meddler, cluster, start)
        assert (await daemon.get("/workspace"))[0] == 200
        exit_event, _ = await daemon.run("sh", "-c", f"echo ran >>{trace}")
        assert (exit_event["outcome"], exit_event["reaped"]) == ("lost", False)
        assert (meddler.upgrades, trace.read_text()) == (1, "ran\n")


async def test_a_bare_command_ended_before_the_upgrade_is_answered_may_be_left(
    cluster: DevCluster, start: StartDaemon
) -> None:
    seconds = f"60.{secrets.randbelow(10**9)}"
    async with Meddler(port_of(cluster), cut=False).listening() as meddler:
        daemon = await behind(meddler, cluster, start)
        running = asyncio.create_task(daemon.run("sleep", seconds))
        await meddler.asked.wait()
        async with asyncio.timeout(5):
            while not processes_with(seconds):
                await asyncio.sleep(0.02)
        (execution,) = daemon.executor.list()
        async with daemon.http.delete(f"{daemon.url}/execs/{execution.id}"):
            pass
        exit_event, _ = await running
        assert (exit_event["outcome"], exit_event["reaped"]) == ("cancelled", False)
        await gone(seconds, 0)  # kills it
