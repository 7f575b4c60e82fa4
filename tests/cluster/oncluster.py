"""What the tests on a real cluster share: when they run, kubectl, and images that the cluster gets to know."""

import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

TOOLS = Path(os.environ.get("CLUSTER_TOOLS", ROOT.parent / "shared" / "cluster"))
"""Scripts of the test cluster: `load ARCHIVE` makes an image known to it, `base-image REFERENCE` makes a stand-in for an
image that no registry can be asked for (and installs podman), `containers.conf` is podman's configuration there."""

BUILD_SECONDS = 900
"""For one step of making an image; the first on a machine makes the base, too."""

NEEDS_CLUSTER = [
    pytest.mark.cluster,
    pytest.mark.skipif("KUBECONFIG" not in os.environ, reason="KUBECONFIG names no cluster"),
]

FAMILY = (
    '(setsid sh -c \'trap "" TERM; while :; do sleep 0.1; done\' &) ; trap "" TERM; sleep 600 & echo ready; '
    "while :; do sleep 0.1; done"
)
"""A command that is hard to kill: it ignores TERM, and so does a process of it in a session of its own."""

Json = dict[str, Any]


def kubectl(*arguments: str, text: str | None = None, check: bool = True) -> str:
    """Run kubectl; one more try, since the API server may just be restarting."""
    done = subprocess.CompletedProcess[str]([], 1, "", "")
    for wait in (0, 3):
        time.sleep(wait)
        done = subprocess.run(
            ["kubectl", *arguments], input=text, capture_output=True, text=True, check=False, timeout=90
        )
        if done.returncode == 0 or not check:
            return done.stdout
    raise AssertionError(f"kubectl {arguments}: {done.stderr}")


@functools.cache
def server_minor() -> int:
    """The cluster's release: 31 for Kubernetes 1.31."""
    # "major" and "minor" are empty in servers that a distribution built.
    version: str = json.loads(kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    return int(version.split(".")[1])


def node_name() -> str:
    """The node that pods are put on: the test cluster has one, and no scheduler."""
    return kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")


@functools.cache
def session_proxy_image() -> str:
    """The image of this project as the cluster knows it: SESSION_PROXY_IMAGE (with a tag), or built from the Containerfile.

    Skips the test when there is neither.
    """
    given = os.environ.get("SESSION_PROXY_IMAGE")
    return given or build_image(ROOT, "localhost/session-proxy", base="docker.io/library/python:3.11-slim-bookworm")


def build_image(context: Path, repository: str, *, base: str, containerfile: str = "Containerfile") -> str:
    """Build the image and load it into the cluster; return its reference, whose tag says what is in it.

    ``base`` is what the Containerfile starts from, as it names it. Skips the test where the cluster's tools are absent.
    """
    if not (TOOLS / "load").is_file():
        pytest.skip(f"no image: SESSION_PROXY_IMAGE is not set, and {TOOLS} (CLUSTER_TOOLS) has no tools to load one")
    if shutil.which("podman") is None or _run("podman", "image", "exists", base, check=False).returncode != 0:
        _run(str(TOOLS / "base-image"), base)
    built = _run("podman", "build", "--quiet", "--network", "host", "-f", containerfile, str(context), cwd=context)
    identity = built.stdout.strip()
    reference = f"{repository}:{identity[:12]}"
    _run("podman", "tag", identity, reference)
    images = kubectl("get", "nodes", "-o", "jsonpath={.items[*].status.images[*].names[*]}")
    if reference not in images.split():
        with tempfile.TemporaryDirectory() as directory:
            archive = f"{directory}/image.tar"
            _run("podman", "save", "--quiet", "-o", archive, reference)
            _run(str(TOOLS / "load"), archive)
    return reference


def _run(*command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"CONTAINERS_CONF": str(TOOLS / "containers.conf")} | os.environ
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
    )
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done
