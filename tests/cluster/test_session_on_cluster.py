"""`session up|status|down` on a real cluster: a session in one go, and nothing left of one that fails.

Where the cluster is older than native sidecars (1.29), the sidecar is an ordinary container.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from oncluster import NEEDS_CLUSTER, Json, kubectl, node_name, server_minor, session_proxy_image

from session_proxy.session import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_NOTHING_THERE
from session_proxy.session_spec import MIN_SERVER

pytestmark = [*NEEDS_CLUSTER, pytest.mark.timeout(180, func_only=True)]  # the first waits for the image

KINDS = "pods,serviceaccounts,roles,rolebindings"
WORKSPACE_IMAGE = "localhost/workspace:dev"
ENDS_WHEN_TOLD = "sh -c \"trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done\""
SECONDS_TO_COLLECT = 30.0


@dataclass
class Site:
    """A namespace, and what every session in it needs."""

    namespace: str
    options: Sequence[str]

    def command(self, command: str, name: str, *options: str) -> list[str]:
        given = [*self.options, *options] if command == "up" else options
        program = [sys.executable, "-m", "session_proxy", "session"]
        return [*program, command, name, "--namespace", self.namespace, *given]

    def run(
        self, command: str, name: str, *options: str, kubeconfig: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        environ = os.environ | ({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {})
        argv = self.command(command, name, *options)
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=environ)

    def left_of(self, name: str) -> list[str]:
        """Everything in the namespace that begins with the session's name."""
        found = kubectl("get", KINDS, "-n", self.namespace, "-o", "name").split()
        return [item for item in found if item.rpartition("/")[2].startswith(f"{name}-")]

    def get(self, kind: str, name: str) -> Json:
        found: Json = json.loads(kubectl("get", kind, name, "-n", self.namespace, "-o", "json"))
        return found


def new_site() -> Site:
    images = {
        "--proxy-image": session_proxy_image(),
        "--runner-image": WORKSPACE_IMAGE,
        "--workspace-image": WORKSPACE_IMAGE,
    }
    small = {"--runner-cpu": "10m", "--runner-memory": "32Mi", "--workspace-cpu": "10m", "--workspace-memory": "64Mi"}
    where = {"--node-name": node_name(), "--image-pull-policy": "Never", "--runner-command": ENDS_WHEN_TOLD}
    where |= {"--sidecar": "native" if (1, server_minor()) >= MIN_SERVER else "container"}
    options = [word for pair in (images | small | where).items() for word in pair]
    namespace = f"session-proxy-test-{secrets.token_hex(3)}"
    kubectl("create", "namespace", namespace)
    return Site(namespace, options)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = new_site()
    yield made
    kubectl("delete", "namespace", made.namespace, "--wait=false")


@pytest.fixture
def name() -> str:
    return f"s-{secrets.token_hex(3)}"


def last_line(text: str) -> str:
    return text.splitlines()[-1].removeprefix("session-proxy: ")


# --- the way it is meant --------------------------------------------------------------------------------------------


def test_from_session_up_to_a_first_streamed_command_and_down_again(site: Site, name: str) -> None:
    before = site.run("status", name)
    assert (before.returncode, before.stderr) == (EXIT_NOTHING_THERE, "")

    up = site.run("up", name)
    assert up.returncode == EXIT_DONE, up.stderr
    assert last_line(up.stderr) == f"session {name} is ready"
    assert f"pod/{name}-runner: ready" in up.stderr

    # The very line that `up` printed, then one that streams.
    (printed,) = (line.strip() for line in up.stdout.splitlines() if " wget " in line)
    first = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, check=False, timeout=30)
    assert first.stdout.startswith("uid=1000"), first.stderr
    assert first.stdout.endswith('\n---EXIT---\n{"exitCode":0}\n')
    assert_it_streams(site, name)

    between = site.run("status", name)
    assert between.returncode == EXIT_DONE
    assert between.stdout.endswith(f"session {name} in namespace {site.namespace}: ready\n")
    again = site.run("up", name)
    assert again.returncode == EXIT_CONFIG
    assert f"NAME is '{name}'; it must be free in namespace {site.namespace}" in again.stderr
    assert f"pod/{name}-runner" in again.stderr

    uid = site.get("pod", f"{name}-runner")["metadata"]["uid"]
    for kind, suffix in (
        ("pod", "workspace"),
        ("role", "proxy"),
        ("rolebinding", "proxy"),
        ("serviceaccount", "proxy"),
    ):
        owners = site.get(kind, f"{name}-{suffix}")["metadata"]["ownerReferences"]
        assert [owner["uid"] for owner in owners] == [uid]

    down = site.run("down", name)
    assert down.returncode == EXIT_DONE, down.stderr
    assert last_line(down.stderr).endswith(": removed")
    assert site.left_of(name) == []
    twice = site.run("down", name)
    assert twice.returncode == EXIT_DONE
    assert last_line(twice.stderr).endswith(": nothing was there")
    assert site.run("status", name).returncode == EXIT_NOTHING_THERE


def assert_it_streams(site: Site, name: str) -> None:
    body = json.dumps({"command": ["sh", "-c", "for i in 1 2 3; do echo line $i; sleep 0.7; done"]})
    wget = ["wget", "-qO-", "--post-data", body, "http://127.0.0.1:8080/exec"]
    target = ["kubectl", "exec", "-n", site.namespace, f"{name}-runner", "-c", "runner", "--"]
    with subprocess.Popen([*target, *wget], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        arrived = [(line, time.monotonic()) for line in process.stdout]
    lines = [line for line, _ in arrived]
    assert lines[:3] == ["line 1\n", "line 2\n", "line 3\n"]
    assert lines[-1] == '{"exitCode":0}\n'
    assert arrived[2][1] - arrived[0][1] > 1.0  # as they were printed, not all at the end


def test_the_session_goes_with_its_runner_pod_and_the_claim_stays(site: Site, name: str) -> None:
    directory = Path("/tmp") / f"session-proxy-{name}"
    claim(site, name, directory)
    try:
        up = site.run("up", name, "--workspace-claim", name)
        assert up.returncode == EXIT_DONE, up.stderr
        pod = site.get("pod", f"{name}-workspace")
        assert {"name": "workspace", "persistentVolumeClaim": {"claimName": name}} in pod["spec"]["volumes"]
        kubectl("delete", "pod", f"{name}-runner", "-n", site.namespace, "--grace-period=0", "--force")
        began = time.monotonic()
        while not_collected(site, name):
            assert time.monotonic() - began < SECONDS_TO_COLLECT, not_collected(site, name)
            time.sleep(0.3)
        assert site.run("down", name).returncode == EXIT_DONE  # waits for the workspace pod's end
        assert site.left_of(name) == []
        assert site.get("pvc", name)["status"]["phase"] == "Bound"
    finally:
        kubectl("delete", "pvc", name, "-n", site.namespace, "--wait=false")
        kubectl("delete", "pv", f"session-proxy-{name}", "--wait=false")
        shutil.rmtree(directory, ignore_errors=True)


def not_collected(site: Site, name: str) -> list[str]:
    """What the garbage collector has left of a session so far: all that is there and not being deleted."""
    found = json.loads(kubectl("get", KINDS, "-n", site.namespace, "-o", "json"))["items"]
    metadata = [item["metadata"] for item in found]
    names = [item["name"] for item in metadata if "deletionTimestamp" not in item]
    return [item for item in names if item.startswith(f"{name}-")]


def claim(site: Site, name: str, directory: Path) -> None:
    """Make a PersistentVolumeClaim and, because nothing provisions one, its volume."""
    common = {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"session-proxy-{name}"},
        "spec": common
        | {
            "capacity": {"storage": "1Mi"},
            "hostPath": {"path": str(directory), "type": "DirectoryOrCreate"},
            "claimRef": {"namespace": site.namespace, "name": name},
        },
    }
    request = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": common | {"resources": {"requests": {"storage": "1Mi"}}, "volumeName": f"session-proxy-{name}"},
    }
    kubectl("create", "-f", "-", text=json.dumps(volume))
    kubectl("create", "-n", site.namespace, "-f", "-", text=json.dumps(request))


# --- steps that fail ------------------------------------------------------------------------------------------------


def test_an_image_that_does_not_exist_leaves_nothing_behind(site: Site, name: str) -> None:
    up = site.run("up", name, "--workspace-image", "localhost/nosuch:dev")
    assert up.returncode == EXIT_FAILED, up.stderr
    assert "container workspace: ErrImageNeverPull: " in last_line(up.stderr)
    assert last_line(up.stderr).endswith("; everything that was created is removed again")
    assert site.left_of(name) == []


def test_a_quota_that_refuses_the_second_pod_leaves_nothing_behind(name: str) -> None:
    site = new_site()
    try:
        kubectl("create", "quota", "one-pod", "--hard=pods=1", "-n", site.namespace)
        deadline = time.monotonic() + 20
        while site.get("quota", "one-pod").get("status", {}).get("hard") is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        up = site.run("up", name)
        assert up.returncode == EXIT_FAILED, up.stderr
        assert f"pod/{name}-runner: created" in up.stderr
        assert f"pod/{name}-workspace cannot be created: " in last_line(up.stderr)
        assert "exceeded quota: one-pod" in last_line(up.stderr)
        assert site.left_of(name) == []
    finally:
        kubectl("delete", "namespace", site.namespace, "--wait=false")


@pytest.mark.parametrize(
    "moment", ["serviceaccount/{}-proxy: created", "pod/{}-workspace: created", "pod/{}-workspace: ready"]
)
def test_an_interrupt_leaves_nothing_behind(site: Site, name: str, moment: str) -> None:
    with subprocess.Popen(site.command("up", name), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.endswith(moment.format(name) + "\n"):
                    process.send_signal(signal.SIGINT)
                    break
            else:
                raise AssertionError(f"{moment} was never said")
            rest = process.stderr.read()
            assert process.wait(60) == EXIT_FAILED, rest
        finally:
            process.kill()
    assert last_line(rest) == "interrupted; everything that was created is removed again"
    assert site.left_of(name) == []


def test_a_name_that_something_else_has_is_refused_and_that_stays(site: Site, name: str) -> None:
    kubectl("create", "serviceaccount", f"{name}-proxy", "-n", site.namespace)
    before = site.get("serviceaccount", f"{name}-proxy")["metadata"]
    up = site.run("up", name)
    assert up.returncode == EXIT_CONFIG
    assert f"NAME is '{name}'; it must be free" in up.stderr
    assert site.run("status", name).returncode == EXIT_NOTHING_THERE
    down = site.run("down", name)
    assert down.returncode == EXIT_DONE
    assert f"not touched, because `session up` did not make it: serviceaccount/{name}-proxy" in down.stderr
    assert site.get("serviceaccount", f"{name}-proxy")["metadata"]["uid"] == before["uid"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_the_cluster_lacks_is_refused_before_anything_is_created(site: Site, name: str) -> None:
    native = [] if (1, server_minor()) >= MIN_SERVER else ["--sidecar", "native"]
    options = [*native, "--runtime-class", "nosuch", "--node-name", "nosuch", "--workspace-claim", "nosuch"]
    up = site.run("up", name, *options)
    assert up.returncode == EXIT_CONFIG
    problems = [line.removeprefix("session-proxy: ") for line in up.stderr.splitlines()]
    if native:
        assert problems.pop(0).startswith("--sidecar is 'native', which needs Kubernetes 1.29; it must be container")
    assert [problem.split(";")[0] for problem in problems] == [
        "--workspace-claim is 'nosuch'",
        "--runtime-class is 'nosuch'",
        "--node-name is 'nosuch'",
    ]
    elsewhere = Site(f"{site.namespace}-nosuch", site.options).run("up", name)
    assert elsewhere.returncode == EXIT_CONFIG
    assert f"--namespace is '{site.namespace}-nosuch'; it must be one that exists" in elsewhere.stderr
    assert site.left_of(name) == []


def test_who_may_do_nothing_is_told_every_verb_that_is_missing(site: Site, name: str, tmp_path: Path) -> None:
    kubectl("create", "serviceaccount", "nobody", "-n", site.namespace)
    token = kubectl("create", "token", "nobody", "-n", site.namespace).strip()
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    up = site.run("up", name, "--runtime-class", "nosuch", kubeconfig=path)
    assert up.returncode == EXIT_CONFIG
    rbac = "rbac.authorization.k8s.io"
    missing = {
        "create, get, delete, watch pods",
        "get, create pods/exec",
        "create, get, delete, patch serviceaccounts",
        f"create, get, delete roles.{rbac}",
        f"create, get, delete rolebindings.{rbac}",
    }
    assert set(up.stderr.splitlines()) == {
        f"session-proxy: KUBECONFIG's user may not {what} in namespace {site.namespace}; RBAC must allow it"
        for what in missing
    }
    assert site.run("down", name, kubeconfig=path).returncode == EXIT_CONFIG
    assert site.run("status", name, kubeconfig=path).returncode == EXIT_CONFIG
