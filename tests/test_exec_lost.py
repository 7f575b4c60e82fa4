"""A stream that ends without a Status is never success, and says what is known."""

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Daemon, StartDaemon, Stream, add_workspace, gone

from session_proxy.devcluster import DevCluster


async def running_command(daemon: Daemon, mark: str = "x") -> Stream:
    stream = await daemon.open("sh", "-c", "echo ready; sleep 60; sleep 61", mark)
    await stream.until("stdout", b"ready")
    return stream


async def verdict_of(daemon: Daemon, stream: Stream) -> dict[str, Any]:
    """The terminal event, which must come within 5 s, with the slot free again."""
    async with asyncio.timeout(5):
        exit_event = await stream.rest()
    assert exit_event["outcome"] == "lost"
    assert exit_event["exitCode"] is None
    assert exit_event["error"]
    await daemon.idle()
    return exit_event


LOSSES: dict[str, tuple[Callable[[DevCluster], object], str]] = {
    "pod deleted": (lambda cluster: cluster.delete_pod("workspace"), "pod_deleted"),
    "pod being deleted": (lambda cluster: cluster.mark_deleting("workspace"), "pod_deleted"),
    "pod replaced": (lambda cluster: cluster.replace_pod("workspace"), "pod_deleted"),
    "container restarted": (lambda cluster: cluster.restart_container("workspace"), "container_restarted"),
    "container out of memory": (
        lambda cluster: cluster.restart_container("workspace", reason="OOMKilled"),
        "oom_killed",
    ),
    "container crashed": (lambda cluster: cluster.crash_container("workspace"), "container_restarted"),
    "connection reset": (lambda cluster: cluster.drop_exec_connections(), "connection_lost"),
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_loss_ends_the_stream_with_its_reason(any_cluster: DevCluster, start: StartDaemon, loss: str) -> None:
    act, reason = LOSSES[loss]
    add_workspace(any_cluster)
    daemon = await start(any_cluster)
    mark = secrets.token_hex(8)
    stream = await running_command(daemon, mark)
    act(any_cluster)
    assert (await verdict_of(daemon, stream))["reason"] == reason
    assert await gone(mark, 3)


async def test_a_restarted_api_server_loses_the_stream_and_not_the_daemon(daemon: Daemon) -> None:
    mark = secrets.token_hex(8)
    stream = await running_command(daemon, mark)
    await daemon.cluster.restart_server(down_seconds=0.5)
    exit_event = await verdict_of(daemon, stream)
    assert exit_event["reason"] == "connection_lost"
    assert await gone(mark, 3)
    assert (await daemon.run("true"))[0]["exitCode"] == 0


async def test_a_lost_connection_is_reaped_and_verified(daemon: Daemon) -> None:
    stream = await running_command(daemon)
    daemon.cluster.drop_exec_connections()
    assert (await verdict_of(daemon, stream))["reaped"] is True


@pytest.mark.parametrize(
    "fault", ["drop_before_status", "close_without_status", "status_not_json", "status_empty", "code_zero", "no_code"]
)
async def test_no_believable_status_is_never_success(daemon: Daemon, fault: str) -> None:
    faults = daemon.cluster.faults
    match fault:
        case "drop_before_status":
            faults.drop_before_status = True
        case "close_without_status":
            faults.close_without_status = True
        case "status_not_json":
            faults.status_override = b"Success"
        case "status_empty":
            faults.status_override = b"{}"
        case "code_zero":
            causes = [{"reason": "ExitCode", "message": "0"}]
            status = {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}
            faults.status_override = json.dumps(status).encode()
        case "no_code":
            faults.status_override = b'{"status":"Failure","reason":"NonZeroExitCode"}'
    stream = await daemon.open("sh", "-c", "echo done; exit 0")
    assert (await verdict_of(daemon, stream))["reason"] == "connection_lost"
    assert stream.data("stdout") == b"done\n"


async def test_a_connection_dropped_in_mid_output_keeps_what_arrived(daemon: Daemon) -> None:
    daemon.cluster.faults.drop_after_bytes = 100_000
    stream = await daemon.open("sh", "-c", "while :; do echo 0123456789; done")
    exit_event = await verdict_of(daemon, stream)
    assert 0 < len(stream.data("stdout")) == exit_event["stdoutBytes"] <= 100_000


async def test_a_server_that_no_longer_answers_pings_is_lost(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, HEARTBEAT_SECONDS="0.3")
    cluster.faults.ignore_pings = True
    stream = await running_command(daemon)
    cluster.faults.ignore_pings = False
    cluster.faults.stall_after_bytes = 0
    cluster.faults.ignore_pings = True
    async with asyncio.timeout(10):
        exit_event = await stream.rest()
    assert (exit_event["outcome"], exit_event["reason"]) == ("lost", "connection_lost")


async def test_a_quiet_command_outlives_many_pings(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, HEARTBEAT_SECONDS="0.1")
    exit_event, _ = await daemon.run("sleep", "1")
    assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 0)


async def test_a_command_that_kills_itself_with_sigkill_is_believed(daemon: Daemon) -> None:
    exit_event, _ = await daemon.run("sh", "-c", "kill -KILL $$")
    assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 137)


async def test_nothing_that_follows_the_status_changes_the_verdict(daemon: Daemon) -> None:
    daemon.cluster.faults.after_status = b"\x01late"
    exit_event, stream = await daemon.run("sh", "-c", "echo done; exit 3")
    assert (exit_event["exitCode"], stream.data("stdout")) == (3, b"done\n")


async def test_an_abrupt_end_after_the_status_is_no_loss(any_cluster: DevCluster, start: StartDaemon) -> None:
    any_cluster.faults.abrupt_close = True
    add_workspace(any_cluster)
    daemon = await start(any_cluster)
    assert (await daemon.run("sh", "-c", "exit 4"))[0]["exitCode"] == 4


@pytest.mark.parametrize("garbage", [b"", b"\x07unknown", b"\xff\x01", b"\x02noise from a start-up file\n"])
async def test_messages_that_carry_nothing_are_passed_over(daemon: Daemon, garbage: bytes) -> None:
    daemon.cluster.faults.garbage = garbage
    exit_event, stream = await daemon.run("sh", "-c", "echo ok")
    if garbage:
        assert (exit_event["outcome"], stream.data("stdout")) == ("exited", b"ok\n")
    else:
        assert (exit_event["outcome"], exit_event["reason"]) == ("failed", "start_failed")


async def test_text_messages_are_read_like_binary_ones(daemon: Daemon) -> None:
    daemon.cluster.faults.text_frames = True
    assert (await daemon.run("echo", "é"))[1].data("stdout") == "é\n".encode()


async def test_a_watch_that_is_too_old_begins_anew(daemon: Daemon) -> None:
    daemon.cluster.faults.watch_gone = 2
    stream = await running_command(daemon)
    daemon.cluster.delete_pod("workspace")
    assert (await verdict_of(daemon, stream))["reason"] == "pod_deleted"


async def test_a_watch_that_breaks_begins_anew(daemon: Daemon) -> None:
    stream = await running_command(daemon)
    async with asyncio.timeout(5):
        while not daemon.cluster.drop_watch_connections():
            await asyncio.sleep(0.01)
    daemon.cluster.mark_deleting("workspace")
    assert (await verdict_of(daemon, stream))["reason"] == "pod_deleted"
