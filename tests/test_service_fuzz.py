"""The running service, fuzzed by its own OpenAPI document: no 500, no hang, no leaked slot."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import StartDaemon, add_workspace

from session_proxy.devcluster import DevCluster

MAX_EXAMPLES = 40
REQUEST_SECONDS = 10


@pytest.mark.timeout(180)
async def test_the_service_holds_under_its_own_description(
    cluster: DevCluster, start: StartDaemon, tmp_path: Path
) -> None:
    add_workspace(cluster)
    daemon = await start(
        cluster,
        EXEC_RATE_PER_SECOND="10000",
        EXEC_BURST="10000",
        EXEC_TIMEOUT_SECONDS="2",
        EXEC_TIMEOUT_MAX_SECONDS="3",
        KILL_GRACE_SECONDS="0",
    )
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{daemon.url}/openapi.json",
        "--max-examples",
        str(MAX_EXAMPLES),
        "--request-timeout",
        str(REQUEST_SECONDS),
        # A killed exec stays in the history on purpose.
        "--exclude-checks",
        "use_after_free",
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    await daemon.idle()
    assert not [line for line in daemon.logs if line["event"] == "internal_error"]
    assert (await daemon.run("echo", "ok"))[1].data("stdout") == b"ok\n"
    assert cluster.processes("workspace") == []
