"""The egress-lockdown component on a real cluster: the runner reaches localhost and nothing else, and cannot undo it.

What is rendered from deploy/kubernetes runs as it is, with these differences, which are the test's:

- Kubernetes before 1.29 has no native sidecars: there the sidecar is an ordinary container. network-init stays an init
  container, the first.
- A server and a probe run in the runner's container, whose image is the sidecar's for the sake of its Python, and the
  same pod has three containers more: user 0 without capabilities, and the network-init image (nft) as user 0 and as the
  runner's user, both without capabilities.
- "Outside" is a network namespace with documentation addresses. It is joined to the pods by a second interface of
  theirs, since nothing routes these addresses; the rules do not name interfaces. The other pod is reached over the
  cluster's own network, over IPv6 by its link-local address, for pods have no other there. The API server has IPv4 only.
- The control is the same pod without the component: all that is refused in the one is answered in the other.
"""

import contextlib
import errno
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from oncluster import NEEDS_CLUSTER, ROOT, Json, build_image, kubectl, node_name, server_minor, session_proxy_image
from reachability import PROBE, SERVER, Attempt, answered, asked, everywhere

# The images are made in a fixture, which has bounds of its own.
pytestmark = [
    *NEEDS_CLUSTER,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are root's to make"),
    pytest.mark.timeout(180, func_only=True),
]

KUBERNETES = ROOT / "deploy" / "kubernetes"
COMPONENT = KUBERNETES / "components" / "egress-lockdown"
WORKSPACE_IMAGE = os.environ.get("WORKSPACE_IMAGE", "localhost/workspace:dev")
SECONDS_TO_START = 60
LOCKED, OPEN, NEIGHBOUR = "demo-runner", "open-demo-runner", "neighbour"
PORT = 7000
NOT_STARTED = "; the pod is not started"


# --- images -----------------------------------------------------------------------------------------------------------


@functools.cache
def network_init_image() -> str:
    """The component's image as the cluster knows it: NETWORK_INIT_IMAGE (with a tag), or built here."""
    given = os.environ.get("NETWORK_INIT_IMAGE")
    return given or build_image(
        COMPONENT, "localhost/session-proxy-network-init", base="docker.io/library/debian:12-slim"
    )


# --- manifests --------------------------------------------------------------------------------------------------------


def rendered(directory: Path, namespace: str, **members: Any) -> list[Json]:
    """Render an overlay of the base, as somebody who installs it writes one."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [os.path.relpath(KUBERNETES / "base", directory)],
    }
    (directory / "kustomization.yaml").write_text(json.dumps(kustomization | members))
    return list(yaml.safe_load_all(kubectl("kustomize", str(directory))))


def for_this_cluster(pod: Json, images: dict[str, str]) -> Json:
    """Put a pod on a node that no scheduler chooses, in little room, its sidecar as the release can have it."""
    spec = pod["spec"]
    if server_minor() < 29 and (init := spec.get("initContainers")):
        sidecars = [each for each in init if each.pop("restartPolicy", None)]
        spec["initContainers"] = [each for each in init if each not in sidecars]
        spec["containers"] += sidecars
    for container in spec["containers"] + spec.get("initContainers", []):
        container["image"] = images.get(container["name"], container["image"])
        container["imagePullPolicy"] = "Never"
        container["resources"]["requests"] = {"cpu": "10m", "memory": "16Mi"}
    spec |= {"nodeName": node_name(), "terminationGracePeriodSeconds": 0}
    return pod


def container(name: str, image: str, command: list[str], user: int) -> Json:
    return {
        "name": name,
        "image": image,
        "command": command,
        "resources": {},
        "securityContext": {
            "runAsUser": user,
            "runAsNonRoot": bool(user),
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def renamed(pod: Json, name: str) -> Json:
    copy: Json = json.loads(json.dumps(pod))
    copy["metadata"]["name"] = name
    return copy


def initial(pod: Json, name: str) -> Json:
    found: Json = next(each for each in pod["spec"]["initContainers"] if each["name"] == name)
    return found


# --- the pods of this module ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outside:
    """The network namespace that stands for the outside, and its addresses."""

    name: str
    address4: str = "198.51.100.1"
    address6: str = "2001:db8:a::1"

    def join(self, netns: int, index: int) -> tuple[str, str]:
        """Give the pod with this process a second interface into it; return the pod's addresses there."""
        end, mine4, mine6 = f"pod{index}", f"198.51.100.{index}", f"2001:db8:a::{index}"
        ip("link", "add", end, "netns", self.name, "type", "veth", "peer", "name", "outside", "netns", str(netns))
        ip("-n", self.name, "link", "set", end, "master", "switch", "up")
        for arguments in (
            ("link", "set", "outside", "up"),
            ("address", "add", f"{mine4}/24", "dev", "outside"),
            ("address", "add", f"{mine6}/64", "dev", "outside", "nodad"),
        ):
            enter(netns, "ip", *arguments)
        return mine4, mine6

    def reaches(self, attempts: list[Attempt]) -> set[Attempt]:
        done = run("ip", "netns", "exec", self.name, sys.executable, "-c", PROBE, asked(attempts))
        return answered(attempts, done)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def ip(*arguments: str) -> str:
    return run("ip", *arguments)


def enter(process: int, *command: str) -> str:
    return run("nsenter", "--target", str(process), "--net", *command)


@dataclass(frozen=True)
class Pods:
    """A namespace with the locked pod, its workspace, the same pod without the component, and a neighbour."""

    namespace: str
    service: Attempt
    api: Attempt
    outside: Outside
    addresses: dict[str, tuple[str, str]]  # of each pod on the interface that leads outside

    def get(self, name: str) -> Json:
        found: Json = json.loads(kubectl("get", "pod", name, "-n", self.namespace, "-o", "json"))
        return found

    def exec(self, pod: str, container: str, *command: str) -> str:
        return kubectl("exec", pod, "-n", self.namespace, "-c", container, "--", *command)

    def refusal(self, pod: str, container: str, *command: str) -> str:
        """Run a command that must fail; return what it says."""
        done = subprocess.run(
            ["kubectl", "exec", pod, "-n", self.namespace, "-c", container, "--", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert done.returncode
        return done.stderr

    def reaches(self, pod: str, container: str, attempts: list[Attempt]) -> set[Attempt]:
        return answered(attempts, self.exec(pod, container, "python3", "-c", PROBE, asked(attempts)))

    def links(self, name: str) -> list[str]:
        """Return the addresses of a pod on the cluster's network, IPv4 and link-local IPv6."""
        lines = self.exec(name, "runner", "cat", "/proc/net/if_inet6").splitlines()
        digits = next(line.split()[0] for line in lines if line.startswith("fe80") and line.endswith("eth0"))
        colons = ":".join(digits[start : start + 4] for start in range(0, 32, 4))
        return [self.get(name)["status"]["podIP"], f"{colons}%eth0"]

    def elsewhere(self) -> list[Attempt]:
        """All that the runner might want to reach and something answers at: API server, another pod, outside."""
        hosts = [*self.links(NEIGHBOUR), self.outside.address4, self.outside.address6]
        datagram = Attempt("udp", self.api.host, self.api.port)
        return [self.service, self.api, datagram, *everywhere(hosts, PORT)]


def process_in(pod: Json) -> int:
    """Return a process of the pod, by its cgroup."""
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            if f"pod{pod['metadata']['uid']}" in path.read_text():
                return int(path.parent.name)
    pytest.skip("the node's processes are not on this machine, so the pods cannot be joined to a network namespace")


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    there = Outside(f"outside-{secrets.token_hex(3)}")
    ip("netns", "add", there.name)
    try:
        ip("-n", there.name, "link", "set", "lo", "up")
        ip("-n", there.name, "link", "add", "switch", "up", "type", "bridge")
        ip("-n", there.name, "address", "add", f"{there.address4}/24", "dev", "switch")
        ip("-n", there.name, "address", "add", f"{there.address6}/64", "dev", "switch", "nodad")
        command = ["ip", "netns", "exec", there.name, sys.executable, "-c", SERVER, str(PORT)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            assert server.stdout.readline() == "ready\n"
            yield there
            server.kill()
    finally:
        ip("netns", "del", there.name)


@pytest.fixture(scope="module")
def echo_at_the_api_server() -> Iterator[None]:
    """Answer datagrams at the API server's address, on its port, where TCP alone is spoken."""
    host, port = api_server()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            pytest.skip(f"the API server is not on this machine: {host}")

        def echo() -> None:
            while data := server.recvfrom(2000):
                server.sendto(data[0], data[1])
                if data[0] == b"exit":
                    return

        thread = threading.Thread(target=echo)
        thread.start()
        yield
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"exit", (host, port))
        thread.join(5)


def api_server() -> tuple[str, int]:
    endpoints = json.loads(kubectl("get", "endpoints", "kubernetes", "-n", "default", "-o", "json"))
    subset = endpoints["subsets"][0]
    return subset["addresses"][0]["ip"], subset["ports"][0]["port"]


@pytest.fixture(scope="module")
def pods(
    outside: Outside,
    echo_at_the_api_server: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pods]:
    namespace = f"session-proxy-egress-{secrets.token_hex(3)}"
    proxy, network_init = session_proxy_image(), network_init_image()

    def fitted(pod: Json) -> Json:
        images = {"session-proxy": proxy, "runner": proxy, "workspace": WORKSPACE_IMAGE}
        return for_this_cluster(pod, images)

    directory = tmp_path_factory.mktemp("overlay")
    repository, _, tag = network_init.rpartition(":")
    with_it = rendered(
        directory,
        namespace,
        components=[os.path.relpath(COMPONENT, directory)],
        images=[{"name": "session-proxy-network-init", "newName": repository, "newTag": tag}],
    )
    without = [each for each in rendered(directory, namespace, namePrefix="open-") if each["kind"] != "Namespace"]
    without = [each for each in without if each["metadata"]["name"] != "open-demo-workspace"]
    extras = [
        container("root", proxy, ["sleep", "infinity"], 0),
        container("nft-root", network_init, ["busybox", "sleep", "infinity"], 0),
        container("nft-runner", network_init, ["busybox", "sleep", "infinity"], 10001),
    ]
    objects = with_it + without
    for each in objects:
        if each["kind"] != "Pod":
            continue
        fitted(each)
        if each["metadata"]["name"].endswith("-runner"):
            runner = each["spec"]["containers"][0]
            assert runner["name"] == "runner"
            runner["command"] = ["python3", "-c", SERVER, str(PORT)]
            each["spec"]["containers"] += json.loads(json.dumps(extras))
    locked = next(each for each in objects if each["metadata"]["name"] == LOCKED and each["kind"] == "Pod")
    for_neighbour = container("runner", proxy, ["python3", "-c", SERVER, str(PORT)], 10001)
    neighbour = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NEIGHBOUR, "namespace": namespace},
        "spec": {"automountServiceAccountToken": False, "containers": [for_neighbour]},
    }
    objects.append(fitted(neighbour))

    powerless = renamed(locked, "powerless-runner")
    del initial(powerless, "network-init")["securityContext"]["capabilities"]["add"]
    # Nor has this one NET_ADMIN: should it not be refused, the node must not pay for it.
    on_the_node = renamed(powerless, "node-runner")
    on_the_node["spec"]["hostNetwork"] = True
    objects += [powerless, on_the_node]

    kubectl("create", "-f", "-", text="---\n".join(yaml.safe_dump(each) for each in objects[:1]))
    try:
        kubectl("create", "-f", "-", text="---\n".join(yaml.safe_dump(each) for each in objects[1:]))
        run("sh", str(KUBERNETES / "adopt.sh"), namespace)
        wait = ("wait", "-n", namespace, f"--timeout={SECONDS_TO_START}s")
        kubectl(*wait, "--for=condition=Ready", f"pod/{LOCKED}", f"pod/{NEIGHBOUR}")
        kubectl(*wait, "--for=jsonpath={.status.phase}=Running", f"pod/{OPEN}")
        service = kubectl("get", "service", "kubernetes", "-n", "default", "-o", "jsonpath={.spec.clusterIP}")
        made = Pods(namespace, Attempt("tcp", service, 443), Attempt("tcp", *api_server()), outside, {})
        for index, name in ((11, LOCKED), (12, OPEN)):
            made.addresses[name] = outside.join(process_in(made.get(name)), index)
        yield made
    finally:
        kubectl("delete", "namespace", namespace, "--wait=false")


# --- what it must show ------------------------------------------------------------------------------------------------

USERS = pytest.mark.parametrize("who", ["runner", "root"])


@USERS
def test_without_the_component_everything_is_reached(pods: Pods, who: str) -> None:
    elsewhere = pods.elsewhere()
    assert pods.reaches(OPEN, who, elsewhere) == set(elsewhere)


@USERS
def test_with_it_nothing_is_reached_and_all_fails_at_once(pods: Pods, who: str) -> None:
    # A datagram to the Service's address comes last and only here: where no rule stops it, it leaves this machine.
    datagram = Attempt("udp", pods.service.host, pods.service.port)
    assert pods.reaches(LOCKED, who, [*pods.elsewhere(), datagram]) == set()


@USERS
def test_localhost_is_reached(pods: Pods, who: str) -> None:
    here = [*everywhere(("127.0.0.1", "::1", *pods.addresses[LOCKED]), PORT), Attempt("tcp", "127.0.0.1", 8080)]
    assert pods.reaches(LOCKED, who, here) == set(here)


def test_exec_still_works_through_the_sidecar(pods: Pods) -> None:
    script = (
        "import sys, urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8080/exec',"
        """ b'{"command": ["sh", "-c", "echo through; exit 3"]}').read().decode(), end='')"""
    )
    answer = pods.exec(LOCKED, "runner", "python3", "-c", script)
    assert answer == 'through\n\n---EXIT---\n{"exitCode":3}\n'


def test_nobody_reaches_the_pod_from_another_pod_or_from_outside(pods: Pods) -> None:
    for name, open_to in ((OPEN, True), (LOCKED, False)):
        from_pod = everywhere(pods.links(name), PORT)
        from_outside = everywhere(pods.addresses[name], PORT)
        assert pods.reaches(NEIGHBOUR, "runner", from_pod) == (set(from_pod) if open_to else set())
        assert pods.outside.reaches(from_outside) == (set(from_outside) if open_to else set())


@pytest.mark.parametrize("who", ["nft-root", "nft-runner"])
def test_no_rule_can_be_changed_or_read(pods: Pods, who: str) -> None:
    for command in (
        "flush ruleset",
        "delete table inet session_proxy_egress",
        "insert rule inet session_proxy_egress output accept",
        "add chain inet session_proxy_egress output { policy accept; }",
        "list ruleset",
    ):
        assert "Operation not permitted" in pods.refusal(LOCKED, who, "nft", command)
    assert pods.reaches(LOCKED, "runner", pods.elsewhere()) == set()


@USERS
def test_no_socket_goes_past_the_rules(pods: Pods, who: str) -> None:
    script = """
import socket
for family, kind in ((socket.AF_PACKET, socket.SOCK_RAW), (socket.AF_INET, socket.SOCK_RAW), (socket.AF_INET6, socket.SOCK_RAW)):
    try:
        socket.socket(family, kind, socket.IPPROTO_RAW)
        print("made")
    except PermissionError:
        print("refused")
"""
    assert pods.exec(LOCKED, who, "python3", "-c", script) == "refused\n" * 3


def test_the_rules_outlive_a_container(pods: Pods) -> None:
    end = f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'exit', ('127.0.0.1', {PORT}))"
    pods.exec(LOCKED, "root", "python3", "-c", end)

    def restarted(pod: Json) -> bool:
        runner = next(each for each in pod["status"]["containerStatuses"] if each["name"] == "runner")
        return bool(runner["restartCount"] and runner["ready"])

    awaited(pods, LOCKED, restarted)
    assert pods.reaches(LOCKED, "runner", pods.elsewhere()) == set()


def awaited(pods: Pods, name: str, condition: Callable[[Json], bool]) -> Json:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition(pod := pods.get(name)):
        assert time.monotonic() < deadline, pod["status"]
        time.sleep(0.2)
    return pod


@pytest.mark.parametrize(
    ("name", "told"),
    [
        # Without the capability the kernel takes no rules, as one without nf_tables takes none.
        (
            "powerless-runner",
            "network-init: the rules were not loaded (is NET_ADMIN granted, has the kernel nf_tables?)",
        ),
        ("node-runner", "network-init: POD_IP and HOST_IP are both '"),
    ],
)
def test_where_the_rules_are_not_loaded_nothing_of_the_pod_starts(pods: Pods, name: str, told: str) -> None:
    def started_again(pod: Json) -> bool:
        return bool(pod["status"].get("initContainerStatuses", [{}])[0].get("restartCount"))

    status = awaited(pods, name, started_again)["status"]
    assert status["phase"] == "Pending"
    first, *others = status["initContainerStatuses"]
    assert first["name"] == "network-init"
    for each in [*others, *status["containerStatuses"]]:
        assert each["state"] == {"waiting": {"reason": "PodInitializing"}}
        assert not each.get("containerID")
    ended = first["state"].get("terminated") or first["lastState"]["terminated"]
    assert ended["exitCode"] == 1
    log = kubectl("logs", name, "-n", pods.namespace, "-c", "network-init")
    assert log.count("\n") == 1
    for words in (log.strip(), ended["message"].strip()):
        assert words.startswith(told)
        assert words.endswith(NOT_STARTED)


def test_the_init_container_says_what_it_loaded(pods: Pods) -> None:
    log = kubectl("logs", LOCKED, "-n", pods.namespace, "-c", "network-init")
    assert f"meta skuid 65532 ip daddr {pods.service.host} tcp dport {pods.service.port} accept\n" in log
