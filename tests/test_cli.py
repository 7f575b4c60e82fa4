"""The command line: its arguments, its exit statuses, and what it says."""

import argparse
import http.server
import json
import os
import select
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from session_proxy import __version__, cli, session_spec
from session_proxy.cli import EXIT_CONFIG, build_parser, main
from session_proxy.config import SETTINGS

PATIENCE = 20.0
GOOD_POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "ws"},
    "spec": {"automountServiceAccountToken": False, "containers": [{"name": "workspace", "image": "ghcr.io/org/ws"}]},
}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests holds no settings."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


# --- arguments ------------------------------------------------------------------------------------------------------


def test_the_help_names_every_subcommand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert {"serve", "dev", "check", "health", "session"} <= set(parsers.choices)
    text = help_of(capsys, monkeypatch)
    for subcommand in parsers.choices:
        assert f" {subcommand} " in text
        assert f"usage: session-proxy {subcommand}" in help_of(capsys, monkeypatch, subcommand)


@pytest.mark.parametrize(
    ("subcommand", "words"),
    [
        ("serve", ["78 when a setting is wrong", "the flag wins"]),
        ("dev", ["This is no sandbox", "--dir", "--workspace", "--kubeconfig"]),
        ("check", ["0 all acceptable, 1 violations, 2", "--level", "--allowed-images", "--require-image-digest"]),
        ("health", ["0 healthy, 1 not", "--ready", "--listen-addr", "--listen-socket", "--listen-token-file"]),
        ("session", ["KUBECONFIG", "up", "status", "down"]),
        (
            "session up",
            [
                "0 ready; 1 failed or interrupted, and nothing is left; 4 failed or interrupted, and what is named may be",
                "78 refused before anything was created",
                "--set SETTING=VALUE",
                "--dry-run",
                *(f"{option.flag} VALUE {option.help}" for option in session_spec.UP_OPTIONS[2:]),
                "image of session-proxy, the sidecar (required)",
                "(default: 512Mi)",
            ],
        ),
        (
            "session down",
            ["0 nothing of it is left; 1 something is still there; 4 the cluster", "--timeout", "-n VALUE"],
        ),
        ("session status", ["0 ready; 1 not ready, or not all there; 3 nothing there; 4", "--namespace VALUE"]),
    ],
)
def test_each_subcommand_explains_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, subcommand: str, words: list[str]
) -> None:
    text = help_of(capsys, monkeypatch, *subcommand.split())
    for word in words:
        assert word in text


@pytest.mark.parametrize("subcommand", ["serve", "dev"])
def test_the_help_documents_every_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, subcommand: str
) -> None:
    text = help_of(capsys, monkeypatch, subcommand)
    for setting in SETTINGS:
        default = f"; default {setting.default}" if setting.default else ""
        assert f"{setting.flag} VALUE {setting.help}{default} [{setting.variable}]" in text


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"session-proxy {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["run"],
        ["serve", "--nosuch", "x"],
        ["serve", "extra"],
        ["check"],
        ["check", "--level", "x", "-"],
        ["session"],
        ["session", "restart", "demo"],
        ["session", "up"],
        ["session", "status", "demo", "--timeout", "3"],
    ],
)
def test_wrong_usage_is_exit_status_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert "usage: session-proxy" in usage_error(capsys, *argv)


def test_every_setting_is_a_flag_of_the_same_name() -> None:
    argv = ["serve", *(word for setting in SETTINGS for word in (setting.flag, f"<{setting.variable}>"))]
    arguments = vars(build_parser().parse_args(argv))
    assert {name: arguments[name] for name in (setting.variable for setting in SETTINGS)} == {
        setting.variable: f"<{setting.variable}>" for setting in SETTINGS
    }


def test_every_option_of_session_up_is_a_flag_that_reaches_it() -> None:
    flags = [option for option in session_spec.UP_OPTIONS if option.flag.startswith("--")]
    argv = ["session", "up", "demo", *(word for option in flags for word in (option.flag, f"<{option.field}>"))]
    arguments = vars(build_parser().parse_args([*argv, "--set", "A=1", "--set", "B=2", "--dry-run"]))
    assert {option.field: arguments[option.field] for option in flags} == {
        option.field: f"<{option.field}>" for option in flags
    }
    assert (arguments["name"], arguments["settings"], arguments["dry_run"]) == ("demo", ["A=1", "B=2"], True)


# --- settings -------------------------------------------------------------------------------------------------------


def test_all_wrong_settings_are_said_at_once_with_exit_status_78(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_ADDR", "0.0.0.0:80")
    monkeypatch.setenv("EXEC_BURST", "many")
    assert main(["serve", "--log-level", "loud"]) == EXIT_CONFIG == 78
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "LISTEN_ADDR",
        "EXEC_BURST",
        "LOG_LEVEL",
        "SESSION_NAME",
        "OWNER_MODE",
    ]
    assert all(line.startswith("session-proxy: ") for line in lines)
    assert "'0.0.0.0:80'; it must be a loopback address" in lines[0]


@pytest.mark.parametrize("subcommand", ["serve", "dev"])
def test_a_flag_wins_over_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, subcommand: str
) -> None:
    monkeypatch.setenv("SESSION_NAME", "demo")
    monkeypatch.setenv("OWNER_MODE", "none")
    monkeypatch.setenv("EXEC_BURST", "1")
    monkeypatch.setenv("LOG_FORMAT", "from the environment")
    assert main([subcommand, "--exec-burst", "from the flag"]) == EXIT_CONFIG
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "session-proxy: EXEC_BURST is 'from the flag'",
        "session-proxy: LOG_FORMAT is 'from the environment'",
    ]
    assert main([subcommand, "--exec-burst", "2", "--log-format", "from the flag"]) == EXIT_CONFIG
    assert "LOG_FORMAT is 'from the flag'" in capsys.readouterr().err


def test_an_empty_flag_unsets_the_variable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSION_NAME", "demo")
    monkeypatch.setenv("OWNER_MODE", "none")
    assert main(["serve", "--session-name", ""]) == EXIT_CONFIG
    assert capsys.readouterr().err.startswith("session-proxy: SESSION_NAME is not set")


def test_a_workspace_that_is_no_pod_is_exit_status_78(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "pod.yaml"
    for text in (None, "kind: Deployment", "[]", "{"):
        if text is not None:
            file.write_text(text)
        assert main(["dev", "--listen-addr", ":0", "--workspace", str(file)]) == EXIT_CONFIG
        assert capsys.readouterr().err.startswith("session-proxy: --workspace: ")


def test_the_module_and_the_console_script_are_the_command_line() -> None:
    script = Path(sys.executable).with_name("session-proxy")
    for command in ([sys.executable, "-m", "session_proxy"], [str(script)]):
        if Path(command[0]).exists():
            result = subprocess.run([*command, "serve"], capture_output=True, text=True, check=False, env={})
            assert result.returncode == EXIT_CONFIG
            assert result.stderr.startswith("session-proxy: SESSION_NAME is not set")


# --- check ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pod", "status"),
    [
        (["--level", "baseline"], GOOD_POD, 0),
        ([], GOOD_POD, 1),
        (["--level", "baseline", "--container", "workspace"], GOOD_POD, 0),
        (["--level", "baseline", "--container", "other"], GOOD_POD, 1),
        (["--level", "baseline", "--allowed-images", "ghcr.io/org, quay.io,"], GOOD_POD, 0),
        (["--level", "baseline", "--allowed-images", "ghcr.io/or"], GOOD_POD, 1),
        (["--level", "baseline", "--require-image-digest"], GOOD_POD, 1),
        (["--level", "baseline"], {"kind": "Service"}, 2),
        (["--level", "baseline"], [], 2),
    ],
)
def test_check_ends_with_the_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], pod: Any, status: int
) -> None:
    file = tmp_path / "pod.json"
    file.write_text(json.dumps(pod))
    assert main(["check", *options, str(file)]) == status
    out, err = capsys.readouterr()
    verdict = {0: "Pod/ws: ok", 1: "violation", 2: ""}[status]
    assert verdict in out
    assert bool(err) == (status == 2)


def test_check_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        file.write(json.dumps(GOOD_POD))
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["check", "--level", "baseline", "-"]) == 0
    assert capsys.readouterr().out == "<stdin>: Pod/ws: ok\n"


def test_check_says_which_image_prefix_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--allowed-images", "ghcr.io,https://x", "-"]) == 2
    assert capsys.readouterr().err.startswith("session-proxy: --allowed-images: ")


def test_check_of_a_file_that_is_not_there_is_exit_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", str(tmp_path / "nosuch")]) == 2
    assert "nosuch" in capsys.readouterr().err


# --- health ---------------------------------------------------------------------------------------------------------


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers as its server is told to, and notes what it was asked."""

    server: "Tcp | Unix"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.answer is None:
            self.wfile.write(b"this is not HTTP\r\n\r\n")
            return
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "peer"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        del format, args


class Tcp(socketserver.TCPServer):
    asked: list[tuple[str, str | None]]
    answer: tuple[int, bytes] | None


class Unix(socketserver.UnixStreamServer):
    asked: list[tuple[str, str | None]]
    answer: tuple[int, bytes] | None


@pytest.fixture(params=["tcp", "unix"])
def answering(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tcp | Unix]:
    """A small HTTP server where LISTEN_ADDR or LISTEN_SOCKET says."""
    server: Tcp | Unix
    if request.param == "tcp":
        server = Tcp(("127.0.0.1", 0), Answering)
        monkeypatch.setenv("LISTEN_ADDR", f"127.0.0.1:{server.socket.getsockname()[1]}")
    else:
        path = str(tmp_path / "socket")
        server = Unix(path, Answering)
        monkeypatch.setenv("LISTEN_ADDR", "127.0.0.1:1")
        monkeypatch.setenv("LISTEN_SOCKET", path)
    server.asked, server.answer = [], (200, b'{"status": "ok"}')
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(PATIENCE)


def test_a_daemon_that_answers_is_healthy(answering: Tcp | Unix, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health"]) == 0
    assert main(["health", "--ready"]) == 0
    assert answering.asked == [("/livez", None), ("/readyz", None)]
    assert capsys.readouterr() == ("", "")


def test_a_daemon_that_is_not_ready_says_why(answering: Tcp | Unix, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = [
        {"reason": "workspace_not_found", "detail": "no pod matches"},
        {"reason": "kube_forbidden", "detail": "RBAC does not allow create pods/exec"},
    ]
    answering.answer = (503, json.dumps({"status": "unready", "reasons": reasons}).encode())
    assert main(["health", "--ready"]) == 1
    assert capsys.readouterr().err == (
        "session-proxy: /readyz: HTTP 503: workspace_not_found: no pod matches; "
        "kube_forbidden: RBAC does not allow create pods/exec\n"
    )


def test_a_refusal_says_its_reason(answering: Tcp | Unix, capsys: pytest.CaptureFixture[str]) -> None:
    answering.answer = (401, b'{"reason": "unauthorized", "detail": "Authorization must be Bearer"}')
    assert main(["health"]) == 1
    assert capsys.readouterr().err.endswith("/livez: HTTP 401: unauthorized: Authorization must be Bearer\n")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"7", b'{"reasons": 7}', b'{"reasons": [7]}', b"\xff" * 500])
def test_an_answer_that_is_not_ours_is_unhealthy(
    answering: Tcp | Unix, capsys: pytest.CaptureFixture[str], body: bytes
) -> None:
    answering.answer = (404, body)
    assert main(["health"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("session-proxy: /livez: HTTP 404: ")


def test_what_does_not_speak_http_is_unhealthy(answering: Tcp | Unix, capsys: pytest.CaptureFixture[str]) -> None:
    answering.answer = None
    assert main(["health"]) == 1
    assert capsys.readouterr().err.startswith("session-proxy: /livez: BadStatusLine")


@pytest.mark.parametrize("token", ["t0ken", "tök€n"])
def test_the_bearer_token_is_sent(
    answering: Tcp | Unix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    token: str,
) -> None:
    (tmp_path / "token").write_text(token + "\n", encoding="utf-8")
    assert main(["health", "--listen-token-file", str(tmp_path / "token")]) == 0
    monkeypatch.setenv("LISTEN_TOKEN_FILE", str(tmp_path / "token"))
    assert main(["health"]) == 0
    as_bytes = [(path, given.encode("latin-1").decode() if given else None) for path, given in answering.asked]
    assert as_bytes == [("/livez", f"Bearer {token}")] * 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("token", [b"\xff", b"a\nb"])
def test_a_token_that_cannot_be_sent_is_unhealthy_and_not_shown(
    answering: Tcp | Unix, tmp_path: Path, capsys: pytest.CaptureFixture[str], token: bytes
) -> None:
    (tmp_path / "token").write_bytes(b"s3cret" + token)
    assert main(["health", "--listen-token-file", str(tmp_path / "token")]) == 1
    assert answering.asked == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("session-proxy: /livez: ")
    assert "s3cret" not in line


def test_a_token_file_that_is_not_there_is_unhealthy(
    answering: Tcp | Unix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["health", "--listen-token-file", str(tmp_path / "nosuch")]) == 1
    assert "FileNotFoundError" in capsys.readouterr().err


def test_a_flag_says_where_to_ask(
    answering: Tcp | Unix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(answering, Tcp):
        flag = ["--listen-addr", os.environ["LISTEN_ADDR"]]
        monkeypatch.setenv("LISTEN_SOCKET", str(tmp_path / "nosuch"))
    else:
        flag = ["--listen-socket", os.environ["LISTEN_SOCKET"]]
        monkeypatch.delenv("LISTEN_SOCKET")
    assert main(["health"]) == 1
    assert main(["health", *flag]) == 0
    assert len(answering.asked) == 1
    assert "Error" in capsys.readouterr().err


def test_nobody_there_is_unhealthy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["health", "--listen-addr", "127.0.0.1:1"]) == 1
    assert main(["health", "--listen-socket", str(tmp_path / "nosuch")]) == 1
    refused, missing = capsys.readouterr().err.splitlines()
    assert refused.startswith("session-proxy: /livez: ConnectionRefusedError")
    assert missing.startswith("session-proxy: /livez: FileNotFoundError")


def test_a_daemon_that_hangs_is_unhealthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "HEALTH_SECONDS", 0.05)
    with Unix(str(tmp_path / "socket"), Answering):  # listens, and nobody accepts
        assert main(["health", "--listen-socket", str(tmp_path / "socket")]) == 1
    assert "TimeoutError" in capsys.readouterr().err


def test_a_wrong_address_is_exit_status_78(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--listen-addr", "0.0.0.0:80"]) == EXIT_CONFIG
    assert capsys.readouterr().err.startswith("session-proxy: LISTEN_ADDR is '0.0.0.0:80'")


# --- the real thing -------------------------------------------------------------------------------------------------


def test_dev_serves_until_it_is_told_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "session_proxy", "dev", "--listen-addr", "127.0.0.1:0", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], PATIENCE)[0]
            first = process.stdout.readline()
            assert first.startswith("session-proxy dev: listening on http://127.0.0.1:")
            assert "not a sandbox" in process.stdout.readline()
            address = first.strip().removeprefix("session-proxy dev: listening on http://")
            assert main(["health", "--listen-addr", address]) == 0
            assert main(["health", "--ready", "--listen-addr", address]) == 0
            assert capsys.readouterr() == ("", "")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
