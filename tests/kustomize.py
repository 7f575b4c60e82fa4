"""Renders deploy/kubernetes as a person would: kubectl, an overlay, components in the order given."""

import copy
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
Objects = dict[tuple[str, str], Manifest]

REPOSITORY = Path(__file__).parent.parent
DEPLOY = REPOSITORY / "deploy" / "kubernetes"
COMPONENTS = tuple(sorted(path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml")))


def installed(tool: str) -> str:
    """Return the path of a tool, the one that the lock file installs rather than whatever else this machine has."""
    own = Path(sys.executable).with_name(tool)
    found = str(own) if own.is_file() else shutil.which(tool)
    assert found, f"{tool} is not installed, though requirements-dev.lock names a package that brings it"
    return found


def build(directory: Path) -> tuple[Manifest, ...]:
    """Render one directory."""
    done = subprocess.run(
        [installed("kubectl"), "kustomize", str(directory)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"a warning: {done.stderr}"
    return tuple(yaml.safe_load_all(done.stdout))


@functools.cache
def _overlay(components: tuple[str, ...], namespace: str | None) -> tuple[Manifest, ...]:
    with tempfile.TemporaryDirectory() as directory:
        to_deploy = os.path.relpath(DEPLOY, Path(directory).resolve())
        kustomization = {
            "resources": [f"{to_deploy}/base"],
            "components": [f"{to_deploy}/components/{name}" for name in components],
        } | ({"namespace": namespace} if namespace else {})
        Path(directory, "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        return build(Path(directory))


def overlay(*components: str, namespace: str | None = None) -> Objects:
    """Render the base with components. It is rendered once; the objects are the caller's own."""
    return by_name(copy.deepcopy(_overlay(components, namespace)))


def by_name(objects: tuple[Manifest, ...]) -> Objects:
    """Return objects by kind and name."""
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found
