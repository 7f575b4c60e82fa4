"""Everything of the interface against a real cluster, by a ServiceAccount that may do nothing else."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
import yaml
from conftest import NDJSON, Daemon, Stream
from oncluster import FAMILY, NEEDS_CLUSTER, Json, kubectl, node_name

from session_proxy import server
from session_proxy.config import parse_config
from session_proxy.devcluster import DevCluster, workspace_manifest

pytestmark = [*NEEDS_CLUSTER, pytest.mark.timeout(180)]

SECONDS_TO_KILL = 3.0
SECONDS_TO_NOTICE = 5.0
TAIL_BYTES = 1 << 20


@dataclass
class Cluster:
    """A namespace of a real cluster, made for one test module."""

    namespace: str
    owner: str
    node: str
    kubeconfig: Path
    session: str = "s1"
    name: str = "workspace"

    def manifest(self, name: str = "workspace", **members: Any) -> Json:
        pod = workspace_manifest(name, session=self.session, owner_uid=self.owner)
        pod["metadata"].pop("namespace", None)
        pod["metadata"]["ownerReferences"] = [
            {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": self.owner, "controller": True}
        ]
        pod["spec"] |= {"nodeName": self.node, "terminationGracePeriodSeconds": 1, "restartPolicy": "Always", **members}
        container = pod["spec"]["containers"][0]
        container |= {
            "imagePullPolicy": "Never",
            "workingDir": "/workspace",
            "resources": {"limits": {"memory": "64Mi"}},
        }
        container["command"] = ["sh", "-c", 'trap "exit 1" TERM; while :; do sleep 0.2; done']
        pod["spec"]["securityContext"]["runAsUser"] = 1000
        return pod

    def add(self, pod: Json, *, ready: bool = True) -> None:
        kubectl("apply", "-n", self.namespace, "-f", "-", text=json.dumps(pod))
        if ready:
            name = pod["metadata"]["name"]
            kubectl("wait", "-n", self.namespace, "--for=condition=Ready", f"pod/{name}", "--timeout=60s")

    def delete(self, name: str = "workspace") -> None:
        kubectl("delete", "pod", name, "-n", self.namespace, "--grace-period=0", "--force", "--ignore-not-found")

    def pod(self, name: str = "workspace") -> Json:
        pod: Json = json.loads(kubectl("get", "pod", name, "-n", self.namespace, "-o", "json"))
        return pod

    def shell(self, script: str, name: str = "") -> str:
        """Run a script in the container; its own exit status does not matter, but it must have run."""
        script = f"{{ {script}; }} 2>/dev/null; echo ran"
        output = kubectl("exec", "-n", self.namespace, name or self.name, "-c", "workspace", "--", "sh", "-c", script)
        assert output.endswith("ran\n"), output
        return output.removesuffix("ran\n")

    def alive(self, mark: str) -> list[str]:
        """Processes in the container that carry the mark in their environment (zombies have none)."""
        found = self.shell(f"grep -ls 'MARK={mark}' /proc/[0-9]*/environ")
        return found.split()

    async def gone(self, mark: str) -> bool:
        began = time.monotonic()
        while found := await asyncio.to_thread(self.alive, mark):
            if time.monotonic() - began > SECONDS_TO_KILL:
                raise AssertionError(found)
        return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    namespace = f"session-proxy-test-{secrets.token_hex(3)}"
    kubectl("create", "namespace", namespace)
    try:
        owner = json.loads(kubectl("create", "configmap", "owner", "-n", namespace, "-o", "json"))["metadata"]["uid"]
        path = tmp_path_factory.mktemp("credentials") / "kubeconfig"
        service_account(namespace, path)
        yield Cluster(namespace, owner, node_name(), path)
    finally:
        kubectl("delete", "namespace", namespace, "--wait=false")


def service_account(namespace: str, path: Path) -> None:
    """Make a ServiceAccount with exactly the documented permissions, and a kubeconfig that holds its token."""
    kubectl("create", "serviceaccount", "session-proxy", "-n", namespace)
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["get", "create"]},
    ]
    subject = {"kind": "ServiceAccount", "name": "session-proxy", "namespace": namespace}
    rbac = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": "session-proxy"}, "rules": rules}
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "session-proxy"},
        "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "session-proxy"},
        "subjects": [subject],
    }
    for item in (role, binding):
        kubectl("apply", "-n", namespace, "-f", "-", text=json.dumps(item))
    token = kubectl("create", "token", "session-proxy", "-n", namespace).strip()
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path.write_text(yaml.safe_dump(config))


@pytest.fixture
async def start(cluster: Cluster) -> AsyncIterator[Callable[..., Any]]:
    async with contextlib.AsyncExitStack() as stack:

        async def run(kubeconfig: Path = cluster.kubeconfig, **settings: str) -> Daemon:
            values = {
                "SESSION_NAME": cluster.session,
                "NAMESPACE": cluster.namespace,
                "OWNER_UID": cluster.owner,
                "LISTEN_ADDR": "127.0.0.1:0",
                "KILL_GRACE_SECONDS": "1",
            }
            logger = structlog.wrap_logger(None, processors=[_drop])
            config = parse_config(values | settings)
            daemon = await stack.enter_async_context(server.running(config, {"KUBECONFIG": str(kubeconfig)}, logger))
            http = await stack.enter_async_context(aiohttp.ClientSession(read_bufsize=1 << 24))
            host, port = daemon.address
            embedded: DevCluster = None  # type: ignore[assignment] # the helpers that look at it are not used here
            return Daemon(embedded, daemon.executor, http, f"http://{host}:{port}", [], stack)

        yield run


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


@pytest.fixture
def workspace(cluster: Cluster) -> Iterator[Cluster]:
    # A name of its own for each test: the kubelet takes a while to forget a pod that was deleted by force.
    fresh = replace(cluster, name=f"workspace-{secrets.token_hex(3)}")
    fresh.add(fresh.manifest(fresh.name))
    yield fresh
    fresh.delete(fresh.name)


@pytest.fixture(scope="module")
def steady(cluster: Cluster) -> Iterator[Cluster]:
    """A workspace that several tests share; in a namespace of its own kind of name, so that others do not meet it."""
    shared = Cluster(
        cluster.namespace, cluster.owner, cluster.node, cluster.kubeconfig, session="steady", name="steady"
    )
    shared.add(shared.manifest("steady"))
    yield shared
    shared.delete("steady")


# --- the interface ----------------------------------------------------------------------------------------------------


async def test_the_interface_works_with_the_least_permissions(steady: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start(SESSION_NAME="steady")
    assert await daemon.get("/readyz") == (200, {"status": "ok", "reasons": []})
    status, found = await daemon.get("/workspace")
    assert (status, found["acceptable"], found["pod"]) == (200, True, "steady")
    for path in ("/livez", "/health", "/limits", "/execs", "/openapi.json"):
        assert (await daemon.get(path))[0] == 200

    body = {"command": ["sh", "-c", "pwd; echo oops >&2; exit 7"], "cwd": "/tmp"}
    async with daemon.post(body, {}) as response:
        text = await response.text()
    output, _, record = text.rpartition("\n---EXIT---\n")
    assert sorted(output.splitlines()) == ["/tmp", "oops"]
    assert json.loads(record) == {"exitCode": 7}
    async with daemon.post(body, {"Accept": "text/event-stream"}) as response:
        assert '"exitCode":7' in await response.text()

    exit_event, stream = await daemon.run("sh", "-c", "echo out; echo err >&2; exit 255")
    assert (exit_event["exitCode"], stream.data("stdout"), stream.data("stderr")) == (255, b"out\n", b"err\n")
    assert (await daemon.exec_of(stream.id))["outcome"] == "exited"


async def test_failures_to_start_are_told_apart(steady: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start(SESSION_NAME="steady")
    for members, reason in (
        ({"command": ["no-such-program"]}, "command_not_found"),
        ({"command": ["true"], "cwd": "/no/such"}, "cwd_not_found"),
        ({"command": ["/etc/passwd"]}, "start_failed"),
    ):
        command = members.pop("command")
        exit_event, _ = await daemon.run(*command, **members)
        assert (exit_event["outcome"], exit_event["reason"]) == ("failed", reason)
    bare = await start(SESSION_NAME="steady", WRAPPER="none")
    exit_event, _ = await bare.run("no-such-program")
    assert (exit_event["outcome"], exit_event["reason"]) == ("failed", "command_not_found")
    exit_event, stream = await bare.run("sh", "-c", "cat; echo bare")
    assert (exit_event["exitCode"], stream.data("stdout")) == (0, b"bare\n")


async def test_stdin_arguments_and_environment_arrive(steady: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start(SESSION_NAME="steady")
    data = os.urandom(307_200)
    _, stream = await daemon.run("sha256sum", stdinBase64=base64.b64encode(data).decode())
    assert stream.data("stdout").split()[0].decode() == hashlib.sha256(data).hexdigest()
    script = "#" * 307_000 + "\necho ran"
    assert (await daemon.run("sh", stdin=script))[1].data("stdout") == b"ran\n"
    assert (await daemon.run("sh", "-c", "echo ${#1}", "x", "y" * 102_400))[1].data("stdout") == b"102400\n"
    assert (await daemon.run("sh", "-c", "echo $#", "x", *map(str, range(2000))))[1].data("stdout") == b"2000\n"
    _, stream = await daemon.run("sh", "-c", 'printf "%s|" "$@" "$FOO"', "x", "a\nb", "*", env={"FOO": "'\""})
    assert stream.data("stdout") == b"a\nb|*|'\"|"
    assert (await daemon.run("cat"))[0]["exitCode"] == 0


async def test_output_arrives_while_the_command_runs(steady: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start(SESSION_NAME="steady")
    stream = await daemon.open("sh", "-c", "echo first; sleep 30")
    await stream.until("stdout", b"first\n")
    assert (await daemon.exec_of(stream.id))["state"] == "running"


async def test_awkward_output_arrives(steady: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start(SESSION_NAME="steady")
    exit_event, _ = await daemon.run("head", "-c", "10000000", "/dev/zero")
    assert exit_event["stdoutBytes"] == 10_000_000
    exit_event, _ = await daemon.run("dd", "if=/dev/zero", "bs=1", "count=100000")
    assert exit_event["stdoutBytes"] == 100_000
    data = bytes(range(256)) * 40
    _, stream = await daemon.run("cat", stdinBase64=base64.b64encode(data).decode())
    assert stream.data("stdout") == data
    _, stream = await daemon.run("dd", "bs=1", stdin="añ€😀" * 50)
    assert stream.data("stdout").decode() == "añ€😀" * 50


@pytest.mark.timeout(400)
@pytest.mark.parametrize("accept", ["text/plain", "application/x-ndjson", "text/event-stream"])
async def test_a_gibibyte_of_random_bytes_arrives_with_the_same_hash(
    steady: Cluster, start: Callable[..., Any], accept: str
) -> None:
    daemon = await start(SESSION_NAME="steady")
    size = int(os.environ.get("CLUSTER_BULK_MIB", "1024")) << 20
    script = f"cd /tmp && rm -f f && mkfifo f && {{ sha256sum <f >sum & }} && head -c {size} /dev/urandom | tee f; wait; cat sum >&2"
    got = hashlib.sha256()
    count = 0
    told = b""
    async with daemon.post({"command": ["sh", "-c", script]}, {"Accept": accept}) as response:
        if accept == "text/plain":
            # stderr is mixed in near the end, not always last: Kubernetes keeps no order between the two.
            tail = b""
            async for chunk in response.content.iter_any():
                tail += chunk
                settled = max(0, len(tail) - TAIL_BYTES)
                got.update(tail[:settled])
                count += settled
                tail = tail[settled:]
            mark = re.search(rb"[0-9a-f]{64}  -\n", tail)
            assert mark is not None
            told = mark[0]
            data = (tail[: mark.start()] + tail[mark.end() :]).rpartition(b"\n---EXIT---\n")[0]
            got.update(data)
            count += len(data)
        else:
            async for line in response.content:
                text = line.removeprefix(b"data: ")
                if text.startswith((b'{"event":"stdout"', b'{"event":"stderr"')):
                    event = json.loads(text)
                    data = base64.b64decode(event["base64"]) if "base64" in event else event["text"].encode()
                    if event["event"] == "stderr":
                        told += data
                    else:
                        got.update(data)
                        count += len(data)
    assert count == size
    assert told.split()[0].decode() == got.hexdigest()


# --- refusals ---------------------------------------------------------------------------------------------------------


async def refusal(cluster: Cluster, daemon: Daemon, reason: str, status: int) -> Json:
    problem = await daemon.refused({"command": ["touch", "/tmp/ran"]})
    assert (problem["reason"], problem["status"]) == (reason, status)
    return problem


def changed(**spec: Any) -> Callable[[Json], object]:
    return lambda pod: pod["spec"].update(spec)


def with_context(**context: Any) -> Callable[[Json], object]:
    return lambda pod: pod["spec"]["containers"][0]["securityContext"].update(context)


REFUSED: dict[str, tuple[Callable[[Json], object], str, str]] = {
    "wrong-owner": (
        lambda pod: pod["metadata"]["ownerReferences"][0].update(uid="0b7e3c7e-0000-4000-8000-000000000000"),
        "workspace_not_owned",
        "",
    ),
    "no-owner": (lambda pod: pod["metadata"].pop("ownerReferences"), "workspace_not_owned", ""),
    "privileged": (
        with_context(privileged=True, allowPrivilegeEscalation=True),
        "workspace_policy_violation",
        "spec.containers[0].securityContext.privileged",
    ),
    "root": (
        with_context(runAsUser=0, runAsNonRoot=False),
        "workspace_policy_violation",
        "spec.containers[0].securityContext.runAsNonRoot",
    ),
    "host-network": (changed(hostNetwork=True), "workspace_policy_violation", "spec.hostNetwork"),
    "token": (
        changed(automountServiceAccountToken=True),
        "workspace_policy_violation",
        "spec.automountServiceAccountToken",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_an_unacceptable_workspace_is_refused_and_nothing_runs_in_it(
    cluster: Cluster, start: Callable[..., Any], kind: str
) -> None:
    change, reason, path = REFUSED[kind]
    pod = cluster.manifest(kind)
    pod["metadata"]["labels"]["session"] = kind
    change(pod)
    cluster.add(pod, ready=kind != "wrong-owner")  # an owner that does not exist: the pod may be collected at any time
    daemon = await start(SESSION_NAME=kind)
    try:
        problem = await refusal(cluster, daemon, reason, 403)
        if path:
            assert path in [violation["field"] for violation in problem["violations"]]
            assert cluster.shell("ls /tmp/ran", kind) == ""
    finally:
        cluster.delete(kind)


async def test_two_matching_pods_are_ambiguous(workspace: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start()
    workspace.add(workspace.manifest("second"))
    try:
        await refusal(workspace, daemon, "workspace_ambiguous", 503)
        assert workspace.shell("ls /tmp/ran") == workspace.shell("ls /tmp/ran", "second") == ""
    finally:
        workspace.delete("second")


async def test_no_pod_a_terminating_one_and_a_crashed_one_are_refused(
    cluster: Cluster, start: Callable[..., Any]
) -> None:
    daemon = await start(SESSION_NAME="comes-and-goes")
    await refusal(cluster, daemon, "workspace_not_found", 503)
    pod = cluster.manifest("comes-and-goes", terminationGracePeriodSeconds=30)
    pod["metadata"]["labels"]["session"] = "comes-and-goes"
    pod["spec"]["containers"][0]["command"] = ["sh", "-c", 'trap "" TERM; while :; do sleep 0.2; done']
    cluster.add(pod)
    try:
        kubectl("delete", "pod", "comes-and-goes", "-n", cluster.namespace, "--wait=false")
        problem = await refusal(cluster, daemon, "workspace_not_running", 503)
        assert "being deleted" in problem["detail"]
    finally:
        cluster.delete("comes-and-goes")
    pod["spec"]["containers"][0]["command"] = ["false"]
    pod["metadata"]["name"] = "crashes"
    cluster.add(pod, ready=False)
    try:
        async with asyncio.timeout(60):
            while not cluster.pod("crashes")["status"].get("containerStatuses", [{}])[0].get("restartCount"):
                await asyncio.sleep(0.3)
        async with asyncio.timeout(20):
            while "running" in cluster.pod("crashes")["status"]["containerStatuses"][0]["state"]:
                await asyncio.sleep(0.2)
        await refusal(cluster, daemon, "workspace_not_running", 503)
    finally:
        cluster.delete("crashes")


# --- kills ------------------------------------------------------------------------------------------------------------


async def family(daemon: Daemon, mark: str, **members: Any) -> Stream:
    stream = await daemon.open("sh", "-c", FAMILY, env={"MARK": mark}, **members)
    await stream.until("stdout", b"ready")
    return stream


@pytest.mark.parametrize("how", ["timeout", "idle_timeout", "output_limit", "delete", "client_gone", "shutdown"])
async def test_a_kill_leaves_nothing_behind(steady: Cluster, start: Callable[..., Any], how: str) -> None:
    daemon = await start(SESSION_NAME="steady")
    mark = secrets.token_hex(6)
    outcome = how
    members: Json = {"timeout": {"timeoutSeconds": 1}, "idle_timeout": {"idleTimeoutSeconds": 1}}.get(how, {})
    if how == "output_limit":
        script = FAMILY.replace("while :; do sleep 0.1; done", "while :; do echo more; done", 2)
        stream = await daemon.open("sh", "-c", script, env={"MARK": mark}, maxOutputBytes=50_000)
    else:
        stream = await family(daemon, mark, **members)
        assert len(steady.alive(mark)) >= 3
    match how:
        case "delete":
            await daemon.http.delete(f"{daemon.url}/execs/{stream.id}")
            outcome = "cancelled"
        case "client_gone":
            stream.response.close()
        case "shutdown":
            stopping = asyncio.create_task(daemon.executor.shutdown(6))
    if how == "client_gone":
        assert (await daemon.ended(stream.id))["reaped"] is True
    else:
        exit_event = await stream.rest()
        assert (exit_event["outcome"], exit_event["reaped"]) == (outcome, True)
        if how == "output_limit":
            assert len(stream.data("stdout")) + len(stream.data("stderr")) == 50_000
    assert await steady.gone(mark)
    if how == "shutdown":
        await stopping
    await daemon.idle()


@contextlib.asynccontextmanager
async def daemon_process(cluster: Cluster) -> AsyncIterator[tuple[Any, str]]:
    environment = {
        "PATH": os.environ["PATH"],
        "KUBECONFIG": str(cluster.kubeconfig),
        "SESSION_NAME": cluster.session,
        "NAMESPACE": cluster.namespace,
        "OWNER_UID": cluster.owner,
        "LISTEN_ADDR": "127.0.0.1:0",
        "MAX_CONCURRENT_EXECS": "60",
        "EXEC_BURST": "100",
        "KILL_GRACE_SECONDS": "1",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "session_proxy", "serve", env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    draining = None
    try:
        line = json.loads(await asyncio.wait_for(process.stderr.readline(), 10))
        draining = asyncio.create_task(process.stderr.read())
        yield process, f"http://{line['address']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if draining is not None:
            await draining


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_stopped_sidecar_leaves_no_process_of_the_commands_group(steady: Cluster, how: signal.Signals) -> None:
    mark = secrets.token_hex(6)
    script = FAMILY if how is signal.SIGTERM else 'trap "" TERM; sleep 600 & echo ready; while :; do sleep 0.1; done'
    body = {"command": ["sh", "-c", script], "env": {"MARK": mark}}
    async with daemon_process(steady) as (process, url), aiohttp.ClientSession() as http:
        response = await http.post(f"{url}/exec", json=body, headers=NDJSON)
        while b"ready" not in await response.content.readline():
            pass
        process.send_signal(how)
        if how is signal.SIGTERM:
            events = [json.loads(line) async for line in response.content]
            assert (events[-1]["outcome"], events[-1]["reaped"]) == ("shutdown", True)
            assert await process.wait() == 0
        assert await steady.gone(mark)
        response.close()


async def test_a_sigkilled_client_leaves_nothing(steady: Cluster) -> None:
    mark = secrets.token_hex(6)
    program = (
        "import http.client, sys\nc = http.client.HTTPConnection(sys.argv[1])\n"
        "c.request('POST', '/exec', sys.argv[2])\nr = c.getresponse()\nwhile True: print(r.read1(), flush=True)\n"
    )
    body = json.dumps({"command": ["sh", "-c", FAMILY], "env": {"MARK": mark}})
    async with daemon_process(steady) as (_, url):
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, url.removeprefix("http://"), body, stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        while b"ready" not in await asyncio.wait_for(client.stdout.readline(), 10):
            pass
        client.kill()
        await client.communicate()
        assert await steady.gone(mark)


async def test_fifty_stalled_readers_stay_within_the_memory_budget(steady: Cluster) -> None:
    async with daemon_process(steady) as (process, url), aiohttp.ClientSession() as http:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"command": ["cat", "/dev/zero"]})
        head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        readers = []
        for _ in range(50):
            reader = socket.create_connection((host, int(port)))
            reader.sendall(head.encode())
            readers.append(reader)
        async with asyncio.timeout(60):
            while True:
                async with http.get(f"{url}/execs") as response:
                    execs = (await response.json())["execs"]
                if len(execs) == 50 and all(record["stdoutBytes"] > 500_000 for record in execs):
                    break
                await asyncio.sleep(0.2)
        peak = 0
        for _ in range(20):
            await asyncio.sleep(0.1)
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.partition("VmRSS:")[2].split()[0]))
        assert peak <= 120 * 1024
        for reader in readers:
            reader.close()
        async with asyncio.timeout(60):
            while True:
                async with http.get(f"{url}/limits") as response:
                    if (await response.json())["running"] == 0:
                        break
                await asyncio.sleep(0.2)
        async with asyncio.timeout(90):  # the container runtime has a hundred ended execs to clear away
            while True:
                async with http.post(f"{url}/exec", json={"command": ["echo", "ok"]}) as response:
                    text = await response.text()
                if response.status == 200:
                    break
                assert json.loads(text)["reason"] == "kube_timeout"
        assert text.startswith("ok\n")


# --- losses -----------------------------------------------------------------------------------------------------------


async def ready_command(daemon: Daemon) -> Stream:
    stream = await daemon.open("sh", "-c", "echo ready; sleep 600")
    await stream.until("stdout", b"ready")
    return stream


async def lost(daemon: Daemon, stream: Stream, reason: str) -> Json:
    async with asyncio.timeout(SECONDS_TO_NOTICE):
        exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reason"], exit_event["exitCode"]) == ("lost", reason, None)
    await daemon.idle()
    return exit_event


async def test_a_deleted_pod_ends_its_stream(workspace: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start()
    stream = await ready_command(daemon)
    kubectl("delete", "pod", workspace.name, "-n", workspace.namespace, "--wait=false")
    await lost(daemon, stream, "pod_deleted")


async def test_a_replaced_pod_ends_its_stream(workspace: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start()
    stream = await ready_command(daemon)
    kubectl(
        "replace",
        "--force",
        "--grace-period=0",
        "-n",
        workspace.namespace,
        "-f",
        "-",
        text=json.dumps(workspace.manifest(workspace.name)),
    )
    await lost(daemon, stream, "pod_deleted")


async def test_a_restarted_container_ends_its_stream(workspace: Cluster, start: Callable[..., Any]) -> None:
    daemon = await start()
    stream = await ready_command(daemon)
    await asyncio.to_thread(workspace.shell, "{ sleep 0.5; kill -TERM 1; } >/dev/null 2>&1 & true")
    await lost(daemon, stream, "container_restarted")


async def test_a_container_out_of_memory_ends_its_stream(cluster: Cluster, start: Callable[..., Any]) -> None:
    pod = cluster.manifest("hungry")
    pod["metadata"]["labels"]["session"] = "hungry"
    pod["spec"]["containers"][0]["resources"] = {"limits": {"memory": "24Mi"}}
    # PID 1 itself eats the memory, once told to.
    eat = 'while [ ! -e /tmp/eat ]; do sleep 0.1; done; x=$(head -c 300000000 /dev/zero | tr "\\0" x)'
    pod["spec"]["containers"][0]["command"] = ["sh", "-c", eat]
    cluster.add(pod)
    try:
        daemon = await start(SESSION_NAME="hungry")
        stream = await ready_command(daemon)
        await asyncio.to_thread(cluster.shell, "touch /tmp/eat", "hungry")
        await lost(daemon, stream, "oom_killed")
    finally:
        cluster.delete("hungry")


async def test_a_command_out_of_memory_in_a_container_that_lives_is_an_exit(
    steady: Cluster, start: Callable[..., Any]
) -> None:
    daemon = await start(SESSION_NAME="steady")
    exit_event, _ = await daemon.run("sh", "-c", "kill -KILL $$")
    assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 137)


class Gateway:
    """A TCP relay before the API server that can reset every connection."""

    def __init__(self, kubeconfig: Path, path: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        entry = config["clusters"][0]["cluster"]
        self._host, _, port = entry["server"].removeprefix("https://").rpartition(":")
        self._port = int(port)
        self._config = config
        self._path = path
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Path]:
        async with await asyncio.start_server(self._relay, "127.0.0.1", 0) as relay:
            entry = self._config["clusters"][0]["cluster"]
            entry["server"] = f"https://127.0.0.1:{relay.sockets[0].getsockname()[1]}"
            entry["tls-server-name"] = self._host
            self._path.write_text(yaml.safe_dump(self._config))
            yield self._path
            self.reset()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, up_writer}

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65_536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

    def reset(self) -> None:
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
        self._writers.clear()


async def test_a_reset_connection_ends_its_stream(steady: Cluster, start: Callable[..., Any], tmp_path: Path) -> None:
    gateway = Gateway(steady.kubeconfig, tmp_path / "kubeconfig")
    async with gateway.open() as kubeconfig:
        daemon = await start(kubeconfig, SESSION_NAME="steady")
        mark = secrets.token_hex(6)
        stream = await family(daemon, mark)
        gateway.reset()
        exit_event = await lost(daemon, stream, "connection_lost")
        assert exit_event["reaped"] is True
        assert await steady.gone(mark)
        assert (await daemon.run("true"))[0]["exitCode"] == 0


async def test_a_restarted_api_server_ends_its_streams_and_not_the_daemon(
    steady: Cluster, start: Callable[..., Any]
) -> None:
    notes = Path(os.environ["KUBECONFIG"]).parent / "pids"
    if not notes.exists():
        pytest.skip("this cluster notes no process ids")
    lines = [line.split() for line in notes.read_text().splitlines()]
    pid = next(int(pid) for pid, name in lines if name == "apiserver")
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    daemon = await start(SESSION_NAME="steady")
    mark = secrets.token_hex(6)
    stream = await daemon.open("sh", "-c", "echo ready; sleep 600", env={"MARK": mark})
    await stream.until("stdout", b"ready")
    os.kill(pid, signal.SIGKILL)
    try:
        await lost(daemon, stream, "connection_lost")
    finally:
        with (notes.parent / "log" / "apiserver.log").open("ab") as sink:
            restarted = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        restarted.returncode = 0  # it is the cluster's from here on; `down` ends it
        notes.write_text(notes.read_text().replace(f"{pid} apiserver", f"{restarted.pid} apiserver"))
    async with asyncio.timeout(60):
        while (await daemon.get("/readyz"))[0] != 200:
            await asyncio.sleep(0.5)
    assert (await daemon.run("true"))[0]["exitCode"] == 0
    assert await steady.gone(mark)
