"""``session-proxy dev``: the embedded stand-in for a cluster, and in front of it the very same daemon."""

import asyncio
import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from session_proxy import server
from session_proxy.config import Config
from session_proxy.devcluster import DevCluster, workspace_manifest

OWNER_UID = "00000000-0000-4000-8000-000000000001"
"""UID of the runner that dev mode pretends to have."""

START_SECONDS = 10.0
"""For the stand-in to listen."""


def default_values() -> dict[str, str]:
    """Return the settings that dev mode fills in."""
    return {"SESSION_NAME": "dev", "NAMESPACE": "default", "OWNER_UID": OWNER_UID, "LOG_FORMAT": "console"}


def run(config: Config, *, directory: Path | None, workspace: Path | None, kubeconfig: Path | None) -> int:
    """Run until SIGTERM or SIGINT; return the exit status."""
    try:
        manifest = _manifest(config, workspace)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"session-proxy: --workspace: {error}", file=sys.stderr)
        return server.EXIT_CONFIG
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="session-proxy-")))
        root = directory or home / "workspace"
        root.mkdir(parents=True, exist_ok=True)
        cluster = DevCluster(root=root.resolve(), namespace=config.namespace or "default")
        stack.enter_context(_in_thread(cluster, manifest))
        path = cluster.write_kubeconfig(kubeconfig or home / "kubeconfig")

        def listening(address: tuple[str, int]) -> None:
            host, port = address
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(
                f"session-proxy dev: listening on {url}\n"
                "  This is not a sandbox: commands are processes of this machine and can do whatever you can.\n"
                f"  workspace directory: {root}\n"
                f'  try: curl -sN {url}/exec -d \'{{"command":["sh","-c","echo hello; pwd"]}}\'\n'
                f"  kubectl: KUBECONFIG={path} kubectl get pods\n"
                "  Ctrl-C stops it.",
                flush=True,
            )

        return server.serve(config, {"KUBECONFIG": str(path)}, listening)


def _manifest(config: Config, workspace: Path | None) -> Mapping[str, Any]:
    if workspace is None:
        return workspace_manifest("workspace", session=config.session_name, owner_uid=config.owner_uid)
    manifest = yaml.safe_load(workspace.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("kind") != "Pod":
        raise ValueError(f"{workspace} is not the manifest of one Pod")
    return manifest


@contextlib.contextmanager
def _in_thread(cluster: DevCluster, manifest: Mapping[str, Any]) -> Iterator[None]:
    """Run the stand-in on an event loop of its own, as the separate program it plays."""
    loop = asyncio.new_event_loop()

    async def start() -> None:
        await cluster.start()
        cluster.add_pod(manifest)

    thread = threading.Thread(target=loop.run_forever, name="devcluster", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(START_SECONDS)
        yield
    finally:
        asyncio.run_coroutine_threadsafe(cluster.stop(), loop).result(START_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(START_SECONDS)
        loop.close()
