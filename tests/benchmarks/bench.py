"""Measures the daemon beside a bare websocket exec, against the same API server in the same run.

    make bench                      against the embedded stand-in
    KUBECONFIG=... make bench       against a real cluster: makes a namespace and removes it

Figures of one run on one machine are only worth their ratios: each line names what it is compared with. The exit status
is 0 also when a budget is missed; the table says so.
"""

import asyncio
import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from session_proxy import kube, remotecommand, workspace, wrapper
from session_proxy.devcluster import DevCluster, workspace_manifest

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "40"))
BULK = int(os.environ.get("BENCH_MIB", "512")) << 20
STALLED = 50
MIB = 1 << 20
OWNER = "11111111-2222-4333-8444-555555555555"
ADDED_LATENCY_MS = 3.0
IDLE_MIB = 60
STALLED_MIB = 120
START_SECONDS = 1.0


class Table:
    """The lines of the result."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, str]] = [("what", "measured", "budget", "")]

    def add(self, what: str, measured: str, budget: str = "", *, met: bool | None = None) -> None:
        self._rows.append((what, measured, budget, {None: "", True: "ok", False: "MISSED"}[met]))

    def show(self) -> None:
        widths = [max(len(row[column]) for row in self._rows) for column in range(4)]
        for row in self._rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


# --- the bare websocket exec, with the same gate ---------------------------------------------------------------------


class Bare:
    """The same steps by the same API client, without a daemon, policy, registry, limits or HTTP in between."""

    def __init__(self, client: kube.KubeClient) -> None:
        self._client = client

    async def run(self, command: list[str], take: Callable[[bytes], None] = lambda _: None) -> float:
        """Run a command to its Status; return seconds to the first byte of output (or to the end)."""
        began = time.perf_counter()
        first = None
        pods = await self._client.find_pods()
        target = workspace.running_target(pods[0], "workspace")
        nonce = secrets.token_hex(8)
        argv = wrapper.wrapper_argv(secrets.token_hex(8), nonce, 2)
        handshake = wrapper.Handshake(nonce)
        started = False
        async with self._client.open_exec(target, argv, stdin=True) as stream:
            while (message := await stream.receive()) is not None:
                event = remotecommand.decode(message)
                if isinstance(event, remotecommand.Status):
                    break
                if event is None:
                    continue
                data = event.data
                if not started:
                    said = handshake.feed(data)
                    if isinstance(said, wrapper.Ready):
                        await self._client.read_pod(target.pod)
                        for piece in remotecommand.stdin_messages(wrapper.go_payload(nonce, command)):
                            await stream.send(piece)
                    if not isinstance(said, wrapper.Started):
                        continue
                    started = True
                    data = said.output
                if data:
                    first = first or time.perf_counter() - began
                    take(data)
        return first or time.perf_counter() - began


async def timed(work: Callable[[], Awaitable[object]], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - began)
    return seconds


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# --- the daemon -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def daemon(kubeconfig: Path, namespace: str) -> AsyncIterator[tuple[int, str, float]]:
    """Run the daemon as a process; yield its pid, URL and seconds from start to ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "PATH": os.environ["PATH"],
        "KUBECONFIG": str(kubeconfig),
        "SESSION_NAME": "bench",
        "NAMESPACE": namespace,
        "OWNER_UID": OWNER,
        "LISTEN_ADDR": f"127.0.0.1:{port}",
        "MAX_CONCURRENT_EXECS": str(STALLED + 10),
        "EXEC_RATE_PER_SECOND": "10000",
        "EXEC_BURST": "10000",
        "LOG_LEVEL": "error",
    }
    url = f"http://127.0.0.1:{port}"
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "session_proxy", "serve", env=environment)
    try:
        async with aiohttp.ClientSession() as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"{url}/readyz") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.01)
        yield process.pid, url, time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


class Client:
    """Reads streams as fast as they come."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def run(
        self, command: list[str], take: Callable[[bytes], None] = lambda _: None, accept: str = "text/plain"
    ) -> float:
        began = time.perf_counter()
        first = None
        tail = b""
        body = json.dumps({"command": command}).encode()
        async with self._http.post(f"{self._url}/exec", data=body, headers={"Accept": accept}) as response:
            if response.status != 200:
                raise RuntimeError(await response.text())
            async for chunk in response.content.iter_any():
                if first is None and not chunk.startswith((b"\n---EXIT---", b'{"event":"start"')):
                    first = time.perf_counter() - began
                take(chunk)
                tail = (tail + chunk)[-4096:]
        if b'"exitCode":0' not in tail:
            raise RuntimeError(tail[-300:].decode(errors="replace"))
        return first or time.perf_counter() - began


def stalled_reader(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)))
    body = json.dumps({"command": ["cat", "/dev/zero"]}).encode()
    head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


async def measure(kubeconfig: Path, namespace: str, table: Table) -> None:
    credentials = await kube.load_credentials({"KUBECONFIG": str(kubeconfig)})
    client = kube.KubeClient(credentials, namespace=namespace, selector="session=bench,type=workspace")
    bare = Bare(client)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        pid, url, ready = await stack.enter_async_context(daemon(kubeconfig, namespace))
        http = await stack.enter_async_context(aiohttp.ClientSession(read_bufsize=MIB))
        proxy = Client(http, url)
        idle = rss_mib(pid)
        table.add("start to ready", f"{ready:.2f} s", f"<= {START_SECONDS:g} s", met=ready <= START_SECONDS)
        table.add("memory, idle", f"{idle:.0f} MiB", f"<= {IDLE_MIB} MiB", met=idle <= IDLE_MIB)
        await latency(bare, proxy, table)
        await throughput(bare, proxy, pid, table)
        await stalled(url, pid, table)
        # The last budget of the design needs a client-go program, which this repository does not carry.
        table.add("bulk, beside a Go client-go proxy", "not measured", "no slower, no more CPU")


async def latency(bare: Bare, proxy: Client, table: Table) -> None:
    for work in (bare, proxy):
        await timed(lambda work=work: work.run(["true"]), 3)  # type: ignore[misc]
    bare_seconds: list[float] = []
    proxy_seconds: list[float] = []
    for _ in range(ROUNDS):  # in turns, so that both meet the same noise
        bare_seconds += await timed(lambda: bare.run(["true"]), 1)
        proxy_seconds += await timed(lambda: proxy.run(["true"]), 1)
    added = (statistics.median(proxy_seconds) - statistics.median(bare_seconds)) * 1000
    for name, seconds in (("bare", bare_seconds), ("daemon", proxy_seconds)):
        table.add(
            f"`true`, {name}: p50 / p99",
            f"{statistics.median(seconds) * 1000:.1f} / {percentile(seconds, 0.99) * 1000:.1f} ms",
        )
    table.add("`true`, added (p50)", f"{added:+.1f} ms", f"<= {ADDED_LATENCY_MS:g} ms", met=added <= ADDED_LATENCY_MS)
    first_bare = [await bare.run(["echo", "x"]) for _ in range(ROUNDS // 2)]
    first_proxy = [await proxy.run(["echo", "x"]) for _ in range(ROUNDS // 2)]
    table.add(
        "time to first byte, bare / daemon (p50)",
        f"{statistics.median(first_bare) * 1000:.1f} / {statistics.median(first_proxy) * 1000:.1f} ms",
    )


async def throughput(bare: Bare, proxy: Client, pid: int, table: Table) -> None:
    line = "a line of text as commands print it, neither random nor all the same, 0123456789"
    await proxy.run(["sh", "-c", f"yes '{line}' | head -c {BULK} > bench-data"])
    command = ["cat", "bench-data"]
    got = 0

    def count(data: bytes) -> None:
        nonlocal got
        got += len(data)

    own_before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    await bare.run(command, count)
    bare_seconds = time.perf_counter() - began
    own_after = resource.getrusage(resource.RUSAGE_SELF)
    bare_cpu = own_after.ru_utime + own_after.ru_stime - own_before.ru_utime - own_before.ru_stime
    if got != BULK:
        raise RuntimeError(f"{got} bytes of {BULK}")
    gib = BULK / (1 << 30)
    table.add(f"bulk {BULK >> 20} MiB, bare", f"{BULK / MIB / bare_seconds:.0f} MiB/s, {bare_cpu / gib:.2f} CPU s/GiB")
    for accept in ("text/plain", "application/x-ndjson", "text/event-stream"):
        cpu = cpu_seconds(pid)
        began = time.perf_counter()
        await proxy.run(command, accept=accept)
        seconds = time.perf_counter() - began
        cpu = cpu_seconds(pid) - cpu
        table.add(
            f"bulk {BULK >> 20} MiB, daemon, {accept.partition('/')[2]}",
            f"{BULK / MIB / seconds:.0f} MiB/s ({seconds / bare_seconds:.2f} x bare), {cpu / gib:.2f} CPU s/GiB",
        )


async def stalled(url: str, pid: int, table: Table) -> None:
    readers = [await asyncio.to_thread(stalled_reader, url) for _ in range(STALLED)]
    peak = 0.0
    for _ in range(50):
        await asyncio.sleep(0.1)
        peak = max(peak, rss_mib(pid))
    for reader in readers:
        reader.close()
    table.add(f"memory, {STALLED} stalled readers", f"{peak:.0f} MiB", f"<= {STALLED_MIB} MiB", met=peak <= STALLED_MIB)
    began = time.perf_counter()
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/limits") as response:
                if (await response.json())["running"] == 0:
                    break
            await asyncio.sleep(0.05)
    table.add("... all slots free again after", f"{time.perf_counter() - began:.1f} s")


# --- where ------------------------------------------------------------------------------------------------------------


def kubectl(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, check=True)
    return done.stdout


async def on_stand_in(table: Table) -> None:
    """The stand-in runs as a process of its own, so that its work is not counted as ours."""
    with tempfile.TemporaryDirectory() as home:
        root = Path(home) / "workspace"
        root.mkdir()
        path = Path(home) / "kubeconfig"
        process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--stand-in", str(root), str(path))
        try:
            while not path.exists():
                await asyncio.sleep(0.02)
            await measure(path, "default", table)
        finally:
            process.terminate()
            await process.wait()


async def stand_in(root: Path, kubeconfig: Path) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with DevCluster(root=root) as cluster:
        cluster.add_pod(workspace_manifest("workspace", session="bench", owner_uid=OWNER))
        cluster.write_kubeconfig(kubeconfig.with_suffix(".part"))
        kubeconfig.with_suffix(".part").rename(kubeconfig)
        await stopping.wait()


async def on_cluster(table: Table, kubeconfig: Path) -> None:
    namespace = f"session-proxy-bench-{secrets.token_hex(3)}"
    manifest: dict[str, Any] = workspace_manifest("workspace", session="bench", owner_uid=OWNER)
    # The owner does not exist, and an owner reference to nobody would be garbage collected.
    manifest["metadata"].pop("ownerReferences")
    manifest["metadata"].pop("namespace", None)
    manifest["spec"]["containers"][0]["imagePullPolicy"] = "IfNotPresent"
    manifest["spec"]["nodeName"] = os.environ.get("BENCH_NODE", "node1")
    kubectl("create", "namespace", namespace)
    try:
        owner = json.loads(kubectl("create", "configmap", "owner", "-n", namespace, "-o", "json"))["metadata"]["uid"]
        manifest["metadata"]["ownerReferences"] = [
            {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner, "controller": True}
        ]
        globals()["OWNER"] = owner
        kubectl("apply", "-n", namespace, "-f", "-", text=json.dumps(manifest))
        kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/workspace", "--timeout=60s")
        await measure(kubeconfig, namespace, table)
    finally:
        kubectl("delete", "namespace", namespace, "--wait=false")


def main() -> None:
    if sys.argv[1:2] == ["--stand-in"]:
        asyncio.run(stand_in(Path(sys.argv[2]), Path(sys.argv[3])))
        return
    table = Table()
    given = os.environ.get("KUBECONFIG")
    print(f"python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}, {os.cpu_count()} cores,", end=" ")
    print("the cluster of KUBECONFIG" if given else "the embedded stand-in")
    asyncio.run(on_cluster(table, Path(given)) if given else on_stand_in(table))
    table.show()


if __name__ == "__main__":
    main()
