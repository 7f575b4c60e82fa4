"""Who reaches what: a server that answers, a probe that tries, both run by whatever Python is where they are sent."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

AT_ONCE_SECONDS = 1.0

SERVER = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for port in map(int, sys.argv[1:]):
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            server = socket.socket(family, kind)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, port))
            if kind == socket.SOCK_STREAM:
                server.listen(64)
            selector.register(server, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in selector.select():
        if key.fileobj.type == socket.SOCK_STREAM:
            key.fileobj.accept()[0].close()
            continue
        data, peer = key.fileobj.recvfrom(2000)
        if data == b"exit":
            sys.exit()
        key.fileobj.sendto(data, peer)
"""
"""Accepts over TCP and echoes over UDP, over IPv4 and IPv6, on the ports that it is given. "exit" ends it."""

PROBE = """
import errno, json, os, socket, sys, time
user, attempts = json.loads(sys.argv[1])
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
def attempt(kind, host, port, source):
    version6 = ":" in host
    family = socket.AF_INET6 if version6 else socket.AF_INET
    message = b"x"
    if kind == "icmp":
        protocol = socket.IPPROTO_ICMPV6 if version6 else socket.IPPROTO_ICMP
        probe = socket.socket(family, socket.SOCK_DGRAM, protocol)
        message = bytes([128 if version6 else 8, 0, 0, 0, 0, 0, 0, 1]) + message
    else:
        probe = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    with probe:
        probe.settimeout(2)
        if source:
            probe.bind(("", source))
        address, _, interface = host.partition("%")
        scope = (0, socket.if_nametoindex(interface)) if interface else ()
        probe.connect((address, port, *scope))
        if kind != "tcp":
            probe.send(message)
            probe.recv(2000)
        return "answered"
results = []
for one in attempts:
    began = time.monotonic()
    try:
        result = attempt(*one)
    except TimeoutError:
        result = "silence"
    except OSError as error:
        result = errno.errorcode[error.errno]
    results.append([result, time.monotonic() - began])
print(json.dumps(results))
"""
"""Makes the attempts that ``asked`` put into words."""


@dataclass(frozen=True)
class Attempt:
    """A TCP connection, a datagram or an echo request ("tcp", "udp", "icmp"), from a source port or any."""

    kind: str
    host: str
    port: int = 0
    source: int = 0


def everywhere(hosts: Sequence[str], *ports: int, ping: bool = False) -> list[Attempt]:
    """Every port over TCP and UDP at every host."""
    tries = [Attempt(kind, host, port) for host in hosts for port in ports for kind in ("tcp", "udp")]
    return tries + [Attempt("icmp", host) for host in hosts if ping]


def asked(attempts: Sequence[Attempt], user: int = 0) -> str:
    """Return the probe's argument: these attempts, by this user, or by the one who runs the probe."""
    return json.dumps([user, [(one.kind, one.host, one.port, one.source) for one in attempts]])


def answered(attempts: Sequence[Attempt], output: str) -> set[Attempt]:
    """Return the attempts that were answered; the others must have failed at once, not by silence."""
    found = set()
    for one, (result, seconds) in zip(attempts, json.loads(output), strict=True):
        if result == "answered":
            found.add(one)
        else:
            assert seconds < AT_ONCE_SECONDS, (one, result, seconds)
    return found
