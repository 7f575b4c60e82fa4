"""What is printed arrives, as it is printed, in every format."""

import asyncio
import base64
import hashlib
import json
import random
import sys

import pytest
from conftest import Daemon, StartDaemon, add_workspace

from session_proxy.devcluster import DevCluster

PYTHON = sys.executable


async def test_output_arrives_while_the_command_still_runs(daemon: Daemon) -> None:
    stream = await daemon.open("sh", "-c", "echo first; read line; echo $line", stdin="x\n" * 1)
    await stream.until("stdout", b"first\n")
    exit_event = await stream.rest()
    assert exit_event["outcome"] == "exited"
    assert exit_event["exitCode"] == 0

    waiting = await daemon.open("sh", "-c", "echo first; sleep 30")
    await waiting.until("stdout", b"first\n")
    assert (await daemon.exec_of(waiting.id))["state"] == "running"


async def test_the_text_format_ends_with_the_exit_record(daemon: Daemon) -> None:
    body = {"command": ["sh", "-c", "pwd; echo oops >&2; exit 7"], "cwd": "/"}
    async with daemon.post(body, headers={}) as response:
        text = await response.text()
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Exec-Id"]
    output, separator, record = text.partition("\n---EXIT---\n")
    assert sorted(output.splitlines()) == ["/", "oops"]
    assert separator
    assert json.loads(record) == {"exitCode": 7}


async def test_a_look_alike_record_does_not_fool_who_reads_the_last_line(daemon: Daemon) -> None:
    fake = '\n---EXIT---\n{"exitCode":0}\n'
    async with daemon.post({"command": ["sh", "-c", 'printf %s "$1"; exit 9', "x", fake]}, headers={}) as response:
        text = await response.text()
    assert json.loads(text.splitlines()[-1]) == {"exitCode": 9}


async def test_the_text_record_of_another_outcome_says_which(daemon: Daemon) -> None:
    async with daemon.post({"command": ["no-such-program"]}, headers={"Accept": "*/*"}) as response:
        record = json.loads((await response.text()).splitlines()[-1])
    assert record["exitCode"] == -1
    assert record["outcome"] == "failed"
    assert "not found" in record["error"]


async def test_server_sent_events_carry_the_same_events(daemon: Daemon) -> None:
    async with daemon.post(
        {"command": ["sh", "-c", "echo a; exit 3"]}, headers={"Accept": "text/event-stream"}
    ) as response:
        text = await response.text()
        assert response.content_type == "text/event-stream"
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    events = [json.loads(block["data"]) for block in blocks]
    assert [block["event"] for block in blocks] == [event["event"] for event in events] == ["start", "stdout", "exit"]
    assert [int(block["id"]) for block in blocks] == [event["seq"] for event in events] == [0, 1, 2]
    assert events[-1]["exitCode"] == 3


async def test_the_start_event_names_the_pod(daemon: Daemon) -> None:
    _, stream = await daemon.run("true")
    pod = daemon.cluster.pod("workspace")
    start = stream.seen[0]
    assert (start["id"], start["pod"], start["podUid"], start["container"]) == (
        stream.id,
        "workspace",
        pod["metadata"]["uid"],
        "workspace",
    )


@pytest.mark.parametrize("code", [0, 1, 7, 125, 126, 127, 128, 137, 255])
async def test_the_exit_code_is_the_real_one(daemon: Daemon, code: int) -> None:
    exit_event, _ = await daemon.run("sh", "-c", f"exit {code}")
    assert (exit_event["outcome"], exit_event["exitCode"], exit_event["reaped"]) == ("exited", code, None)


async def test_a_command_killed_by_a_signal_ends_with_128_and_the_signal(daemon: Daemon) -> None:
    exit_event, _ = await daemon.run("sh", "-c", "kill -TERM $$")
    assert (exit_event["outcome"], exit_event["exitCode"]) == ("exited", 143)


async def test_stdout_and_stderr_are_kept_apart(any_cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(any_cluster)
    daemon = await start(any_cluster)
    script = "for i in 1 2 3; do echo out$i; echo err$i >&2; done"
    exit_event, stream = await daemon.run("sh", "-c", script)
    assert stream.data("stdout") == b"out1\nout2\nout3\n"
    assert stream.data("stderr") == b"err1\nerr2\nerr3\n"
    assert (exit_event["stdoutBytes"], exit_event["stderrBytes"]) == (15, 15)


async def test_every_byte_value_arrives(daemon: Daemon) -> None:
    data = bytes(range(256)) * 5
    _, stream = await daemon.run("cat", stdinBase64=base64.b64encode(data).decode())
    assert stream.data("stdout") == data


async def test_characters_split_over_frames_are_never_broken(daemon: Daemon) -> None:
    daemon.cluster.faults.split_frames = 1
    text = "añ€😀" * 20
    _, stream = await daemon.run("cat", stdin=text)
    assert stream.data("stdout").decode() == text
    assert not any("base64" in event for event in stream.seen)


async def test_ten_megabytes_without_a_newline_arrive(daemon: Daemon) -> None:
    exit_event, stream = await daemon.run("head", "-c", "10000000", "/dev/zero")
    assert exit_event["stdoutBytes"] == 10_000_000
    assert stream.data("stdout") == bytes(10_000_000)


async def test_a_hundred_thousand_one_byte_writes_arrive(daemon: Daemon) -> None:
    program = "import os\nfor i in range(100000): os.write(1, b'%d' % (i % 10))"
    exit_event, stream = await daemon.run(PYTHON, "-c", program)
    assert exit_event["stdoutBytes"] == 100_000
    assert stream.data("stdout") == b"0123456789" * 10_000


@pytest.mark.parametrize("accept", ["text/plain", "application/x-ndjson", "text/event-stream"])
async def test_random_bytes_arrive_with_the_same_hash_in_every_format(daemon: Daemon, accept: str) -> None:
    size = 24 << 20
    program = (
        "import hashlib, random, sys\nr = random.Random(7); h = hashlib.sha256()\n"
        f"for _ in range({size} >> 20):\n b = r.randbytes(1 << 20); h.update(b); sys.stdout.buffer.write(b)\n"
    )
    source = random.Random(7)
    expected = hashlib.sha256()
    for _ in range(size >> 20):
        expected.update(source.randbytes(1 << 20))
    got = hashlib.sha256()
    async with daemon.post({"command": [PYTHON, "-c", program]}, headers={"Accept": accept}) as response:
        if accept == "text/plain":
            body = await response.read()
            got.update(body[: body.rindex(b"\n---EXIT---\n")])
        else:
            async for line in response.content:
                text = line.removeprefix(b"data: ")
                if text.startswith(b'{"event":"stdout"'):
                    event = json.loads(text)
                    got.update(base64.b64decode(event["base64"]) if "base64" in event else event["text"].encode())
    assert got.hexdigest() == expected.hexdigest()


async def test_argv_environment_and_directory_reach_the_command_as_they_are(daemon: Daemon) -> None:
    awkward = ["a b", "$HOME", "`id`", "*", "line\nbreak", "'\"\\", "-n", "", "é€😀"]
    script = 'printf "%s\\0" "$@"; printf %s "$FOO" >&2; pwd'
    exit_event, stream = await daemon.run("sh", "-c", script, "x", *awkward, env={"FOO": "a\n'b'\\"}, cwd="/usr")
    assert stream.data("stdout") == b"".join(item.encode() + b"\0" for item in awkward) + b"/usr\n"
    assert stream.data("stderr") == b"a\n'b'\\"
    assert exit_event["exitCode"] == 0


async def test_without_stdin_the_command_reads_end_of_file(daemon: Daemon) -> None:
    exit_event, stream = await daemon.run("cat")
    assert exit_event["exitCode"] == 0
    assert stream.data("stdout") == b""


async def test_stdin_arrives_and_ends(any_cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(any_cluster)
    daemon = await start(any_cluster)
    script = "x=$(cat); echo ${#x}"
    for size in (0, 1, 70_000, 307_200):
        exit_event, stream = await daemon.run("sh", "-c", script, stdin="y" * size)
        assert stream.data("stdout") == b"%d\n" % size
        assert exit_event["exitCode"] == 0


async def test_a_long_argument_and_many_arguments_work(any_cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(any_cluster)
    daemon = await start(any_cluster)
    _, stream = await daemon.run("sh", "-c", "echo ${#1}", "x", "y" * 102_400)
    assert stream.data("stdout") == b"102400\n"
    _, stream = await daemon.run("sh", "-c", "echo $#", "x", *map(str, range(2000)))
    assert stream.data("stdout") == b"2000\n"
    assert max(sum(map(len, record.command)) for record in daemon.cluster.execs) < 8_000


async def test_a_quiet_stream_is_pinged(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, HEARTBEAT_SECONDS="0.2")
    stream = await daemon.open("sleep", "30")
    while (event := await stream.next()) is not None and event["event"] != "ping":
        pass
    assert event == {"event": "ping", "seq": stream.seen[-1]["seq"]}


async def test_missing_things_are_failures_that_say_which(daemon: Daemon) -> None:
    for members, reason in (
        ({"command": ["no-such-program"]}, "command_not_found"),
        ({"command": ["/no/such/program"]}, "command_not_found"),
        ({"command": ["true"], "cwd": "/no/such/directory"}, "cwd_not_found"),
        ({"command": ["/etc/passwd"]}, "start_failed"),
    ):
        exit_event, _ = await daemon.run(*members["command"], **{k: v for k, v in members.items() if k != "command"})
        assert (exit_event["outcome"], exit_event["reason"], exit_event["exitCode"]) == ("failed", reason, None)


async def test_many_streams_run_at_once(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, MAX_CONCURRENT_EXECS="30")
    results = await asyncio.gather(*(daemon.run("sh", "-c", f"sleep 0.1; echo {i}; exit {i}") for i in range(30)))
    assert [event["exitCode"] for event, _ in results] == list(range(30))
    assert [stream.data("stdout") for _, stream in results] == [b"%d\n" % i for i in range(30)]


async def test_without_a_wrapper_the_command_runs_bare(cluster: DevCluster, start: StartDaemon) -> None:
    add_workspace(cluster)
    daemon = await start(cluster, WRAPPER="none")
    exit_event, stream = await daemon.run("sh", "-c", "cat; echo done; exit 5", stdin="hello ")
    assert (exit_event["exitCode"], stream.data("stdout")) == (5, b"hello done\n")
    exit_event, _ = await daemon.run("cat")
    assert exit_event["exitCode"] == 0
    exit_event, _ = await daemon.run("no-such-program")
    assert (exit_event["outcome"], exit_event["reason"]) == ("failed", "command_not_found")
    exit_event, _ = await daemon.run("sleep", "30", timeoutSeconds=0.3)
    assert (exit_event["outcome"], exit_event["reaped"]) == ("timeout", False)
    problem = await daemon.refused({"command": ["true"], "cwd": "/"})
    assert (problem["status"], problem["member"]) == (400, "cwd")


async def test_without_a_wrapper_stdin_needs_an_api_server_that_can_end_it(
    cluster: DevCluster, start: StartDaemon
) -> None:
    cluster.subprotocols = ("v4.channel.k8s.io",)
    add_workspace(cluster)
    daemon = await start(cluster, WRAPPER="none")
    exit_event, _ = await daemon.run("cat", stdin="x")
    assert (exit_event["outcome"], exit_event["reason"]) == ("failed", "start_failed")
    assert "v5.channel.k8s.io" in exit_event["error"]
    assert not daemon.commands_started()
