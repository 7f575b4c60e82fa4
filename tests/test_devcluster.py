"""The embedded API server against what real ones were seen to send.

The frames and messages that are expected literally here were recorded from Kubernetes 1.20 with containerd over
``v4.channel.k8s.io``; those of v5 follow from the API server translating for the kubelet. kubectl itself is the other
judge: what it accepts here it accepts from a cluster.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import stat
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
import trustme
from aiohttp import WSMsgType
from kustomize import installed

from session_proxy.devcluster import MAX_HISTORY_EVENTS, V4, V5, DevCluster, Faults, Json, workspace_manifest

BOTH = pytest.mark.parametrize("subprotocol", [V4, V5])
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SUCCESS = b'\x03{"metadata":{},"status":"Success"}'
STREAMS = ("stdin", "stdout", "stderr")
SECONDS = 5.0


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[DevCluster]:
    async with DevCluster(root=tmp_path / "workspace") as running:
        running.add_pod(workspace_manifest(session="s1"))
        yield running


@pytest.fixture
async def client(cluster: DevCluster) -> AsyncIterator["Client"]:
    headers = {"Authorization": f"Bearer {cluster.token}"}
    async with aiohttp.ClientSession(cluster.url, headers=headers) as http:
        yield Client(http)


@dataclass
class Exec:
    """What one exec sent: the raw messages, and how the connection ended."""

    protocol: str | None
    frames: list[bytes] = field(default_factory=list)
    kinds: set[WSMsgType] = field(default_factory=set)
    close_code: int | None = None

    def output(self, channel: int) -> bytes:
        return b"".join(frame[1:] for frame in self.frames if frame and frame[0] == channel)

    @property
    def status(self) -> Json | None:
        last = self.frames[-1] if self.frames else b""
        return json.loads(last[1:]) if last[:1] == b"\x03" else None

    @property
    def code(self) -> int:
        status = self.status
        assert status is not None
        return 0 if status["status"] == "Success" else int(status["details"]["causes"][0]["message"])


class Client:
    """A bare websocket and REST client with no opinion of its own."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http

    async def get(self, path: str, **query: str) -> tuple[int, Json]:
        async with self.http.get(path, params=query) as response:
            return response.status, await response.json()

    def connect(
        self,
        *command: str,
        subprotocols: Sequence[str] = (V5, V4),
        streams: Sequence[str] = STREAMS,
        pod: str = "workspace",
        container: str | None = "workspace",
        **query: str,
    ) -> Any:
        asked = [("command", word) for word in command] + [(stream, "true") for stream in streams]
        asked += [("container", container)] if container is not None else []
        path = f"/api/v1/namespaces/default/pods/{pod}/exec?{urlencode([*asked, *query.items()])}"
        return self.http.ws_connect(path, protocols=subprotocols, autoclose=False, max_msg_size=0)

    async def run(self, *command: str, subprotocol: str = V5, send: Sequence[bytes] = (), **how: Any) -> Exec:
        async with asyncio.timeout(SECONDS), self.connect(*command, subprotocols=(subprotocol,), **how) as ws:
            for frame in send:
                await ws.send_bytes(frame)
            return await collect(ws)

    async def refused(self, *command: str, **how: Any) -> int:
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await self.connect(*command, **how)
        return error.value.status

    async def upgrade(self, path: str, **headers: str) -> tuple[int, str, str]:
        asked = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Protocol": f"{V5}, {V4}",
        }
        asked.update({name.replace("_", "-"): value for name, value in headers.items()})
        async with self.http.get(f"/api/v1/namespaces/default/pods/{path}", headers=asked) as response:
            return response.status, response.content_type, await response.text()

    @contextlib.asynccontextmanager
    async def watch(self, **query: str) -> AsyncIterator[Callable[[], Any]]:
        params = {"watch": "true", **query}
        async with self.http.get("/api/v1/namespaces/default/pods", params=params) as response:
            assert response.status == 200

            async def next_event() -> Any:
                async with asyncio.timeout(SECONDS):
                    line = await response.content.readline()
                return json.loads(line) if line else None

            yield next_event


async def collect(ws: aiohttp.ClientWebSocketResponse) -> Exec:
    result = Exec(ws.protocol)
    async for message in ws:
        result.kinds.add(message.type)
        result.frames.append(message.data.encode() if message.type is WSMsgType.TEXT else message.data)
    result.close_code = ws.close_code
    return result


async def receive(ws: aiohttp.ClientWebSocketResponse) -> bytes:
    async with asyncio.timeout(SECONDS):
        data: bytes = await ws.receive_bytes()
    return data


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for what the operating system does without telling: files, processes."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def reset(ws: aiohttp.ClientWebSocketResponse) -> None:
    assert ws._conn is not None
    assert ws._conn.transport is not None
    ws._conn.transport.abort()


def status_error(code: int, reason: str, message: str, details: Json | None = None) -> Json:
    known = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**known, "message": message, "reason": reason, **({"details": details} if details else {}), "code": code}


# The wire of an exec


@BOTH
async def test_a_successful_exec_is_an_empty_frame_the_output_and_a_status(client: Client, subprotocol: str) -> None:
    result = await client.run("echo", "hi", subprotocol=subprotocol)
    assert result == Exec(subprotocol, [b"\x01", b"\x01hi\n", SUCCESS], {WSMsgType.BINARY}, 1000)


@pytest.mark.parametrize(
    ("streams", "first"), [(STREAMS, b"\x01"), (("stdin", "stderr"), b"\x02"), (("stdin",), b"\x03")]
)
async def test_the_first_frame_names_the_lowest_output_channel(
    client: Client, streams: Sequence[str], first: bytes
) -> None:
    result = await client.run("true", streams=streams)
    assert result.frames == [first, SUCCESS]


async def test_the_first_frame_is_sent_before_the_process_starts(cluster: DevCluster, client: Client) -> None:
    cluster.faults.slow_start_seconds = 60
    async with client.connect("true") as ws:
        assert await receive(ws) == b"\x01"
        assert cluster.execs == []


async def test_a_non_zero_exit_over_v4_has_the_words_of_the_kubelet(client: Client) -> None:
    result = await client.run("sh", "-c", "echo e>&2;exit 7", subprotocol=V4)
    assert result.frames == [
        b"\x01",
        b"\x02e\n",
        (
            b'\x03{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code: error '
            b'executing command [sh -c echo e\\u003e\\u00262;exit 7], exit code 7","reason":"NonZeroExitCode",'
            b'"details":{"causes":[{"reason":"ExitCode","message":"7"}]}}'
        ),
    ]


async def test_a_non_zero_exit_over_v5_has_the_words_of_the_api_server(client: Client) -> None:
    result = await client.run("sh", "-c", "exit 7", subprotocol=V5)
    assert result.frames[1:] == [
        (
            b'\x03{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code: command '
            b'terminated with exit code 7","reason":"NonZeroExitCode",'
            b'"details":{"causes":[{"reason":"ExitCode","message":"7"}]}}'
        ),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_death_by_signal_is_128_and_its_number(client: Client, number: int) -> None:
    assert (await client.run("sh", "-c", f"kill -{int(number)} $$")).code == 128 + number


@BOTH
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["nope"], 'unable to start container process: exec: "nope": executable file not found in $PATH'),
        (["/nope"], 'unable to start container process: exec: "/nope": stat /nope: no such file or directory'),
        (["/etc"], 'unable to start container process: exec: "/etc": permission denied'),
        (["/etc/passwd"], 'unable to start container process: exec: "/etc/passwd": permission denied'),
        (["./a\0b"], 'unable to start container process: exec: "./a\0b": stat ./a\0b: invalid argument'),
        ([], "args must not be empty"),
    ],
)
async def test_a_command_that_cannot_start_is_an_internal_error_in_the_words_of_runc(
    cluster: DevCluster, client: Client, subprotocol: str, command: list[str], words: str
) -> None:
    result = await client.run(*command, subprotocol=subprotocol)
    status = result.status
    assert status is not None
    cause = status["details"]["causes"][0]["message"]
    twice = "Internal error occurred: " if subprotocol == V5 else ""
    start = re.escape(f"{twice}error executing command in container: failed to exec in container: failed to start exec")
    runtime = re.escape(f"OCI runtime exec failed: exec failed: {words}: unknown")
    assert re.fullmatch(rf'{start} "[0-9a-f]{{64}}": {runtime}', cause)
    assert status == {
        "metadata": {},
        "status": "Failure",
        "message": f"Internal error occurred: {cause}",
        "reason": "InternalError",
        "details": {"causes": [{"message": cause}]},
        "code": 500,
    }
    assert result.frames[0] == b"\x01"
    assert cluster.execs == []


async def test_a_script_that_the_kernel_cannot_run_does_not_start(cluster: DevCluster, client: Client) -> None:
    (cluster.root / "script").write_bytes(b"\x7fnot a program")
    (cluster.root / "script").chmod(0o755)
    status = (await client.run("./script")).status
    assert status is not None
    assert "exec format error: unknown" in status["message"]


@LINUX
async def test_the_process_leads_its_session_and_its_group(cluster: DevCluster, client: Client) -> None:
    result = await client.run("cat", "/proc/self/stat")
    group, session = result.output(1).rpartition(b")")[2].split()[2:4]
    assert int(group) == int(session) == cluster.execs[0].pid


@LINUX
async def test_the_process_has_a_clean_environment_and_starts_in_the_scratch_directory(
    cluster: DevCluster, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    result = await client.run("sh", "-c", "pwd; tr '\\0' '\\n' < /proc/$$/environ")
    directory, *environment = result.output(1).decode().splitlines()
    assert directory == os.path.realpath(cluster.root)
    names = dict(line.split("=", 1) for line in environment)
    assert names.pop("DEVCLUSTER_CONTAINER")
    assert sorted(names) == ["HOME", "HOSTNAME", "PATH"]
    assert names["HOSTNAME"] == "workspace"


async def test_argv_arrives_as_it_was_sent(client: Client) -> None:
    words = ["", " ", "a b", "$HOME", "*", "'\"", "ä\n&=+%00", "x" * 100_000]
    result = await client.run("printf", "%s|", *words)
    assert result.output(1).decode() == "".join(f"{word}|" for word in words)


async def test_without_stdin_the_process_reads_end_of_file_at_once(client: Client) -> None:
    assert (await client.run("cat", streams=("stdout",))).frames == [b"\x01", SUCCESS]


async def test_v5_ends_stdin_with_a_close_signal(client: Client) -> None:
    result = await client.run("cat", send=[b"\x00one ", b"\x00", b"\x00two", b"\xff\x00"])
    assert (result.output(1), result.code) == (b"one two", 0)


async def test_v4_has_no_way_to_end_stdin(cluster: DevCluster, client: Client) -> None:
    async with client.connect("cat", subprotocols=(V4,)) as ws:
        for frame in (b"\xff\x00", b"", b"\x07unknown", b"\x00still here"):
            await ws.send_bytes(frame)
        assert await receive(ws) == b"\x01"
        assert await receive(ws) == b"\x01still here"
        assert cluster.processes("workspace") == [cluster.execs[0].pid]


async def test_text_messages_are_read_like_binary_ones(client: Client) -> None:
    async with client.connect("cat") as ws:
        await ws.send_str("\0text")
        await ws.send_bytes(b"\xff\x00")
        assert (await collect(ws)).output(1) == b"text"


async def test_stdin_that_the_process_closed_is_thrown_away(cluster: DevCluster, client: Client) -> None:
    os.mkfifo(cluster.root / "gate")
    async with client.connect("sh", "-c", "exec 0<&-; echo closed; cat gate") as ws:
        assert [await receive(ws), await receive(ws)] == [b"\x01", b"\x01closed\n"]
        await ws.send_bytes(b"\x00" + bytes(1 << 20))
        answered = asyncio.create_task(pong(ws))
        await ws.ping()
        await answered
        (cluster.root / "gate").write_text("")
        assert await receive(ws) == SUCCESS


async def test_a_process_may_end_while_its_stdin_is_full(client: Client) -> None:
    result = await client.run("sleep", "0.1", send=[b"\x00" + bytes(1 << 20), b"\xff\x00"])
    assert result.frames == [b"\x01", SUCCESS]


async def test_the_status_waits_for_whoever_inherited_the_output(cluster: DevCluster, client: Client) -> None:
    os.mkfifo(cluster.root / "gate")
    async with client.connect("sh", "-c", "echo first; cat gate &") as ws:
        assert await receive(ws) == b"\x01"
        assert await receive(ws) == b"\x01first\n"
        waiting = asyncio.create_task(ws.receive())
        await eventually(lambda: cluster.execs[0].pid not in cluster.processes("workspace"))
        assert not waiting.done()
        (cluster.root / "gate").write_text("late")
        assert (await waiting).data == b"\x01late"
        assert await receive(ws) == SUCCESS


@BOTH
async def test_a_dropped_connection_ends_stdin_and_kills_nothing(
    cluster: DevCluster, client: Client, subprotocol: str
) -> None:
    os.mkfifo(cluster.root / "gate")
    script = "cat > /dev/null; echo eof > seen; cat gate; echo more; echo survived > seen"
    async with client.connect("sh", "-c", script, subprotocols=(subprotocol,)) as ws:
        assert await receive(ws) == b"\x01"
        await cluster.exec_started()
        reset(ws)
    seen = cluster.root / "seen"
    await eventually(lambda: seen.exists() and seen.read_text() == "eof\n")
    assert cluster.processes("workspace")
    (cluster.root / "gate").write_text("")
    await eventually(lambda: seen.read_text() == "survived\n")


@LINUX
async def test_who_prints_to_a_dropped_connection_blocks_and_is_not_killed(cluster: DevCluster, client: Client) -> None:
    async with client.connect("yes") as ws:
        assert await receive(ws) == b"\x01"
        await receive(ws)
        reset(ws)
    pid = cluster.execs[0].pid
    await eventually(lambda: all(session.detached for session in cluster._sessions))
    await eventually(lambda: Path(f"/proc/{pid}/wchan").read_text().endswith("pipe_write"))
    written = written_by(pid)
    await asyncio.sleep(0.1)
    assert written_by(pid) == written


def written_by(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


@LINUX
async def test_a_client_that_does_not_read_slows_the_process_down(cluster: DevCluster, client: Client) -> None:
    async with client.connect("head", "-c", "64000000", "/dev/zero") as ws:
        assert await receive(ws) == b"\x01"
        pid = (await cluster.exec_started()).pid
        await eventually(lambda: Path(f"/proc/{pid}/wchan").read_text().endswith("pipe_write"))
        assert written_by(pid) < 32_000_000
        result = await collect(ws)
        assert (len(result.output(1)), result.code) == (64_000_000, 0)
        assert max(map(len, result.frames)) == 32 * 1024 + 1


async def test_a_process_that_does_not_read_stdin_slows_the_client_down(client: Client) -> None:
    async with client.connect("sleep", "60") as ws:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flood(ws, 64_000_000), 0.5)
        reset(ws)


async def flood(ws: aiohttp.ClientWebSocketResponse, size: int) -> None:
    for _ in range(size // 64_000):
        await ws.send_bytes(b"\x00" + bytes(64_000))


async def test_pings_are_answered(client: Client) -> None:
    async with client.connect("sleep", "60") as ws:
        assert await receive(ws) == b"\x01"
        answered = asyncio.create_task(pong(ws))
        await ws.ping(b"are you there")
        assert await answered == b"are you there"


async def pong(ws: aiohttp.ClientWebSocketResponse) -> bytes:
    """Return the next pong: aiohttp's own client swallows them unless it is asked not to."""
    ws._autoping = False
    async with asyncio.timeout(SECONDS):
        while (message := await ws.receive()).type is not WSMsgType.PONG:
            assert message.type is WSMsgType.BINARY
    return bytes(message.data)


# What is refused before the upgrade


async def test_v4_refuses_a_container_that_is_not_running_with_500(cluster: DevCluster, client: Client) -> None:
    cluster.crash_container("workspace")
    answer = await client.upgrade(
        "workspace/exec?command=true&stdout=true&container=workspace", Sec_WebSocket_Protocol=V4
    )
    assert answer == (500, "text/plain", 'container not found ("workspace")')


async def test_v5_tells_of_a_container_that_is_not_running_on_channel_3(cluster: DevCluster, client: Client) -> None:
    cluster.crash_container("workspace")
    cause = 'unable to upgrade connection: container not found ("workspace")'
    result = await client.run("true")
    assert result.status == {
        "metadata": {},
        "status": "Failure",
        "message": f"Internal error occurred: {cause}",
        "reason": "InternalError",
        "details": {"causes": [{"message": cause}]},
        "code": 500,
    }


async def test_a_client_with_no_known_subprotocol_gets_an_empty_403(client: Client) -> None:
    answer = await client.upgrade("workspace/exec?command=true&stdout=true", Sec_WebSocket_Protocol="foo")
    assert (answer[0], answer[2]) == (403, "")
    assert await client.refused("true", subprotocols=()) == 403


async def test_v5_is_preferred_whatever_the_order(client: Client) -> None:
    async with client.connect("true", subprotocols=(V4, V5)) as ws:
        assert ws.protocol == V5


async def test_a_server_may_know_only_v4(tmp_path: Path) -> None:
    async with DevCluster(root=tmp_path, subprotocols=(V4,)) as cluster, aiohttp.ClientSession(cluster.url) as http:
        cluster.add_pod(workspace_manifest(session="s1"))
        path = f"/t/{cluster.token}/api/v1/namespaces/default/pods/workspace/exec?command=true&stdout=true"
        async with http.ws_connect(path, protocols=(V5, V4)) as ws:
            assert ws.protocol == V4
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await http.ws_connect(path, protocols=(V5,))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "workspace/exec?command=true&stdout=true&container=nope",
            status_error(400, "BadRequest", "container nope is not valid for pod workspace"),
        ),
        (
            "two/exec?command=true&stdout=true",
            status_error(
                400, "BadRequest", "a container name must be specified for pod two, choose one of: [workspace other]"
            ),
        ),
        (
            "nope/exec?command=true&stdout=true",
            status_error(404, "NotFound", 'pods "nope" not found', {"name": "nope", "kind": "pods"}),
        ),
        (
            "workspace/exec?command=true&stdout=true&tty=true",
            status_error(400, "BadRequest", "this server has no terminals: tty=true is not supported"),
        ),
    ],
)
async def test_what_is_wrong_before_the_upgrade_is_a_status_object(
    cluster: DevCluster, client: Client, path: str, expected: Json
) -> None:
    two = workspace_manifest("two", session="s1")
    two["spec"]["containers"].append({**two["spec"]["containers"][0], "name": "other"})
    cluster.add_pod(two)
    code, kind, body = await client.upgrade(path)
    assert (code, kind, json.loads(body)) == (expected["code"], "application/json", expected)


async def test_an_exec_without_any_stream_is_refused(client: Client) -> None:
    answer = await client.upgrade("workspace/exec?command=true")
    assert answer == (400, "text/plain", "you must specify at least 1 of stdin, stdout, stderr")


async def test_an_exec_without_an_upgrade_is_refused(client: Client) -> None:
    path = "/api/v1/namespaces/default/pods/workspace/exec"
    assert await client.get(path, command="true", stdout="true") == (
        400,
        status_error(400, "BadRequest", "Upgrade request required"),
    )


async def test_spdy_is_refused(client: Client) -> None:
    code, _, body = await client.upgrade("workspace/exec?command=true&stdout=true", Upgrade="SPDY/3.1")
    assert code == 400
    assert body.startswith("unable to upgrade: ")


# Containers and pods


@LINUX
@pytest.mark.parametrize("end", ["restart_container", "crash_container", "replace_pod", "delete_pod"])
async def test_the_end_of_a_container_kills_everything_in_it(cluster: DevCluster, client: Client, end: str) -> None:
    script = "setsid sh -c 'sleep 61 & sleep 62' & env -i sleep 63 & echo up; wait"
    async with client.connect("sh", "-c", script) as ws:
        await receive(ws)
        assert await receive(ws) == b"\x01up\n"
        await eventually(lambda: len(cluster.processes("workspace")) == 5)
        pids = cluster.processes("workspace")
        getattr(cluster, end)("workspace")
        assert not any(state(pid) in "RSD" for pid in pids)
        assert (await collect(ws)).code == 137


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


async def test_other_containers_of_the_pod_live_on(cluster: DevCluster, client: Client) -> None:
    two = workspace_manifest("two", session="s1")
    two["spec"]["containers"].append({**two["spec"]["containers"][0], "name": "other"})
    cluster.add_pod(two)
    async with client.connect("sleep", "60", pod="two", container="other") as ws:
        await receive(ws)
        pid = (await cluster.exec_started()).pid
        cluster.restart_container("two")
        assert cluster.processes("two") == [pid]


def test_a_restart_changes_the_containers_identity_and_says_why(tmp_path: Path) -> None:
    cluster = DevCluster(root=tmp_path)
    before = cluster.add_pod(workspace_manifest(session="s1"))
    cluster.restart_container("workspace", reason="OOMKilled")
    after = cluster.pod("workspace")
    old, new = before["status"]["containerStatuses"][0], after["status"]["containerStatuses"][0]
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert new["containerID"] != old["containerID"]
    assert new["restartCount"] == 1
    assert new["lastState"]["terminated"]["reason"] == "OOMKilled"
    assert new["lastState"]["terminated"]["containerID"] == old["containerID"]
    assert "running" in new["state"]


def test_a_crashed_container_waits_and_makes_its_pod_unready(tmp_path: Path) -> None:
    cluster = DevCluster(root=tmp_path)
    cluster.add_pod(workspace_manifest(session="s1"))
    cluster.crash_container("workspace")
    status = cluster.pod("workspace")["status"]
    assert status["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    assert {c["type"]: c["status"] for c in status["conditions"]}["Ready"] == "False"
    cluster.restart_container("workspace")
    status = cluster.pod("workspace")["status"]
    assert {c["type"]: c["status"] for c in status["conditions"]}["Ready"] == "True"


def test_a_replaced_pod_keeps_its_name_and_labels_only(tmp_path: Path) -> None:
    cluster = DevCluster(root=tmp_path)
    before = cluster.add_pod(workspace_manifest(session="s1", owner_uid="u1"))
    after = cluster.replace_pod("workspace")
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["spec"] == before["spec"]
    assert after["metadata"]["labels"] == before["metadata"]["labels"]
    assert after["metadata"]["ownerReferences"] == before["metadata"]["ownerReferences"]
    assert (
        after["status"]["containerStatuses"][0]["containerID"]
        != before["status"]["containerStatuses"][0]["containerID"]
    )


@pytest.mark.parametrize(
    ("phase", "state"), [("Running", "running"), ("Pending", "waiting"), ("Succeeded", "terminated")]
)
def test_a_pod_looks_as_the_kubelet_would_report_it(tmp_path: Path, phase: str, state: str) -> None:
    pod = DevCluster(root=tmp_path).add_pod(workspace_manifest(session="s1"), phase=phase)
    status = pod["status"]["containerStatuses"][0]
    assert pod["status"]["phase"] == phase
    assert list(status["state"]) == [state]
    assert status["ready"] == (phase == "Running")
    if phase != "Pending":
        assert re.fullmatch("containerd://[0-9a-f]{64}", status["containerID"])
        assert re.fullmatch("sha256:[0-9a-f]{64}", status["imageID"])


def test_a_pod_of_another_namespace_or_of_a_known_name_is_refused(tmp_path: Path) -> None:
    cluster = DevCluster(root=tmp_path)
    manifest = workspace_manifest(session="s1")
    cluster.add_pod(manifest)
    with pytest.raises(ValueError, match="already"):
        cluster.add_pod(manifest)
    manifest["metadata"] = {"name": "x", "namespace": "elsewhere"}
    with pytest.raises(ValueError, match="only the namespace 'default'"):
        cluster.add_pod(manifest)


# REST


@pytest.mark.parametrize("presented", [None, "", "Bearer wrong", "Basic x", "Bearer "])
async def test_nobody_gets_in_without_the_token(cluster: DevCluster, presented: str | None) -> None:
    headers = {} if presented is None else {"Authorization": presented}
    async with aiohttp.ClientSession(cluster.url, headers=headers) as http:
        for path in ("/version", "/livez", "/nope", "/t/wrong/version", "/t//version", "/t/"):
            async with http.get(path) as response:
                assert response.status == 401
                assert await response.json() == status_error(401, "Unauthorized", "Unauthorized")


async def test_the_token_is_taken_from_the_header_or_from_the_path(cluster: DevCluster) -> None:
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{cluster.url}/version", headers={"Authorization": f"Bearer {cluster.token}"}) as response:
            assert (await response.json())["gitVersion"].startswith("v1.")
        async with http.get(f"{cluster.server}/livez") as response:
            assert await response.text() == "ok"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_it_listens_on_loopback_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        DevCluster(root=tmp_path, host=host)


def test_an_empty_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token"):
        DevCluster(root=tmp_path, token="")


def test_the_kubeconfig_is_for_its_owner_only(tmp_path: Path) -> None:
    path = DevCluster(root=tmp_path).write_kubeconfig(tmp_path / "config")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["current-context"] == "devcluster"


async def test_a_pod_is_got_and_a_missing_one_is_not_found(cluster: DevCluster, client: Client) -> None:
    code, pod = await client.get("/api/v1/namespaces/default/pods/workspace")
    assert (code, pod) == (200, cluster.pod("workspace"))
    for path in ("default/pods/nope", "elsewhere/pods/workspace"):
        name = path.rpartition("/")[2]
        expected = status_error(404, "NotFound", f'pods "{name}" not found', {"name": name, "kind": "pods"})
        assert await client.get(f"/api/v1/namespaces/{path}") == (404, expected)


@pytest.mark.parametrize(
    ("labels", "fields", "names"),
    [
        ("", "", ["a", "b"]),
        ("session=s1,type=workspace", "", ["a"]),
        ("session==s1", "", ["a"]),
        ("session!=s1", "", ["b"]),
        ("extra", "", ["b"]),
        ("!extra", "", ["a"]),
        ("session in (s1, s2),extra", "", ["b"]),
        ("session notin (s1)", "", ["b"]),
        ("", "metadata.name=a", ["a"]),
        ("", "metadata.name!=a,metadata.namespace=default", ["b"]),
        ("", "metadata.namespace=other", []),
        ("", "status.phase=Running", ["a", "b"]),
    ],
)
async def test_a_list_is_selected_by_labels_and_fields(
    tmp_path: Path, labels: str, fields: str, names: list[str]
) -> None:
    async with DevCluster(root=tmp_path) as cluster:
        cluster.add_pod(workspace_manifest("a", session="s1"))
        cluster.add_pod(workspace_manifest("b", session="s2", labels={"extra": "1"}))
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {cluster.token}"}) as http:
            for path in ("/api/v1/namespaces/default/pods", "/api/v1/pods"):
                params = {"labelSelector": labels, "fieldSelector": fields}
                async with http.get(cluster.url + path, params=params) as response:
                    found = await response.json()
                assert (found["kind"], found["apiVersion"]) == ("PodList", "v1")
                assert found["metadata"] == {"resourceVersion": "102"}
                assert [item["metadata"]["name"] for item in found["items"]] == names
                assert not any("kind" in item for item in found["items"])


@pytest.mark.parametrize("query", [{"labelSelector": "a===b"}, {"fieldSelector": "foo=b"}, {"fieldSelector": "foo"}])
async def test_a_selector_that_cannot_be_read_is_a_bad_request(client: Client, query: dict[str, str]) -> None:
    code, body = await client.get("/api/v1/namespaces/default/pods", **query)
    assert (code, body["kind"], body["reason"]) == (400, "Status", "BadRequest")


async def test_what_does_not_exist_and_what_is_not_allowed_are_status_objects(client: Client) -> None:
    missing = "the server could not find the requested resource"
    for path in ("/foo", "/openapi/v2", "/apis/apps/v1", "/api/v1/namespaces/default/secrets"):
        code, body = await client.get(path)
        assert (code, body["message"]) == (404, missing)
    async with client.http.put("/api/v1/namespaces/default/pods/workspace") as response:
        assert response.status == 405
        assert (await response.json())["reason"] == "MethodNotAllowed"


@pytest.mark.parametrize(
    ("verb", "resource", "allowed"),
    [
        ("get", "pods/exec", True),
        ("list", "pods/", True),
        ("watch", "pods/", False),
        ("create", "pods/", False),
        ("get", "secrets/", False),
    ],
)
async def test_an_access_review_says_what_is_allowed(
    cluster: DevCluster, client: Client, verb: str, resource: str, allowed: bool
) -> None:
    cluster.faults.forbidden.add("watch pods")
    name, _, sub = resource.partition("/")
    spec = {"resourceAttributes": {"namespace": "default", "verb": verb, "resource": name, "subresource": sub}}
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    async with client.http.post(path, json={"kind": "SelfSubjectAccessReview", "spec": spec}) as response:
        assert response.status == 201
        body = await response.json()
    assert body["kind"] == "SelfSubjectAccessReview"
    assert body["spec"] == spec
    assert body["status"] == {"allowed": allowed}


@pytest.mark.parametrize("body", [b"{", b"k8s\0\x0a\x7f", b"k8s\0\x12\xff\xff\xff\xff\xff"])
async def test_a_broken_access_review_does_no_harm(client: Client, body: bytes) -> None:
    async with client.http.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", data=body) as response:
        assert response.status in (201, 400)


async def test_deleting_with_a_grace_marks_then_kills(cluster: DevCluster, client: Client) -> None:
    async with client.watch(resourceVersion="101") as event, client.connect("sleep", "60") as ws:
        await receive(ws)
        await cluster.exec_started()
        path = "/api/v1/namespaces/default/pods/workspace"
        async with client.http.delete(path, json={"gracePeriodSeconds": 1}) as response:
            assert response.status == 200
            assert (await response.json())["metadata"]["deletionGracePeriodSeconds"] == 1
        marked = await event()
        assert (marked["type"], "deletionTimestamp" in marked["object"]["metadata"]) == ("MODIFIED", True)
        assert cluster.processes("workspace")
        assert (await event())["type"] == "DELETED"
        assert (await collect(ws)).code == 137
        assert (await client.get(path))[0] == 404


async def test_a_deletion_may_name_the_uid_it_means(cluster: DevCluster, client: Client) -> None:
    path = "/api/v1/namespaces/default/pods/workspace?gracePeriodSeconds=0"
    async with client.http.delete(path, json={"preconditions": {"uid": "other"}}) as response:
        assert (response.status, (await response.json())["reason"]) == (409, "Conflict")
    uid = cluster.pod("workspace")["metadata"]["uid"]
    async with client.http.delete(path, json={"preconditions": {"uid": uid}}) as response:
        assert response.status == 200
    assert (await client.get("/api/v1/namespaces/default/pods"))[1]["items"] == []


async def test_a_pod_that_was_replaced_meanwhile_is_not_deleted_by_an_old_grace(cluster: DevCluster) -> None:
    cluster.delete_pod("workspace", grace_seconds=0.05)
    cluster.replace_pod("workspace")
    await asyncio.sleep(0.1)
    assert cluster.pod("workspace")


# WATCH


async def test_a_watch_shows_what_is_there_and_then_what_happens(cluster: DevCluster, client: Client) -> None:
    async with client.watch() as event:
        first = await event()
        assert (first["type"], first["object"]) == ("ADDED", cluster.pod("workspace"))
        cluster.patch_pod("workspace", lambda pod: pod["metadata"]["labels"].update(new="1"))
        second = await event()
        assert (second["type"], second["object"]) == ("MODIFIED", cluster.pod("workspace"))
        cluster.delete_pod("workspace")
        third = await event()
        assert (third["type"], third["object"]["metadata"]["resourceVersion"]) == ("DELETED", "103")


async def test_a_watch_goes_on_where_a_list_ended(cluster: DevCluster, client: Client) -> None:
    listed = (await client.get("/api/v1/namespaces/default/pods"))[1]["metadata"]["resourceVersion"]
    cluster.mark_deleting("workspace")
    async with client.watch(resourceVersion=listed) as event:
        assert (await event())["type"] == "MODIFIED"


async def test_a_watch_sees_pods_enter_and_leave_its_selection(cluster: DevCluster, client: Client) -> None:
    async with client.watch(labelSelector="color=blue", resourceVersion="101") as event:
        for color in ("red", "blue", "blue", "red"):

            def paint(pod: Json, color: str = color) -> None:
                pod["metadata"]["labels"]["color"] = color

            cluster.patch_pod("workspace", paint)
        assert [(await event())["type"] for _ in range(3)] == ["ADDED", "MODIFIED", "DELETED"]


async def test_a_watch_ends_when_its_time_is_up_with_a_bookmark(client: Client) -> None:
    async with client.watch(resourceVersion="101", timeoutSeconds="1", allowWatchBookmarks="true") as event:
        bookmark = await event()
        assert (bookmark["type"], bookmark["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", "101")
        assert await event() is None


async def test_bookmarks_come_regularly_to_who_wants_them(cluster: DevCluster, client: Client) -> None:
    cluster.bookmark_seconds = 0.02
    async with client.watch(allowWatchBookmarks="true", sendInitialEvents="true") as event:
        assert (await event())["type"] == "ADDED"
        initial = await event()
        assert initial["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
        assert [(await event())["type"] for _ in range(2)] == ["BOOKMARK", "BOOKMARK"]


async def test_a_version_older_than_the_history_is_gone(cluster: DevCluster, client: Client) -> None:
    for _ in range(MAX_HISTORY_EVENTS + 5):
        cluster.patch_pod("workspace", lambda _: None)
    assert len(cluster._history) == MAX_HISTORY_EVENTS
    for version in ("1", "101"):
        async with client.watch(resourceVersion=version) as event:
            error = await event()
            message = f"too old resource version: {version} ({101 + MAX_HISTORY_EVENTS + 5})"
            assert error == {"type": "ERROR", "object": status_error(410, "Expired", message)}
            assert await event() is None
    async with client.watch(resourceVersion="107") as event:
        assert (await event())["object"]["metadata"]["resourceVersion"] == "108"


async def test_a_version_that_is_no_number_is_refused(client: Client) -> None:
    code, body = await client.get("/api/v1/namespaces/default/pods", watch="true", resourceVersion="abc")
    assert code == 500
    assert body["message"].startswith('resourceVersion: Invalid value: "abc"')


async def test_a_watcher_that_left_holds_nothing(cluster: DevCluster, client: Client) -> None:
    async with client.watch() as event:
        await event()
        assert len(cluster._watches) == 1
    await eventually(lambda: not cluster._watches and not cluster._handlers)


async def test_watches_can_be_dropped(cluster: DevCluster, client: Client) -> None:
    async with client.watch() as event:
        await event()
        assert cluster.drop_watch_connections() == 1
        with pytest.raises(aiohttp.ClientError):
            await event()


# Life


async def test_a_restart_of_the_server_keeps_the_port_and_the_processes(cluster: DevCluster, client: Client) -> None:
    url = cluster.url
    async with client.connect("sh", "-c", "cat >/dev/null; sleep 60") as ws:
        await receive(ws)
        pid = (await cluster.exec_started()).pid
        await cluster.restart_server(down_seconds=0.01)
        assert await collect(ws) == Exec(V5, [], set(), 1006)
    assert cluster.url == url
    assert (await client.get("/api/v1/namespaces/default/pods/workspace"))[0] == 200
    assert pid in cluster.processes("workspace")


async def test_exec_connections_can_be_dropped(cluster: DevCluster, client: Client) -> None:
    async with client.connect("sleep", "60") as ws:
        await receive(ws)
        await cluster.exec_started()
        assert cluster.drop_exec_connections() == 1
        assert (await collect(ws)).close_code == 1006
    await eventually(lambda: cluster.drop_exec_connections() == 0)
    assert cluster.processes("workspace") == [cluster.execs[0].pid]


@LINUX
async def test_stopping_leaves_nothing_behind(tmp_path: Path) -> None:
    tasks = asyncio.all_tasks()
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    cluster = DevCluster(root=tmp_path, faults=Faults(hang={"list pods"}))
    await cluster.start()
    cluster.add_pod(workspace_manifest(session="s1"))
    cluster.delete_pod("workspace", grace_seconds=60)
    headers = {"Authorization": f"Bearer {cluster.token}"}
    async with aiohttp.ClientSession(cluster.url, headers=headers) as http:
        client = Client(http)
        async with (
            client.connect("sh", "-c", "setsid sleep 60 & yes") as stalled,
            client.connect("cat") as idle,
            client.connect("sh", "-c", "setsid sleep 60 & echo up; wait") as dropped,
            client.watch() as event,
        ):
            hanging = asyncio.create_task(client.get("/api/v1/namespaces/default/pods"))
            for ws in (stalled, idle, dropped):
                await receive(ws)
            await cluster.exec_started(3)
            assert await receive(dropped) == b"\x01up\n"
            await event()
            reset(dropped)
            pids = cluster.processes("workspace")
            assert len(pids) >= 5
            async with asyncio.timeout(SECONDS):
                await cluster.stop()
            with pytest.raises(aiohttp.ClientError):
                await hanging
    assert not any(state(pid) in "RSD" for pid in pids)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == tasks
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


async def test_a_failure_inside_is_raised_when_it_stops(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    cluster = DevCluster(root=tmp_path, faults=Faults(replace_before_gate=fail))
    await cluster.start()
    cluster.add_pod(workspace_manifest(session="s1"))
    async with aiohttp.ClientSession(cluster.url, headers={"Authorization": f"Bearer {cluster.token}"}) as http:
        result = await Client(http).run("true")
        assert (result.status, result.close_code) == (None, 1006)
    with pytest.raises(ExceptionGroup) as error:
        await cluster.stop()
    assert error.group_contains(ZeroDivisionError)


async def test_execs_and_requests_are_remembered(cluster: DevCluster, client: Client) -> None:
    await client.run("true", "x", subprotocol=V4)
    record = cluster.execs[0]
    pod = cluster.pod("workspace")
    assert (record.pod, record.uid, record.container) == ("workspace", pod["metadata"]["uid"], "workspace")
    assert (record.command, record.subprotocol) == (("true", "x"), V4)
    await client.get("/api/v1/namespaces/default/pods")
    assert list(cluster.requests) == [("get", "pods/exec"), ("list", "pods")]


# Faults


async def test_faults_that_count_hit_so_many_requests(cluster: DevCluster, client: Client) -> None:
    path = "/api/v1/namespaces/default/pods/workspace"
    cluster.faults.unauthorized = 1
    cluster.faults.unavailable = 2
    assert [(await client.get(path))[0] for _ in range(4)] == [401, 503, 503, 200]
    cluster.faults.unavailable = -1
    message = "the server is currently unable to handle the request"
    for _ in range(3):
        assert await client.get(path) == (503, status_error(503, "ServiceUnavailable", message))


@pytest.mark.parametrize(
    ("verb", "path", "scope"),
    [
        ("list pods", "namespaces/default/pods", 'in the namespace "default"'),
        ("list pods", "pods", "at the cluster scope"),
        ("watch pods", "namespaces/default/pods?watch=1", 'in the namespace "default"'),
        ("get pods", "namespaces/default/pods/x", 'in the namespace "default"'),
        ("get pods/exec", "namespaces/default/pods/x/exec", 'in the namespace "default"'),
        ("create pods/exec", "namespaces/default/pods/x/exec", 'in the namespace "default"'),
    ],
)
async def test_what_is_forbidden_is_refused_in_the_words_of_rbac(
    cluster: DevCluster, client: Client, verb: str, path: str, scope: str
) -> None:
    cluster.faults.forbidden.add(verb)
    action, _, resource = verb.partition(" ")
    what, details = ('pods "x"', {"name": "x", "kind": "pods"}) if "/x" in path else ("pods", {"kind": "pods"})
    message = (
        f'{what} is forbidden: User "system:serviceaccount:default:session-proxy" cannot {action} '
        f'resource "{resource}" in API group "" {scope}'
    )
    assert await client.get(f"/api/v1/{path}") == (403, status_error(403, "Forbidden", message, details))


async def test_a_403_may_have_no_body(cluster: DevCluster, client: Client) -> None:
    cluster.faults.forbidden_empty_body = True
    assert (await client.upgrade("workspace/exec?command=true&stdout=true"))[::2] == (403, "")


@pytest.mark.parametrize("what", ["list pods", "get pods", "watch pods", "exec"])
async def test_a_request_may_hang_until_the_switch_is_cleared(cluster: DevCluster, client: Client, what: str) -> None:
    cluster.faults.hang.add(what)
    path, query = "/api/v1/namespaces/default/pods", {}
    if what == "watch pods":
        query = {"watch": "true", "timeoutSeconds": "0"}
    elif what != "list pods":
        path += "/workspace" if what == "get pods" else "/workspace/exec"
    asked = asyncio.create_task(client.http.get(path, params=query).__aenter__())
    await eventually(lambda: cluster.requests)
    await asyncio.sleep(0.05)
    assert not asked.done()
    cluster.faults.hang.clear()
    async with asyncio.timeout(SECONDS):
        response = await asked
    assert response.status == (400 if what == "exec" else 200)
    response.release()


async def test_the_pod_may_be_replaced_between_the_upgrade_and_the_start(cluster: DevCluster, client: Client) -> None:
    before = cluster.pod("workspace")["metadata"]["uid"]

    def replace() -> None:
        cluster.replace_pod("workspace")

    cluster.faults.replace_before_gate = replace
    await client.run("true")
    assert cluster.execs[0].uid != before


async def test_the_pod_may_be_gone_between_the_upgrade_and_the_start(cluster: DevCluster, client: Client) -> None:
    cluster.faults.replace_before_gate = lambda: cluster.delete_pod("workspace")
    status = (await client.run("true")).status
    assert status is not None
    assert 'container not found ("workspace")' in status["message"]


async def test_a_pod_get_may_lie(cluster: DevCluster, client: Client) -> None:
    def lie(pod: Json) -> Json:
        pod["metadata"]["uid"] = "lie"
        return pod

    cluster.faults.get_pod_override = lie
    assert (await client.get("/api/v1/namespaces/default/pods/workspace"))[1]["metadata"]["uid"] == "lie"
    assert cluster.pod("workspace")["metadata"]["uid"] != "lie"


@pytest.mark.parametrize("garbage", [b"", b"\x09unknown", b"\x03not json", bytes(100_000)])
async def test_garbage_comes_first(cluster: DevCluster, client: Client, garbage: bytes) -> None:
    cluster.faults.garbage = garbage
    assert (await client.run("echo", "hi")).frames == [garbage, b"\x01", b"\x01hi\n", SUCCESS]


async def test_output_may_come_as_text(cluster: DevCluster, client: Client) -> None:
    cluster.faults.text_frames = True
    result = await client.run("echo", "hi")
    assert (result.output(1), result.kinds) == (b"hi\n", {WSMsgType.TEXT, WSMsgType.BINARY})


async def test_output_may_be_split_anywhere(cluster: DevCluster, client: Client) -> None:
    cluster.faults.split_frames = 2
    assert (await client.run("echo", "hello")).frames == [b"\x01", b"\x01he", b"\x01ll", b"\x01o\n", SUCCESS]


@pytest.mark.parametrize("limit", [0, 3, 100_000])
async def test_the_connection_may_break_after_so_many_bytes(cluster: DevCluster, client: Client, limit: int) -> None:
    cluster.faults.drop_after_bytes = limit
    result = await client.run("head", "-c", "200000", "/dev/zero")
    assert (len(result.output(1)), result.status, result.close_code) == (limit, None, 1006)


async def test_output_may_stall_while_pings_are_answered(cluster: DevCluster, client: Client) -> None:
    cluster.faults.stall_after_bytes = 3
    async with client.connect("echo", "hello") as ws:
        assert await receive(ws) == b"\x01"
        assert await receive(ws) == b"\x01hel"
        answered = asyncio.create_task(pong(ws))
        await ws.ping(b"x")
        assert await answered == b"x"
        cluster.faults.stall_after_bytes = None
        assert (await collect(ws)).frames == [b"\x01lo\n", SUCCESS]


async def test_a_stalled_exec_has_no_status(cluster: DevCluster, client: Client) -> None:
    cluster.faults.stall_after_bytes = 6
    async with client.connect("echo", "hello") as ws:
        assert [await receive(ws), await receive(ws)] == [b"\x01", b"\x01hello\n"]
        with pytest.raises(TimeoutError):
            await ws.receive(timeout=0.1)


async def test_the_connection_may_break_instead_of_the_status(cluster: DevCluster, client: Client) -> None:
    cluster.faults.drop_before_status = True
    result = await client.run("echo", "hi")
    assert (result.frames, result.close_code) == ([b"\x01", b"\x01hi\n"], 1006)


async def test_the_connection_may_close_without_a_status(cluster: DevCluster, client: Client) -> None:
    cluster.faults.close_without_status = True
    result = await client.run("echo", "hi")
    assert (result.frames, result.close_code) == ([b"\x01", b"\x01hi\n"], 1000)


async def test_the_connection_may_end_abruptly_after_the_status(cluster: DevCluster, client: Client) -> None:
    cluster.faults.abrupt_close = True
    result = await client.run("echo", "hi")
    assert (result.frames[-1], result.close_code) == (SUCCESS, 1006)


async def test_the_status_may_lie_and_be_followed_by_more(cluster: DevCluster, client: Client) -> None:
    cluster.faults.status_override = b"lie"
    cluster.faults.after_status = b"\x01more"
    assert (await client.run("true")).frames == [b"\x01", b"\x03lie", b"\x01more"]


async def test_pings_may_go_unanswered(cluster: DevCluster, client: Client) -> None:
    cluster.faults.ignore_pings = True
    async with client.connect("cat") as ws:
        assert await receive(ws) == b"\x01"
        ws._autoping = False
        await ws.ping()
        await ws.send_bytes(b"\x00after")
        assert await receive(ws) == b"\x01after"


async def test_a_watch_may_be_told_that_its_version_is_gone(cluster: DevCluster, client: Client) -> None:
    cluster.faults.watch_gone = 1
    async with client.watch(resourceVersion="101") as event:
        assert (await event())["object"]["code"] == 410
    async with client.watch() as event:
        assert (await event())["type"] == "ADDED"


# kubectl


class Kubectl:
    def __init__(self, config: Path) -> None:
        self._config = config

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            installed("kubectl"),
            f"--kubeconfig={self._config}",
            f"--cache-dir={self._config.parent / 'cache'}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        process = await self.start(*arguments)
        async with asyncio.timeout(2 * SECONDS):
            out, err = await process.communicate(stdin)
        return process.returncode or 0, out.decode(), err.decode()


@pytest.fixture(params=["http", "https"])
async def served(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DevCluster]:
    context, ca_pem = None, None
    if request.param == "https":
        authority = trustme.CA()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        ca_pem = authority.cert_pem.bytes()
    async with DevCluster(root=tmp_path / "workspace", ssl_context=context, ca_pem=ca_pem) as running:
        running.add_pod(workspace_manifest(session="s1"))
        yield running


@pytest.fixture
def kubectl(served: DevCluster, tmp_path: Path) -> Kubectl:
    return Kubectl(served.write_kubeconfig(tmp_path / "kubeconfig"))


async def test_kubectl_gets_pods(served: DevCluster, kubectl: Kubectl) -> None:
    code, out, err = await kubectl("get", "pods", "-l", "session=s1")
    header, row = out.splitlines()
    assert (code, header.split()) == (0, ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]), err
    assert row.split()[:4] == ["workspace", "1/1", "Running", "0"]
    code, out, err = await kubectl("get", "pod", "workspace", "-o", "json")
    assert (code, json.loads(out)) == (0, served.pod("workspace")), err
    assert (await kubectl("get", "pods", "-l", "session=s2"))[2] == "No resources found in default namespace.\n"
    assert (await kubectl("get", "pod", "nope"))[2] == 'Error from server (NotFound): pods "nope" not found\n'


async def test_kubectl_runs_commands(served: DevCluster, kubectl: Kubectl) -> None:
    answer = await kubectl("exec", "workspace", "-c", "workspace", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert answer == (7, "out\n", "err\ncommand terminated with exit code 7\n")
    assert await kubectl("exec", "-i", "workspace", "--", "cat", stdin=b"in") == (0, "in", "")
    assert served.execs[-1].subprotocol == V5


async def test_kubectl_shows_why_a_command_does_not_start(kubectl: Kubectl) -> None:
    code, _, err = await kubectl("exec", "workspace", "--", "nope")
    assert code == 1
    assert err.startswith("error: Internal error occurred: ")
    assert err.endswith('exec: "nope": executable file not found in $PATH: unknown\n')
    code, _, err = await kubectl("exec", "workspace", "-c", "nope", "--", "true")
    assert code == 1
    # kubectl asks for the pod first and says it itself; earlier releases let the server say it.
    assert "container nope is not valid for pod workspace" in err


async def test_kubectl_asks_what_it_may_do(served: DevCluster, kubectl: Kubectl) -> None:
    assert (await kubectl("auth", "can-i", "list", "pods"))[:2] == (0, "yes\n")
    assert (await kubectl("auth", "can-i", "create", "pods", "--subresource=exec"))[:2] == (0, "yes\n")
    served.faults.forbidden.add("list pods")
    assert (await kubectl("auth", "can-i", "list", "pods"))[:2] == (1, "no\n")
    code, _, err = await kubectl("get", "pods")
    assert code == 1
    assert err.startswith('Error from server (Forbidden): pods is forbidden: User "')


async def test_kubectl_watches_and_deletes(served: DevCluster, kubectl: Kubectl) -> None:
    watching = await kubectl.start("get", "pods", "-w", "--no-headers")
    assert watching.stdout is not None
    try:
        async with asyncio.timeout(2 * SECONDS):
            assert (await watching.stdout.readline()).split()[2] == b"Running"
            await eventually(lambda: ("watch", "pods") in served.requests)
            code, out, _ = await kubectl("delete", "pod", "workspace", "--grace-period=1")
            assert (code, out.startswith('pod "workspace" deleted')) == (0, True)
            assert (await watching.stdout.readline()).split()[2] == b"Terminating"
    finally:
        watching.kill()
        await watching.communicate()
    assert (await kubectl("get", "pods"))[1] == ""
