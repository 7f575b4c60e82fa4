"""What ``make demo`` shows: commands streaming through the HTTP interface as they print, and one refused by policy."""

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from session_proxy.dev import OWNER_UID
from session_proxy.devcluster import workspace_manifest

START_SECONDS = 20.0

COMMANDS: tuple[tuple[str, dict[str, object]], ...] = (
    (
        "output arrives line by line, while the command runs",
        {"command": ["sh", "-c", "for i in 1 2 3 4 5; do echo line $i; sleep 0.4; done"]},
    ),
    (
        "stdin, environment and the real exit code",
        {
            "command": ["sh", "-c", 'read name; echo "$GREETING, $name"; exit 7'],
            "stdin": "world\n",
            "env": {"GREETING": "hello"},
        },
    ),
    (
        "a timeout kills everything, also what ignores TERM, and verifies it (see reaped)",
        {
            "command": ["sh", "-c", 'trap "" TERM; (setsid sleep 100 &); while :; do echo still here; sleep 0.5; done'],
            "timeoutSeconds": 1.5,
        },
    ),
)


@contextlib.contextmanager
def dev_mode(*arguments: str) -> Iterator[http.client.HTTPConnection]:
    """Run the dev mode on a free port; yield a connection to it."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "session_proxy",
            "dev",
            "--listen-addr",
            "127.0.0.1:0",
            "--log-level",
            "error",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout is None:
            raise RuntimeError("no output")
        address = process.stdout.readline().rpartition("http://")[2].strip()
        if not address:
            raise RuntimeError("the dev mode did not start")
        yield http.client.HTTPConnection(address, timeout=START_SECONDS)
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def show(connection: http.client.HTTPConnection, body: dict[str, object], accept: str) -> int:
    """Post a command and print the answer as it arrives, with the time of each line."""
    shown = json.dumps(body)
    print(f"\n$ curl -sN localhost:8080/exec -H 'Accept: {accept}' -d '{shown}'", flush=True)
    began = time.monotonic()
    connection.request("POST", "/exec", shown, {"Accept": accept})
    response = connection.getresponse()
    for line in response:
        print(f"  {time.monotonic() - began:5.2f} s  {line.decode().rstrip()}", flush=True)
    connection.close()
    return response.status


def main() -> int:
    """Run the demo; return the exit status."""
    with dev_mode() as connection:
        for title, body in COMMANDS:
            print(f"\n== {title}", flush=True)
            if show(connection, body, "text/plain" if title.startswith("output") else "application/x-ndjson") != 200:
                return 1
    print("\n== a workspace that violates the policy is refused, and nothing runs in it", flush=True)
    manifest = workspace_manifest("workspace", session="dev", owner_uid=OWNER_UID)
    manifest["spec"]["hostNetwork"] = True
    manifest["spec"]["containers"][0]["securityContext"]["privileged"] = True
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "pod.yaml"
        path.write_text(yaml.safe_dump(dict(manifest)))
        with dev_mode("--workspace", str(path)) as connection:
            connection.request("POST", "/exec", '{"command":["id"]}')
            response = connection.getresponse()
            problem = json.load(response)
            print(f"\n  HTTP {response.status} {problem['reason']}")
            for violation in problem["violations"]:
                print(f"    {violation['field']} is {violation['value']}; it must be {violation['expected']}")
    return 0 if response.status == 403 else 1


if __name__ == "__main__":
    sys.exit(main())
