"""Measures the daemon beside a bare websocket exec, against the same API server in the same run.

    make bench                      against the embedded stand-in
    KUBECONFIG=... make bench       against a real cluster: makes a namespace and removes it
    BENCH_PROXY=PROGRAM make bench  beside another exec proxy, such as one built on client-go

PROGRAM is started with NAMESPACE, LISTEN_ADDR and KUBECONFIG in its environment. It answers POST /exec with the output
in the text format, of the one pod labelled session=bench,type=workspace. Without it the budget that compares with such
a proxy is not measured, and the table says so.

Figures of one run on one machine are only worth their ratios, so everything is measured in turns with what it is
compared with, and medians are shown. The client is a plain socket: its own cost is small and in every figure of the
daemon. The exit status is 0 also when a budget is missed; the table and the last line say so.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from session_proxy import kube, remotecommand, workspace, wrapper
from session_proxy.devcluster import DevCluster, workspace_manifest

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "100"))
BULK = int(os.environ.get("BENCH_MIB", "512")) << 20
BULK_ROUNDS = int(os.environ.get("BENCH_BULK_ROUNDS", "3"))
PROXY = shlex.split(os.environ.get("BENCH_PROXY", ""))
STALLED = 50
START_TIMEOUT_SECONDS = 20.0
STALLED_START_SECONDS = 60.0
MIB = 1 << 20
OWNER = "11111111-2222-4333-8444-555555555555"
ADDED_LATENCY_MS = 3.0
IDLE_MIB = 60
STALLED_MIB = 120
START_SECONDS = 1.0


class Table:
    """The lines of the result, each with its budget where it has one, and whether that is kept."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, str]] = [("what", "measured", "budget", "")]

    def add(self, what: str, measured: str, budget: str = "", *, met: bool | None = None) -> None:
        verdict = {None: "not measured" if budget else "", True: "ok", False: "MISSED"}[met]
        self._rows.append((what, measured, budget, verdict))

    def show(self) -> None:
        widths = [max(len(row[column]) for row in self._rows) for column in range(4)]
        for row in self._rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        verdicts = [row[3] for row in self._rows if row[2] and row[3]]
        print(f"\nbudgets: {verdicts.count('ok')} kept, ", end="")
        print(f"{verdicts.count('MISSED')} missed, {verdicts.count('not measured')} not measured")
        for what, measured, budget, verdict in self._rows:
            if verdict == "MISSED":
                print(f"missed: {what}: {measured}, budget {budget}")


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


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median between the bounds that hold the true one in 9 of 10 measurements (by order statistics)."""
    ordered = sorted(values)
    reach = 1.645 * len(ordered) ** 0.5 / 2
    low, high = int(len(ordered) / 2 - reach), int(len(ordered) / 2 + reach)
    return ordered[max(0, low)], statistics.median(ordered), ordered[min(len(ordered) - 1, high)]


# --- the daemon -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """A running HTTP server: the daemon, or the proxy it is compared with."""

    pid: int
    port: int
    ready_seconds: float


@contextlib.asynccontextmanager
async def serving(argv: list[str], environment: Mapping[str, str]) -> AsyncIterator[Server]:
    """Run a server as a process; yield it once it answers (the daemon: once it is ready)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *argv, env={"PATH": os.environ["PATH"], "LISTEN_ADDR": f"127.0.0.1:{port}", **environment}
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_SECONDS), aiohttp.ClientSession() as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"http://127.0.0.1:{port}/readyz") as response:
                        if response.status in (200, 404):  # a proxy need not have the route
                            break
                await asyncio.sleep(0.01)
        yield Server(process.pid, port, time.perf_counter() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


class Client:
    """Reads streams as fast as they come, over one plain socket: it is an instrument, and should weigh little."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._stream = self._socket.makefile("rb")

    async def run(self, command: list[str], accept: str = "text/plain") -> float:
        """Run a command to its end; return seconds to the first byte of output (or to the end)."""
        return await asyncio.to_thread(self._run, command, accept)

    def _run(self, command: list[str], accept: str) -> float:
        began = time.perf_counter()
        body = json.dumps({"command": command}).encode()
        head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)
        answer = self._stream.readline()
        if b" 200 " not in answer:
            raise RuntimeError(answer.decode())
        while self._stream.readline() not in (b"\r\n", b""):
            pass  # the head arrives when the gate opens, before any output
        tail = b""
        first = None
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = self._stream.read1(MIB)
            if not data:
                raise RuntimeError(f"the connection ended early after {tail[-300:]!r}")
            first = first or time.perf_counter() - began
            tail = (tail + data[-1024:])[-1024:]
        if b'"exitCode":0' not in tail:
            raise RuntimeError(tail.decode(errors="replace"))
        return first or 0.0

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._socket.close()


def stalled_reader(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    body = json.dumps({"command": ["cat", "/dev/zero"]}).encode()
    head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


async def measure(kubeconfig: Path, namespace: str, table: Table) -> None:
    credentials = await kube.load_credentials({"KUBECONFIG": str(kubeconfig)})
    client = kube.KubeClient(credentials, namespace=namespace, selector="session=bench,type=workspace")
    bare = Bare(client)
    shared = {"KUBECONFIG": str(kubeconfig), "NAMESPACE": namespace}
    settings = {
        **shared,
        "SESSION_NAME": "bench",
        "OWNER_UID": OWNER,
        "MAX_CONCURRENT_EXECS": str(STALLED + 10),
        "EXEC_RATE_PER_SECOND": "10000",
        "EXEC_BURST": "10000",
        "LOG_LEVEL": "error",
    }
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        daemon = await stack.enter_async_context(serving([sys.executable, "-m", "session_proxy", "serve"], settings))
        other = await stack.enter_async_context(serving(PROXY, shared)) if PROXY else None
        ready, idle = daemon.ready_seconds, rss_mib(daemon.pid)
        table.add("start to ready", f"{ready:.2f} s", f"<= {START_SECONDS:g} s", met=ready <= START_SECONDS)
        table.add("memory, idle", f"{idle:.0f} MiB", f"<= {IDLE_MIB} MiB", met=idle <= IDLE_MIB)
        await latency(bare, daemon, table)
        await throughput(bare, daemon, other, table)
        await stalled(daemon, table)


async def latency(bare: Bare, daemon: Server, table: Table) -> None:
    with contextlib.closing(Client(daemon)) as client:
        works: dict[str, Callable[[], Awaitable[float]]] = {
            "bare": lambda: bare.run(["echo", "x"]),
            "daemon": lambda: client.run(["echo", "x"]),
        }
        first: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(ROUNDS // 2):  # in turns, so that both meet the same noise
            for name, work in works.items():
                first[name].append(await work())
        works = {"bare": lambda: bare.run(["true"]), "daemon": lambda: client.run(["true"])}
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(ROUNDS):
            for name, work in works.items():
                seconds[name] += await timed(work, 1)
    middle = {name: statistics.median(values) * 1000 for name, values in seconds.items()}
    for name, values in seconds.items():
        table.add(f"`true`, {name}: p50 / p99", f"{middle[name]:.1f} / {percentile(values, 0.99) * 1000:.1f} ms")
    differences = [after - before for before, after in zip(seconds["bare"], seconds["daemon"], strict=True)]
    low, added, high = (value * 1000 for value in median_interval(differences))
    table.add(
        "`true`, added (p50 of pairs; 90 % interval)",
        f"{added:+.1f} ms ({low:+.1f} to {high:+.1f})",
        f"<= {ADDED_LATENCY_MS:g} ms",
        met=added <= ADDED_LATENCY_MS,
    )
    table.add(
        "time to first byte, bare / daemon (p50)",
        " / ".join(f"{statistics.median(values) * 1000:.1f}" for values in first.values()) + " ms",
    )


async def throughput(bare: Bare, daemon: Server, other: Server | None, table: Table) -> None:
    line = "a line of text as commands print it, neither random nor all the same, 0123456789"
    command = ["cat", "bench-data"]
    with contextlib.closing(Client(daemon)) as client, contextlib.ExitStack() as stack:
        await client.run(["sh", "-c", f"yes '{line}' | head -c {BULK} > bench-data"])

        async def read_bare() -> None:
            got = 0

            def count(data: bytes) -> None:
                nonlocal got
                got += len(data)

            await bare.run(command, count)
            if got != BULK:
                raise RuntimeError(f"{got} bytes of {BULK}")

        works: dict[str, tuple[Callable[[], Awaitable[object]], int]] = {"bare": (read_bare, os.getpid())}
        works["daemon, plain"] = (lambda: client.run(command), daemon.pid)
        if other is not None:
            beside = stack.enter_context(contextlib.closing(Client(other)))
            works[Path(PROXY[0]).name] = (lambda: beside.run(command), other.pid)
        works["daemon, x-ndjson"] = (lambda: client.run(command, "application/x-ndjson"), daemon.pid)
        works["daemon, event-stream"] = (lambda: client.run(command, "text/event-stream"), daemon.pid)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(BULK_ROUNDS):
            for name, (work, pid) in works.items():
                cpu = cpu_seconds(pid)
                [seconds] = await timed(work, 1)
                results[name].append((seconds, (cpu_seconds(pid) - cpu) * (1 << 30) / BULK))
    middle = {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in results.items()}
    for name, (seconds, cpu) in middle.items():
        times = "" if name == "bare" else f" ({seconds / middle['bare'][0]:.2f} x bare)"
        table.add(f"bulk {BULK >> 20} MiB, {name}", f"{BULK / MIB / seconds:.0f} MiB/s{times}, {cpu:.2f} CPU s/GiB")
    what, budget = "bulk, beside a client-go proxy", "no slower, no more CPU"
    if other is None:
        table.add(what, "BENCH_PROXY names none", budget)
    else:
        (seconds, cpu), (other_seconds, other_cpu) = middle["daemon, plain"], middle[Path(PROXY[0]).name]
        table.add(
            what,
            f"{seconds / other_seconds:.2f} x its time, {cpu / other_cpu:.2f} x its CPU",
            budget,
            met=seconds <= other_seconds and cpu <= other_cpu,
        )


async def stalled(daemon: Server, table: Table) -> None:
    readers = [await asyncio.to_thread(stalled_reader, daemon.port) for _ in range(STALLED)]
    peak = 0.0
    async with aiohttp.ClientSession(f"http://127.0.0.1:{daemon.port}") as http:

        async def execs() -> list[dict[str, Any]]:
            async with http.get("/execs") as response:
                found: list[dict[str, Any]] = (await response.json())["execs"]
                return [execution for execution in found if execution["state"] != "ended"]

        async with asyncio.timeout(STALLED_START_SECONDS):
            # A stream that has not filled its buffers would flatter the figure.
            while sum(execution["stdoutBytes"] >= MIB // 2 for execution in await execs()) < STALLED:
                await asyncio.sleep(0.1)
        for _ in range(20):
            await asyncio.sleep(0.1)
            peak = max(peak, rss_mib(daemon.pid))
        for reader in readers:
            reader.close()
        began = time.perf_counter()
        while await execs():
            await asyncio.sleep(0.05)
    table.add(f"memory, {STALLED} stalled readers", f"{peak:.0f} MiB", f"<= {STALLED_MIB} MiB", met=peak <= STALLED_MIB)
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
