"""The sidecar where it is meant to run: its image, in the pods of deploy/kubernetes/base, on a real cluster.

Where the cluster has no native sidecars (before 1.29: the field ``restartPolicy`` of an init container is dropped, and
the pod would never start), the test's overlay moves the sidecar to the pod's ordinary containers.
"""

import asyncio
import contextlib
import copy
import itertools
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from conftest import NDJSON, Stream
from oncluster import FAMILY, NEEDS_CLUSTER, ROOT, Json, kubectl, node_name, server_minor, session_proxy_image

# The image is made in a fixture, which has bounds of its own.
pytestmark = [*NEEDS_CLUSTER, pytest.mark.timeout(120, func_only=True)]

BASE = ROOT / "deploy" / "kubernetes" / "base"
ADOPT = ROOT / "deploy" / "kubernetes" / "adopt.sh"

SECONDS_TO_START = 5.0
"""Start to ready in the pod. Its budget on an idle machine is 1 s; this machine may be busy."""

IDLE_MIB = 60
SECONDS_TO_NOTICE = 5.0

SECONDS_TO_ROTATE = 30.0
"""For the kubelet to write a file anew, and for the API server, which remembers answers for 10 s, to refuse a token."""


def eventually(seconds: float) -> Iterator[None]:
    """Give turns to a loop that waits for something outside; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.1)
    pytest.fail(f"not within {seconds:g} s")


@dataclass(frozen=True)
class Deployment:
    """The base, deployed in a namespace of the test."""

    namespace: str
    manifests: str

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return kubectl("-n", self.namespace, *arguments, **options)

    def pod(self, name: str) -> Json:
        pod: Json = json.loads(self.kubectl("get", "pod", name, "-o", "json"))
        return pod

    def wait(self, pod: str, condition: str, seconds: int = 60) -> None:
        self.kubectl("wait", f"--for={condition}", f"pod/{pod}", f"--timeout={seconds}s")

    def manifest(self, name: str) -> Json:
        return next(
            item
            for item in yaml.safe_load_all(self.manifests)
            if item["kind"] == "Pod" and item["metadata"]["name"] == name
        )

    def run(self, pod: str, container: str, *command: str, text: str | None = None) -> tuple[int, str]:
        """Run a command in a container, as an administrator; return its exit status and all output."""
        done = subprocess.run(
            ["kubectl", "-n", self.namespace, "exec", "-i", pod, "-c", container, "--", *command],
            input=text or "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout

    def runner(self, script: str, *arguments: str, text: str | None = None) -> str:
        """Run a script in the runner container, as an administrator, which must succeed."""
        status, output = self.run("demo-runner", "runner", "sh", "-c", script, "sh", *arguments, text=text)
        assert status == 0, output
        return output

    def sidecar(self, script: str, pod: str = "demo-runner") -> str:
        """Run a Python script in the sidecar's container, as an administrator, which must succeed."""
        status, output = self.run(pod, "session-proxy", "python3", "-c", script)
        assert status == 0, output
        return output

    def workspace(self, script: str) -> str:
        status, output = self.run("demo-workspace", "workspace", "sh", "-c", script)
        assert status == 0, output
        return output

    def request(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        """Send a request from the runner container; return the status and the JSON of the answer.

        busybox's wget prints no body of a refusal, and its nc would half-close the connection at the end of its input,
        which the daemon takes for a client that left: so nc runs a program that reads and writes the connection.
        """
        data = "" if body is None else json.dumps(body)
        text = f"{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n{data}"
        script = "nc 127.0.0.1 8080 -e sh -c 'cat <&4 && exec cat >&3' 3>&1 4<&0"
        head, _, content = self.runner(script, text=text).partition("\n\n")  # \r\n, read as text
        answer: Json = json.loads(content)
        return int(head.split()[1]), answer

    def refusal(self, *command: str) -> tuple[int, Json]:
        """Post a command, which must be refused."""
        return self.request("POST", "/exec", {"command": command})

    def post(self, *command: str, accept: str = "text/plain") -> str:
        """Post a command as a runner would, which must be accepted; return the whole answer."""
        script = 'wget -q -O - --header "Accept: $1" --post-data "$2" "$SESSION_PROXY_URL/exec"'
        return self.runner(script, accept, json.dumps({"command": command}))

    def adopt(self) -> None:
        subprocess.run([str(ADOPT), self.namespace], check=True, timeout=60, stdout=subprocess.DEVNULL)


def overlay(directory: Path, namespace: str) -> None:
    """Write what a platform would: the images, where to run, and a runner that ends when it is told to."""
    image, _, tag = session_proxy_image().rpartition(":")
    runner = {"kind": "Pod", "name": "demo-runner"}
    everywhere: list[Json] = [
        {"op": "add", "path": "/spec/nodeName", "value": node_name()},
        # The node is small, and shared.
        {"op": "replace", "path": "/spec/containers/0/resources/requests", "value": {"cpu": "10m", "memory": "64Mi"}},
    ]
    command = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"]
    of_runner: list[Json] = [{"op": "add", "path": "/spec/containers/0/command", "value": command}]
    if server_minor() < 29:
        of_runner += [
            {"op": "remove", "path": "/spec/initContainers/0/restartPolicy"},
            {"op": "move", "from": "/spec/initContainers/0", "path": "/spec/containers/-"},
            {"op": "remove", "path": "/spec/initContainers"},
        ]
    kustomization = {
        "namespace": namespace,
        "resources": [os.path.relpath(BASE, directory)],
        "images": [
            {"name": "localhost/session-proxy", "newName": image, "newTag": tag},
            # Some shell: this one is in every test cluster.
            {"name": "localhost/runner", "newName": "localhost/workspace", "newTag": "dev"},
        ],
        "patches": [
            {"target": {"kind": "Pod"}, "patch": json.dumps(everywhere)},
            {"target": runner, "patch": json.dumps(of_runner)},
        ],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Both pods run; nobody has made one the owner of the other yet."""
    namespace = f"session-proxy-test-{secrets.token_hex(3)}"
    directory = tmp_path_factory.mktemp("overlay")
    overlay(directory, namespace)
    deployment = Deployment(namespace, kubectl("kustomize", str(directory)))
    try:
        kubectl("apply", "-f", "-", text=deployment.manifests)
        deployment.wait("demo-workspace", "condition=Ready")
        for _ in eventually(60):
            if deployment.run("demo-runner", "runner", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/livez")[0] == 0:
                break
        yield deployment
    finally:
        kubectl("delete", "pods", "--all", "-n", namespace, "--grace-period=0", "--force")
        kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture(scope="module")
def session(deployed: Deployment) -> Deployment:
    """The session as it is meant to be."""
    deployed.adopt()
    deployed.wait("demo-runner", "condition=Ready")
    return deployed


def test_nothing_runs_before_the_runner_pod_owns_the_workspace(deployed: Deployment) -> None:
    status, problem = deployed.refusal("touch", "/tmp/ran")
    assert (status, problem["reason"]) == (403, "workspace_not_owned")
    assert deployed.workspace("ls /tmp") == ""
    status, readiness = deployed.request("GET", "/readyz")
    assert (status, [reason["reason"] for reason in readiness["reasons"]]) == (503, ["workspace_not_owned"])

    deployed.adopt()
    assert deployed.post("touch", "/tmp/ran") == '\n---EXIT---\n{"exitCode":0}\n'
    assert deployed.workspace("ls /tmp") == "ran\n"


def test_the_runner_container_runs_commands_in_text_and_ndjson(session: Deployment) -> None:
    command = ("sh", "-c", "hostname; id -u; echo oops >&2; exit 7")
    output, _, record = session.post(*command).rpartition("\n---EXIT---\n")
    assert sorted(output.splitlines()) == ["1000", "demo-workspace", "oops"]
    assert json.loads(record) == {"exitCode": 7}
    events = [json.loads(line) for line in session.post(*command, accept="application/x-ndjson").splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "exit"]
    assert "".join(event["text"] for event in events if event["event"] == "stdout") == "demo-workspace\n1000\n"
    assert "".join(event["text"] for event in events if event["event"] == "stderr") == "oops\n"
    assert (events[-1]["outcome"], events[-1]["exitCode"]) == ("exited", 7)


INSTALLERS = """
for tool in pip pip3 gcc cc ld make; do command -v $tool; done
for python in python3 "$(readlink -f "$(command -v python3)")"; do
    for module in pip ensurepip setuptools wheel; do $python -c "import $module; print($module)" 2>/dev/null; done
done
true
"""
"""Prints what could compile or install something: in the environment of the image, and in its base."""


def test_the_sidecar_has_a_read_only_root_and_nothing_to_install_with(session: Deployment) -> None:
    mounts = session.sidecar("print(open('/proc/mounts').read())").splitlines()
    assert next(line for line in mounts if line.split()[1] == "/").split()[3].split(",")[0] == "ro"
    assert session.run("demo-runner", "session-proxy", "sh", "-c", INSTALLERS) == (0, "")


# --- what the runner container cannot do ------------------------------------------------------------------------------

FILES_WITH_A_TOKEN = (
    "find / -path /proc -prune -o -path /sys -prune -o -type f -exec grep -l eyJhbGciOi {} + 2>/dev/null; "
    "cat /proc/[0-9]*/environ | grep -c eyJhbGciOi || true"
)
"""A service account token is a JWT, and this is how each begins."""

PROCESSES = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done; readlink /proc/self/ns/pid; id -u"


def test_the_runner_container_sees_no_token(session: Deployment) -> None:
    # The search is one that finds: in the sidecar there is the file.
    _, found = session.run("demo-runner", "session-proxy", "sh", "-c", FILES_WITH_A_TOKEN)
    assert re.search(r"^/run/secrets/kubernetes.io/serviceaccount/.*/token$", found, re.MULTILINE), found
    _, found = session.run("demo-runner", "runner", "sh", "-c", FILES_WITH_A_TOKEN)
    assert found.split() == ["0"]
    assert "serviceaccount" not in session.runner("cat /proc/mounts")


def test_the_runner_container_sees_no_process_of_the_sidecar(session: Deployment) -> None:
    _, seen = session.run("demo-runner", "session-proxy", "sh", "-c", PROCESSES)
    *of_sidecar, sidecar_namespace, sidecar_user = seen.splitlines()
    *of_runner, runner_namespace, runner_user = session.runner(PROCESSES).splitlines()
    assert any("session-proxy serve" in line for line in of_sidecar)
    assert any("sleep 3600" in line for line in of_runner)
    # Without a process there is no /proc/PID/mem, environ, root or fd to open, and nothing to attach to.
    assert not any("session-proxy serve" in line for line in of_runner)
    assert sidecar_namespace != runner_namespace
    assert (sidecar_user, runner_user) == ("65532", "10001")


def test_the_api_server_gives_nothing_to_the_runner_container(session: Deployment) -> None:
    url = f"https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/api/v1/namespaces/{session.namespace}/pods"
    status, output = session.run(
        "demo-runner", "runner", "sh", "-c", f"wget -S -O - --no-check-certificate {url}; exit 3"
    )
    assert status == 3
    assert re.search(r"HTTP/1.1 40[13] ", output), output
    assert "demo-workspace" not in output


def test_nothing_listens_on_the_pods_address(session: Deployment) -> None:
    listening = [
        line.split()[1]
        for line in session.runner("cat /proc/net/tcp /proc/net/tcp6").splitlines()
        if line.split()[3] == "0A"
    ]
    assert listening == ["0100007F:1F90"]  # 127.0.0.1:8080, as the kernel writes it
    assert session.runner("cat /proc/net/udp /proc/net/udp6 /proc/net/raw | grep -vc local_address || true") == "0\n"

    address = session.pod("demo-runner")["status"]["podIP"]
    connect = f"nc -w 3 {address} 8080 </dev/null"
    status, output = session.run("demo-workspace", "workspace", "sh", "-c", connect)
    assert (status, "refused" in output) == (1, True), output
    # The other pod does reach this one: somebody who listens is heard.
    listen = ("timeout", "20", "nc", "-l", "-p", "8099", "-e", "echo", "heard")
    with subprocess.Popen(
        ["kubectl", "-n", session.namespace, "exec", "demo-runner", "-c", "runner", "--", *listen]
    ) as listener:
        for _ in eventually(SECONDS_TO_NOTICE):
            if session.run("demo-workspace", "workspace", "nc", "-w", "3", address, "8099")[1] == "heard\n":
                break
        assert listener.wait(10) == 0


# --- what it costs ----------------------------------------------------------------------------------------------------

STARTED = (
    "print(int(open('/proc/1/stat').read().rpartition(') ')[2].split()[19]) / __import__('os').sysconf('SC_CLK_TCK'))"
)
"""When the sidecar's first process started, in seconds since the machine did."""

MEMORY = """
import pathlib
v2, v1 = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/sys/fs/cgroup/memory")
root, usage, inactive = (v2, "memory.current", "inactive_file") if (v2 / "memory.current").exists() else (
    v1, "memory.usage_in_bytes", "total_inactive_file")
stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
print((int((root / usage).read_text()) - int(stat[inactive])) / 2**20)
"""
"""The sidecar's working set in MiB, as the kubelet computes it: all of its cgroup but cached files not in use."""


def test_a_sidecar_that_starts_anew_is_ready_soon_and_small(
    session: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    before = float(session.sidecar(STARTED))
    session.sidecar("import os, signal; os.kill(1, signal.SIGTERM)")
    # From the start of its first process to the first request that is told it is ready, by one clock: the kernel's.
    until_ready = (
        'until wget -q -O /dev/null "$SESSION_PROXY_URL/readyz"; do sleep 0.05; done; cut -d " " -f 1 /proc/uptime'
    )
    session.runner('while wget -q -O /dev/null "$SESSION_PROXY_URL/livez"; do sleep 0.05; done 2>/dev/null')
    ready = float(session.runner(f"{{ {until_ready}; }} 2>/dev/null"))
    started = float(session.sidecar(STARTED))
    assert started > before
    assert ready - started <= SECONDS_TO_START

    session.post("true")
    # Probes, and this measurement itself, are processes of the same cgroup for a moment.
    idle = min(float(session.sidecar(MEMORY)) for _ in range(3))
    with capsys.disabled():
        print(f"\nin the pod: start to ready {ready - started:.2f} s, idle {idle:.0f} MiB")  # noqa: T201 (for whoever reads)
    assert idle <= IDLE_MIB
    session.wait("demo-runner", "condition=Ready")


# --- what may happen to it --------------------------------------------------------------------------------------------


@dataclass
class Client:
    """A client of the sidecar in the test's process, by way of a port forward: it outlives the pod's containers."""

    http: aiohttp.ClientSession
    url: str

    async def open(self, *command: str, **members: Any) -> Stream:
        response = await self.http.post(f"{self.url}/exec", json={"command": command, **members}, headers=NDJSON)
        assert response.status == 200, await response.text()
        return Stream(response)

    async def output(self, *command: str) -> bytes:
        """Run a command, which must succeed; return what it printed."""
        stream = await self.open(*command)
        exit_event = await stream.rest()
        assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 0), exit_event
        return stream.data("stdout")


@contextlib.asynccontextmanager
async def client_of(deployment: Deployment, pod: str) -> AsyncIterator[Client]:
    forward = await asyncio.create_subprocess_exec(
        *("kubectl", "-n", deployment.namespace, "port-forward", f"pod/{pod}", ":8080", "--address", "127.0.0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert forward.stdout is not None
    try:
        line = (await asyncio.wait_for(forward.stdout.readline(), 20)).decode()
        address = line.removeprefix("Forwarding from ").partition(" ")[0]
        async with aiohttp.ClientSession() as http:
            yield Client(http, f"http://{address}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            forward.kill()
        await forward.communicate()


def test_a_role_binding_that_is_gone_is_named_and_missed_until_it_is_back(session: Deployment) -> None:
    session.wait("demo-runner", "condition=Ready")
    session.kubectl("delete", "rolebinding", "demo-proxy")
    for _ in eventually(SECONDS_TO_NOTICE):
        status, problem = session.refusal("true")
        if status != 200:
            break
    assert (status, problem["reason"]) == (502, "kube_forbidden")
    assert (problem["verb"], problem["resource"]) == ("get", "pods")
    assert "get pods" in problem["detail"]
    session.wait("demo-runner", "condition=Ready=false", 30)
    status, readiness = session.request("GET", "/readyz")
    assert status == 503
    missing = next(reason for reason in readiness["reasons"] if "create pods/exec" in reason["detail"])
    assert missing["reason"] == "kube_forbidden"
    for need in ("get pods", "watch pods", "get pods/exec"):
        assert need in missing["detail"]
    assert session.request("GET", "/livez")[0] == 200

    kubectl("apply", "-f", "-", text=session.manifests)
    session.wait("demo-runner", "condition=Ready", 30)
    assert session.post("echo", "again").startswith("again\n")


class RotatingToken:
    """A second runner pod for the same workspace, whose token is a file that the test rotates.

    The kubelet replaces a projected token at 80 % of its lifetime, and the shortest is 10 minutes: too long to wait.
    Here the token, just as expiring and of the same ServiceAccount, comes by way of a Secret, which the kubelet puts in
    the same volume in the same way. Each is bound to an object of its own and is void once that is deleted.
    """

    pod = "rotating-runner"

    def __init__(self, session: Deployment) -> None:
        self._session = session
        self.issue()
        pod = copy.deepcopy(self._session.manifest("demo-runner"))
        pod["metadata"]["name"] = self.pod
        sidecar = next(
            container
            for container in itertools.chain(pod["spec"].get("initContainers", ()), pod["spec"]["containers"])
            if container["name"] == "session-proxy"
        )
        owner = self._session.pod("demo-runner")["metadata"]["uid"]
        sidecar["env"] = [
            *(item for item in sidecar["env"] if item["name"] not in ("OWNER_MODE", "POD_NAME", "POD_UID")),
            {"name": "OWNER_MODE", "value": "uid"},
            {"name": "OWNER_UID", "value": owner},
        ]
        volume = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "session-proxy-token")
        projected = {"secret": {"name": "rotating", "items": [{"key": "token", "path": "token"}]}}
        volume["projected"]["sources"] = [
            projected if "serviceAccountToken" in source else source for source in volume["projected"]["sources"]
        ]
        self._session.kubectl("apply", "-f", "-", text=json.dumps(pod))
        self._session.wait(self.pod, "condition=Ready")

    def rotate(self) -> None:
        """Put another token in the file; return when the sidecar's container sees it and the one before is void."""
        name, token = self._name, self._token
        self.issue()
        read = "print(open('/var/run/secrets/kubernetes.io/serviceaccount/token').read())"
        for _ in eventually(SECONDS_TO_ROTATE):
            # Any change of the pod makes the kubelet look at its volumes now, instead of within a minute.
            self._session.kubectl("annotate", "pod", self.pod, f"nudge={secrets.token_hex(3)}", "--overwrite")
            if self._session.sidecar(read, self.pod).strip() == self._token:
                break
        self._session.kubectl("delete", "secret", name)
        request = ["kubectl", "-n", self._session.namespace, "get", "pod", "demo-workspace", "--token", token]
        for _ in eventually(SECONDS_TO_ROTATE):
            answer = subprocess.run(request, capture_output=True, text=True, check=False, timeout=30)
            if "Unauthorized" in answer.stderr:
                break

    def issue(self) -> None:
        """Make a token, valid as long as a Secret of its own exists, and write it where the file comes from."""
        self._name = f"token-{secrets.token_hex(3)}"
        self._session.kubectl("create", "secret", "generic", self._name)
        self._token = self._session.kubectl(
            *("create", "token", "demo-proxy", "--duration", "10m"),
            *("--bound-object-kind", "Secret", "--bound-object-name", self._name),
        ).strip()
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "rotating"}}
        self._session.kubectl("apply", "-f", "-", text=json.dumps(secret | {"stringData": {"token": self._token}}))


@pytest.fixture(scope="module")
def rotating(session: Deployment) -> RotatingToken:
    return RotatingToken(session)


async def test_a_token_that_rotates_breaks_neither_a_stream_nor_the_next_exec(
    session: Deployment, rotating: RotatingToken
) -> None:
    async with client_of(session, rotating.pod) as client:
        assert await client.output("echo", "before") == b"before\n"
        stream = await client.open("sh", "-c", "until [ -e /tmp/rotated ]; do echo tick; sleep 0.2; done; echo went on")
        await stream.until("stdout", b"tick")
        await asyncio.to_thread(rotating.rotate)
        assert await client.output("touch", "/tmp/rotated") == b""
        exit_event = await stream.rest()
        assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 0)
        assert stream.data("stdout").endswith(b"tick\nwent on\n")


async def test_a_runner_pod_that_is_deleted_takes_its_commands_with_it(
    session: Deployment, rotating: RotatingToken
) -> None:
    # The pod that does not own the workspace, which so remains to be looked at.
    mark = secrets.token_hex(6)
    async with client_of(session, rotating.pod) as client:
        stream = await client.open("sh", "-c", FAMILY, env={"MARK": mark})
        await stream.until("stdout", b"ready")
        session.kubectl("delete", "pod", rotating.pod, "--wait=false")
        exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reaped"]) == ("shutdown", True)
    assert session.workspace(f"grep -ls MARK={mark} /proc/[0-9]*/environ || true") == ""


def test_a_deleted_runner_pod_takes_its_workspace_with_it(session: Deployment) -> None:
    """The last test: it ends the session."""
    session.kubectl("delete", "pod", "demo-runner", "--wait=false")
    session.wait("demo-workspace", "delete", 60)
