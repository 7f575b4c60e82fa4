"""The rules of the egress-lockdown component, loaded into network namespaces, and tried by every user of a runner pod.

"pod" stands for the pod, "outside" for everything else: the API server, name servers, other pods. Documentation
addresses, one veth between the two, nothing beyond them.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from reachability import PROBE, SERVER, Attempt, answered, asked, everywhere

from session_proxy.devcluster import workspace_manifest
from session_proxy.policy import Level, PolicySettings, evaluate

RULES = Path(__file__).parents[1] / "deploy/kubernetes/components/egress-lockdown/rules.sh"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
TOOLS = ("nft", "ip", "nsenter", "unshare", "setpriv", "busybox")
MISSING = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are root's to make"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SIDECAR, RUNNER, ROOT = 65532, 10001, 0
POD4, POD6 = "198.51.100.2", "2001:db8::2"
OUT4, OUT6 = "198.51.100.1", "2001:db8::1"
API = f"{OUT4}:443 [{OUT6}]:443"
NOT_ROOTS = "setpriv --bounding-set=-all --inh-caps=-all"


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {"PATH": PATH} | options.pop("env", {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, env=env, **options)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


@dataclass(frozen=True)
class Network:
    """The two network namespaces, by name."""

    pod: str
    outside: str

    def inside(self, *command: str, namespace: str = "", check: bool = True, env: dict[str, str] | None = None) -> str:
        done = run("nsenter", f"--net=/run/netns/{namespace or self.pod}", *command, env=env or {}, check=check)
        return done.stdout + done.stderr

    def load(self, resolv_conf: Path | None = None, **settings: str) -> str:
        """Run rules.sh as the image does, with its shell; return what it prints."""
        command = ["busybox", "sh", str(RULES)]
        if resolv_conf:
            script = f'mount --bind {resolv_conf} /etc/resolv.conf && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", script, "sh", *command]
        return self.inside(*command, env={"API_ENDPOINTS": API} | settings)

    def open(self, user: int, attempts: Sequence[Attempt], namespace: str = "") -> set[Attempt]:
        """Return those that were answered; what was not must have failed at once, not by a timeout."""
        command = [sys.executable, "-c", PROBE, asked(attempts, user)]
        if user == ROOT:
            command = [*NOT_ROOTS.split(), *command]
        return answered(attempts, self.inside(*command, namespace=namespace))


@contextlib.contextmanager
def python_in(namespace: str, script: str, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """Run a script in a namespace, and wait until it says that it is ready."""
    command = ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def answering(namespace: str, *ports: int) -> "contextlib.AbstractContextManager[subprocess.Popen[str]]":
    return python_in(namespace, SERVER, *map(str, ports))


@pytest.fixture(scope="module")
def namespaces() -> None:
    if run("unshare", "--mount", "--net", "true", check=False).returncode:
        pytest.skip("this root may not make network namespaces")


@pytest.fixture
def network(joined: Network) -> Network:
    """Two namespaces that reach each other freely, as a pod's does before its first container."""
    joined.inside("nft", "flush", "ruleset")
    for namespace in (joined.pod, joined.outside):  # so that every test needs neighbour discovery
        run("ip", "-n", namespace, "neigh", "flush", "all")
    return joined


@pytest.fixture(scope="module")
def joined(namespaces: None) -> Iterator[Network]:
    mark = secrets.token_hex(3)
    pod, outside = f"pod-{mark}", f"outside-{mark}"
    with contextlib.ExitStack() as stack:
        for namespace in (pod, outside):
            run("ip", "netns", "add", namespace)
            stack.callback(run, "ip", "netns", "del", namespace)
        run("ip", "-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside)
        for namespace in (pod, outside):
            run("ip", "-n", namespace, "-batch", "-", input="link set lo up\nlink set eth0 up\n")
        for namespace, *addresses in ((pod, f"{POD4}/24", f"{POD6}/64"), (outside, f"{OUT4}/24", f"{OUT6}/64")):
            for address in addresses:
                run("ip", "-n", namespace, "address", "add", address, "dev", "eth0", "nodad")
        write = 'echo "0 4294967294" >/proc/sys/net/ipv4/ping_group_range; echo 1 >/proc/sys/net/ipv4/ip_forward'
        run("nsenter", f"--net=/run/netns/{pod}", "sh", "-c", write)
        stack.enter_context(answering(outside, 53, 443, 6443))
        yield Network(pod, outside)


# --- who reaches what -------------------------------------------------------------------------------------------------

OUTSIDE = everywhere((OUT4, OUT6), 53, 443, 6443, ping=True)
API_SERVER = {Attempt("tcp", OUT4, 443), Attempt("tcp", OUT6, 443)}


def test_without_the_rules_everyone_reaches_everything(network: Network) -> None:
    for user in (SIDECAR, RUNNER, ROOT):
        assert network.open(user, OUTSIDE) == set(OUTSIDE)


def test_the_sidecar_reaches_the_api_server_alone(network: Network) -> None:
    network.load()
    assert network.open(SIDECAR, OUTSIDE) == API_SERVER


@pytest.mark.parametrize("user", [RUNNER, ROOT])
def test_nobody_else_reaches_anything(network: Network, user: int) -> None:
    network.load()
    assert network.open(user, OUTSIDE) == set()


def test_the_sidecar_may_have_another_user_id(network: Network) -> None:
    network.load(SIDECAR_UID="1000660000")
    assert network.open(1000660000, OUTSIDE) == API_SERVER
    assert network.open(SIDECAR, OUTSIDE) == set()


@pytest.mark.parametrize("host", [OUT4, OUT6])
def test_the_service_address_is_the_default(network: Network, host: str) -> None:
    network.load(API_ENDPOINTS="", KUBERNETES_SERVICE_HOST=host, KUBERNETES_SERVICE_PORT="443")
    assert network.open(SIDECAR, OUTSIDE) == {Attempt("tcp", host, 443)}


def test_dns_is_for_the_sidecar_and_only_when_it_is_allowed(network: Network, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"search example.org\nnameserver {OUT4}\noptions ndots:5\nnameserver {OUT6}")
    network.load(resolv_conf, ALLOW_DNS="true")
    dns = {Attempt(kind, host, 53) for kind in ("tcp", "udp") for host in (OUT4, OUT6)}
    assert network.open(SIDECAR, OUTSIDE) == API_SERVER | dns
    assert network.open(RUNNER, OUTSIDE) == set()
    assert network.open(ROOT, OUTSIDE) == set()


def test_the_port_that_the_sidecar_left_carries_nobody_else(network: Network, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {OUT4}\n")
    network.load(resolv_conf, ALLOW_DNS="true")
    # Connection tracking still holds the sidecar's flow as established when the next user takes its port.
    query = Attempt("udp", OUT4, 53, source=40_000)
    assert network.open(SIDECAR, [query]) == {query}
    assert network.open(RUNNER, [query]) == set()


def test_what_the_sidecar_wrote_before_it_closed_still_arrives(network: Network) -> None:
    network.load(API_ENDPOINTS=f"{OUT4}:7000")
    size = 1 << 16
    receiver = (
        "import socket; server = socket.socket(); server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096);"
        " server.bind(('', 7000)); server.listen(); print('ready', flush=True); stream, _ = server.accept(); input();"
        " print(sum(map(len, iter(lambda: stream.recv(65536), b''))))"
    )
    sender = (
        f"import os, socket; os.setresuid({SIDECAR}, {SIDECAR}, {SIDECAR});"
        f" stream = socket.socket(); stream.connect(('{OUT4}', 7000)); stream.sendall(bytes({size}))"
    )
    with python_in(network.outside, receiver) as process:
        # Until the sender is gone the receiver takes 4 KiB at most: the rest leaves a socket that has no user any more.
        network.inside(sys.executable, "-c", sender)
        assert process.communicate("go on\n", timeout=5)[0] == f"{size}\n"


def test_an_api_server_that_no_router_knows_is_known_to_be_away_at_once(network: Network) -> None:
    beyond = "203.0.113.1"
    run("ip", "-n", network.pod, "route", "replace", beyond, "via", OUT4)
    run("ip", "-n", network.outside, "route", "replace", "unreachable", beyond)
    network.load(API_ENDPOINTS=f"{beyond}:443")
    assert network.open(SIDECAR, [Attempt("tcp", beyond, 443)]) == set()


def test_loopback_is_everyones(network: Network) -> None:
    network.load()
    here = everywhere(("127.0.0.1", "::1", POD4, POD6), 8080, ping=True)
    with answering(network.pod, 8080):
        for user in (SIDECAR, RUNNER, ROOT):
            assert network.open(user, here) == set(here)


def test_nobody_outside_reaches_the_pod(network: Network) -> None:
    there = everywhere((POD4, POD6), 8080, ping=True)
    with answering(network.pod, 8080):
        assert network.open(RUNNER, there, network.outside) == {one for one in there if one.kind != "icmp"}
        network.load()
        assert network.open(RUNNER, there, network.outside) == set()


def test_the_pod_is_no_router(network: Network) -> None:
    beyond = "203.0.113.1"
    back = f"""
        add table inet back
        add chain inet back prerouting {{ type filter hook prerouting priority filter; }}
        add rule inet back prerouting ip daddr {beyond} counter
    """

    def forwarded() -> bool:
        """Send a packet to the pod that is for somebody behind it, and see whether the pod sends it on."""
        script = f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{beyond}', 9))"
        network.inside("nft", "flush ruleset;", back, namespace=network.outside)
        network.inside(sys.executable, "-c", script, namespace=network.outside)
        counted = network.inside("nft", "list", "table", "inet", "back", namespace=network.outside)
        return "counter packets 1 " in counted

    run("ip", "-n", network.outside, "route", "replace", beyond, "via", POD4)
    run("ip", "-n", network.pod, "route", "replace", beyond, "via", OUT4)
    assert forwarded()
    network.load()
    assert not forwarded()


@pytest.mark.parametrize(
    ("report", "group"),
    [
        (
            "meta l4proto igmp",
            f"0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('239.1.2.3') + socket.inet_aton('{POD4}')",
        ),
        (
            "icmpv6 type mld2-listener-report",
            "socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, 'ff05::1234') + bytes(4)",
        ),
    ],
    ids=["igmp", "mld"],
)
def test_joining_a_group_tells_nobody(network: Network, report: str, group: str) -> None:
    watch = f"""
        add table inet watch
        delete table inet watch
        table inet watch {{
            chain made {{ type filter hook output priority -10; {report} counter; }}
            chain sent {{ type filter hook postrouting priority 0; {report} counter; }}
        }}
    """
    join = (
        f"import os, socket; os.setresuid({RUNNER}, {RUNNER}, {RUNNER});"
        f" s = socket.socket(socket.AF_INET{'6' if 'mld' in report else ''}, socket.SOCK_DGRAM);"
        f" s.setsockopt({group}); print('ready', flush=True); input()"
    )

    def packets(chain: str) -> int:
        return int(network.inside("nft", "list", "chain", "inet", "watch", chain).split("packets ")[1].split()[0])

    def sent() -> bool:
        """Join the group, wait until the kernel has made a report of it, and see whether that leaves."""
        network.inside("nft", watch)
        with python_in(network.pod, join):
            deadline = time.monotonic() + 5
            while not packets("made"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return packets("sent") > 0

    assert sent()
    network.load()
    assert not sent()


# --- undoing it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [RUNNER, ROOT])
def test_nobody_without_net_admin_can_change_or_read_the_rules(network: Network, user: int) -> None:
    listed = network.load()
    as_user = [*NOT_ROOTS.split(), f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    own = ["unshare", "--user", "--map-root-user"]  # root of a user namespace of its own, with every capability there
    for command in (
        "nft flush ruleset",
        "nft delete table inet session_proxy_egress",
        "nft insert rule inet session_proxy_egress output accept",
        "nft list ruleset",
    ):
        for who in (as_user, [*as_user, *own]):
            assert "Operation not permitted" in network.inside(*who, *command.split(), check=False)
    assert network.inside("nft", "-n", "list", "ruleset") == listed
    assert network.open(RUNNER, OUTSIDE) == set()


def test_loading_twice_is_loading_once(network: Network) -> None:
    first = network.load()
    assert network.load() == first
    assert network.inside("nft", "-n", "list", "ruleset") == first


def test_loading_again_replaces_the_endpoints(network: Network) -> None:
    network.load()
    network.load(API_ENDPOINTS=f"{OUT4}:6443")
    assert network.open(SIDECAR, OUTSIDE) == {Attempt("tcp", OUT4, 6443)}


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "refused"),
    [
        (Level.RESTRICTED, ["runAsNonRoot", "runAsUser", "capabilities_restricted"]),
        (Level.BASELINE, ["capabilities_baseline"]),
        (Level.PRIVILEGED, []),
    ],
)
def test_no_pod_security_level_below_privileged_admits_the_init_container(level: Level, refused: list[str]) -> None:
    (patch,) = yaml.safe_load((RULES.parent / "network-init.yaml").read_text())
    pod = workspace_manifest(session="s1")
    pod["spec"]["initContainers"] = [patch["value"]]
    violations = evaluate(pod, PolicySettings(level=level, container="workspace"))
    assert [violation.rule for violation in violations] == refused
    labels = yaml.safe_load((RULES.parent / "namespace.yaml").read_text())["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(*command: str, **settings: str) -> str:
    """Run rules.sh in a namespace of its own, where it must exit 1 and load nothing; return its one sentence."""
    script = '"$@"; status=$?; nft list ruleset; exit $status'
    wrapped = ["unshare", "--mount", "--net", "sh", "-c", script, "sh", *command, "busybox", "sh", str(RULES)]
    done = run(*wrapped, check=False, env=settings)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("network-init: ")
    assert done.stderr.endswith("; the pod is not started\n")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "kubernetes.default.svc:443",
        "10.96.0.1",
        "10.96.0.1:",
        "10.96.0.1:https",
        "10.96.0.1:0",
        "10.96.0.1:65536",
        "10.96.0.1:0443",
        "10.96.0:443",
        "10.96.0.1.1:443",
        "10.96.0.256:443",
        "10.96.0.010:443",
        "10.96.0.0/16:443",
        "10.96.0.1-10.96.0.9:443",
        "[10.96.0.1]:443",
        "fd00::1:443",
        "[fd00:::1]:443",
        "[fd00::1::2]:443",
        "[fd00:1]:443",
        "[1:2:3:4:5:6:7:8:9]:443",
        "[fd00::12345]:443",
        "[fe80::1%eth0]:443",
        "[fd00::1]",
        "*:443",
        "10.96.0.1:443 accept; #:443",
        "10.96.0.1:443 other:443",
    ],
)
def test_an_endpoint_that_is_no_address_and_port_is_refused(namespaces: None, value: str) -> None:
    sentence = refused(API_ENDPOINTS=value)
    assert "API_ENDPOINTS: '" in sentence
    assert "must be ADDRESS:PORT or [ADDRESS6]:PORT" in sentence


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"API_ENDPOINTS": " "}, "API_ENDPOINTS names no endpoint"),
        ({"API_ENDPOINTS": ""}, "neither API_ENDPOINTS nor KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT"),
        (
            {"API_ENDPOINTS": "", "KUBERNETES_SERVICE_HOST": "api.example.org", "KUBERNETES_SERVICE_PORT": "443"},
            "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT: 'api.example.org:443' must be",
        ),
        ({"API_ENDPOINTS": "", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "KUBERNETES_SERVICE_PORT: '10.96.0.1:' must"),
        ({"SIDECAR_UID": "0"}, "SIDECAR_UID is '0'; it must be a numeric user id other than 0"),
        ({"SIDECAR_UID": "root"}, "SIDECAR_UID is 'root'"),
        ({"SIDECAR_UID": "0-65532"}, "SIDECAR_UID is '0-65532'"),
        ({"SIDECAR_UID": "0101"}, "SIDECAR_UID is '0101'"),
        ({"SIDECAR_UID": "4294967295"}, "SIDECAR_UID is '4294967295'"),
        ({"ALLOW_DNS": "yes"}, "ALLOW_DNS is 'yes'; it must be true or false"),
        ({"POD_IP": "10.0.0.1", "HOST_IP": "10.0.0.1"}, "POD_IP and HOST_IP are both '10.0.0.1'"),
    ],
)
def test_a_bad_setting_is_refused_by_name(namespaces: None, settings: dict[str, str], told: str) -> None:
    assert told in refused(**({"API_ENDPOINTS": API} | settings))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("search example.org\n", "ALLOW_DNS is true and resolv.conf names no name server"),
        ("nameserver fe80::1%eth0\n", "ALLOW_DNS is true and resolv.conf's name server 'fe80::1%eth0' is no address"),
    ],
)
def test_name_servers_that_no_rule_can_name_are_refused(namespaces: None, text: str, told: str, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(text)
    bind = f'mount --bind {resolv_conf} /etc/resolv.conf && exec "$@"'
    assert told in refused("sh", "-c", bind, "sh", API_ENDPOINTS=API, ALLOW_DNS="true")


def test_without_net_admin_it_fails_and_says_so(namespaces: None) -> None:
    sentence = refused(*NOT_ROOTS.split(), API_ENDPOINTS=API)
    assert "the rules were not loaded (is NET_ADMIN granted, has the kernel nf_tables?)" in sentence
    assert "Operation not permitted" in sentence


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        # A kernel without nf_tables.
        ("echo 'Error: Could not process rule: Not supported'; exit 1", "not loaded (is NET_ADMIN granted, has"),
        # Taken, and not there, or not as it was.
        ("cat >/dev/null", "listed back 0 of 1 times 'hook output"),
        ('case "$*" in *list*) exit 1 ;; esac; cat >/dev/null', "the rules were loaded and cannot be listed"),
        ("{edit} '/hook output/s/drop;/accept;/' {file}", "listed back 0 of 1 times 'hook output"),
        ("{edit} '/hook input/s/drop;/accept;/' {file}", "listed back 0 of 1 times 'hook input"),
        ("{edit} '/65532/d' {file}", "listed back 0 of 2 times 'skuid 65532"),
        ("{edit} '/goto refuse/i meta skuid 10001 accept' {file}", "times 'accept$'"),
        ("{edit} '/<= /d' {file}", "listed back 2 of 3 times 'goto refuse$'"),
    ],
)
def test_an_nft_that_does_something_else_is_noticed(
    namespaces: None, behaviour: str, told: str, tmp_path: Path
) -> None:
    listing = tmp_path / "listing"
    script = behaviour.format(
        edit=f'case "$*" in *list*) ;; *) cat >{listing}; exit ;; esac; sed', file=listing
    )  # lists what it was given, edited, and loads nothing
    stand_in = tmp_path / "nft"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    assert told in refused("env", f"PATH={tmp_path}:{PATH}", API_ENDPOINTS=API)


def test_a_run_that_fails_leaves_the_rules_that_are_there(network: Network) -> None:
    listed = network.load()
    done = run(
        "nsenter", f"--net=/run/netns/{network.pod}", "sh", str(RULES), check=False, env={"API_ENDPOINTS": "nowhere:1"}
    )
    assert done.returncode == 1
    assert network.inside("nft", "-n", "list", "ruleset") == listed
