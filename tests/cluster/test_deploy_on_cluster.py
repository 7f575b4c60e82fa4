"""What an API server says to deploy/kubernetes, in a dry run. It judges what no schema does.

Kubernetes before 1.29 knows no native sidecars: there the sidecar is offered as the ordinary container that
`session-proxy session up --sidecar container` makes of it. Admission policies are asked about on 1.30 and later only.
"""

import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator

import pytest
from kustomize import Objects, installed, overlay

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif("KUBECONFIG" not in os.environ, reason="KUBECONFIG names no cluster"),
]


def kubectl(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [installed("kubectl"), *arguments], input=text, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def minor() -> int:
    version = json.loads(kubectl("version", "--output=json").stdout)["serverVersion"]["gitVersion"]
    return int(version.split(".")[1])


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace with the sidecar's ServiceAccount in it, without which no pod may name it."""
    name = f"session-proxy-deploy-{secrets.token_hex(3)}"
    assert kubectl("create", "namespace", name).returncode == 0
    try:
        assert kubectl("create", "serviceaccount", "demo-proxy", "--namespace", name).returncode == 0
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


Offer = Callable[[Objects], tuple[list[str], str]]


@pytest.fixture
def offer(minor: int) -> Offer:
    """Ask the API server to create objects; return the names of those that it would not, and its words."""

    def create(objects: Objects) -> tuple[list[str], str]:
        asked = {key: each for key, each in objects.items() if key[0] not in ("Namespace", "ServiceAccount")}
        if minor < 29 and ("Pod", "demo-runner") in asked:
            spec = asked["Pod", "demo-runner"]["spec"]
            sidecar = spec["initContainers"].pop()
            del sidecar["restartPolicy"]
            spec["containers"].append(sidecar)
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(asked.values())})
        shown = 'jsonpath={.kind}/{.metadata.name}{"\\n"}'
        done = kubectl("create", "--dry-run=server", f"--output={shown}", "-f", "-", text=text)
        names = [f"{kind}/{name}" for kind, name in asked]
        return [name for name in names if name not in done.stdout.splitlines()], done.stderr

    return create


@pytest.mark.parametrize(
    "components",
    [(), ("network-policy", "persistent-workspace", "openshift"), ("egress-lockdown", "network-policy")],
    ids="+".join,
)
def test_the_api_server_accepts_what_is_rendered(namespace: str, offer: Offer, components: tuple[str, ...]) -> None:
    assert offer(overlay(*components, namespace=namespace)) == ([], "")


def test_it_refuses_what_the_schemas_do_not_see(namespace: str, offer: Offer) -> None:
    objects = overlay("network-policy", namespace=namespace)
    workspace, policy = objects["Pod", "demo-workspace"], objects["NetworkPolicy", "runner"]
    workspace["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "500m"  # less than is requested
    policy["spec"]["egress"][0]["to"][0]["ipBlock"]["cidr"] = "192.0.2.1"  # no mask
    refused, words = offer(objects)
    assert sorted(refused) == ["NetworkPolicy/runner", "Pod/demo-workspace"]
    assert "must be less than or equal to cpu limit" in words
    assert "cidr: Invalid value" in words


@pytest.mark.parametrize("component", ["gvisor", "kata"])
def test_a_runtime_class_that_is_not_there_refuses_the_workspace(namespace: str, offer: Offer, component: str) -> None:
    objects = overlay(component, namespace=namespace)
    name = f"none-{secrets.token_hex(3)}"
    assert objects["Pod", "demo-workspace"]["spec"]["runtimeClassName"] == component
    objects["Pod", "demo-workspace"]["spec"]["runtimeClassName"] = name
    refused, words = offer(objects)
    assert refused == ["Pod/demo-workspace"]
    assert f'RuntimeClass "{name}" not found' in words


def test_the_api_server_compiles_the_admission_policies(offer: Offer, minor: int) -> None:
    if minor < 30:
        pytest.skip(f"Kubernetes 1.{minor} has no ValidatingAdmissionPolicy in admissionregistration.k8s.io/v1")
    policies = {key: each for key, each in overlay("admission").items() if key[0].startswith("Validating")}
    assert len(policies) == 8
    refused, words = offer(policies)
    assert not refused, words
