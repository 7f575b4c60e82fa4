"""In-cluster credentials: the token is a file that the kubelet replaces while the sidecar runs."""

import datetime as dt
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from session_proxy import kube
from session_proxy.devcluster import DevCluster, workspace_manifest
from session_proxy.errors import KubeUnauthorizedError
from session_proxy.workspace import Target


@dataclass
class Pod:
    """What the sidecar's container has: the token's file, and a client that found it by itself."""

    token: Path
    client: kube.KubeClient
    cluster: DevCluster
    statuses: list[int]

    def rotate(self) -> None:
        """Replace the token; the one before is void at once, which is worse than anything the kubelet does."""
        self.cluster.token = "the-next"
        self.token.write_text("the-next")

    async def exec(self) -> None:
        target = Target(pod="workspace", pod_uid="", container="workspace", container_id="", started_at="")
        async with self.client.open_exec(target, ["true"], stdin=False):
            pass


@pytest.fixture
def loader() -> Any:
    return kube._import_config().incluster_config


@pytest.fixture
async def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: Any) -> AsyncIterator[Pod]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    certificate = tmp_path / "ca.crt"
    authority.cert_pem.write_to_path(str(certificate))
    root = tmp_path / "workspace"
    root.mkdir()
    async with DevCluster(root=root, ssl_context=context, ca_pem=certificate.read_bytes()) as cluster:
        cluster.add_pod(workspace_manifest(session="s1"))
        token = tmp_path / "token"
        token.write_text(cluster.token)
        host, _, port = cluster.url.removeprefix("https://").partition(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        monkeypatch.setattr(loader, "SERVICE_TOKEN_FILENAME", str(token))
        monkeypatch.setattr(loader, "SERVICE_CERT_FILENAME", str(certificate))
        credentials = await kube.load_credentials({"KUBERNETES_SERVICE_HOST": host})
        statuses: list[int] = []
        client = kube.KubeClient(
            credentials, namespace="default", pod="workspace", on_call=lambda *call: statuses.append(call[2])
        )
        yield Pod(token, client, cluster, statuses)
        await client.close()


async def test_a_token_that_is_void_is_read_again_at_once(pod: Pod) -> None:
    await pod.client.find_pods()
    pod.rotate()
    await pod.client.find_pods()
    assert pod.statuses == [200, 401, 200]


async def test_a_token_that_is_void_at_an_upgrade_is_read_again_at_once(pod: Pod) -> None:
    pod.rotate()
    await pod.exec()
    await pod.exec()
    assert pod.statuses == [101, 101]  # one for each exec: a 401 on the way is not the answer to it


async def test_a_token_is_read_again_before_it_is_void(pod: Pod, loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "TOKEN_REFRESH_PERIOD", dt.timedelta(0))  # a minute
    await pod.client._reload()
    pod.rotate()
    await pod.client.find_pods()
    await pod.exec()
    assert pod.statuses == [200, 101]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_text("")], ids=["missing", "empty"])
async def test_a_token_that_cannot_be_read_again_is_used_while_it_is_valid(
    pod: Pod, loader: Any, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(loader, "TOKEN_REFRESH_PERIOD", dt.timedelta(0))
    await pod.client._reload()
    spoil(pod.token)
    assert len(await pod.client.find_pods()) == 1
    await pod.exec()
    pod.cluster.token = "the-next"
    with pytest.raises(KubeUnauthorizedError):
        await pod.client.find_pods()
    with pytest.raises(KubeUnauthorizedError):
        await pod.exec()
    pod.token.write_text("the-next")
    assert len(await pod.client.find_pods()) == 1
