"""The command line: serve, dev, check, health, session."""

import argparse
import http.client
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from session_proxy import __version__, session_spec
from session_proxy.config import SETTINGS, Config, parse_config
from session_proxy.errors import ConfigError
from session_proxy.policy import Level, PolicySettings, validate_image_prefix

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: a setting is wrong."""

HEALTH_SECONDS = 5.0
"""For the daemon's answer to ``session-proxy health``."""

MAX_HEALTH_BYTES = 65_536
"""How much of that answer is read."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="session-proxy",
        description="Runs commands in the workspace pod that this session owns, and streams their output.",
    )
    parser.add_argument("--version", action="version", version=f"session-proxy {__version__}")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="run the daemon",
        description="Run the daemon. Every setting is an environment variable and a flag; the flag wins. "
        "Exit status: 0 after SIGTERM or SIGINT, 78 when a setting is wrong, 71 when a listener cannot be opened.",
    )
    _add_settings(serve)

    dev = commands.add_parser(
        "dev",
        help="run the daemon in front of an embedded stand-in for a cluster",
        description="Run the same daemon in front of a small API server on loopback, whose workspace is a directory "
        "and whose commands are processes of this machine. This is no sandbox: commands can do whatever you can.",
    )
    dev.add_argument("--dir", type=Path, help="the workspace's directory (default: a new temporary one)")
    dev.add_argument("--workspace", type=Path, metavar="FILE", help="pod manifest (YAML or JSON) of the workspace")
    dev.add_argument("--kubeconfig", type=Path, metavar="FILE", help="write a kubeconfig for kubectl there")
    _add_settings(dev)

    check = commands.add_parser(
        "check",
        help="evaluate manifests offline",
        description="Evaluate pods and pod templates by the rules that the daemon applies before it runs a command. "
        "Exit status: 0 all acceptable, 1 violations, 2 something cannot be read.",
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="YAML or JSON, any number of documents; - is stdin")
    check.add_argument("--level", type=Level, choices=list(Level), default=Level.RESTRICTED, help="default: restricted")
    check.add_argument("--allowed-images", default="", help="registry or repository prefixes, separated by commas")
    check.add_argument("--require-image-digest", action="store_true", help="images must be pinned by digest")
    check.add_argument("--container", help="a container that must be there (default: any)")

    health = commands.add_parser(
        "health",
        help="ask a running daemon; for exec probes",
        description="Ask the daemon that LISTEN_ADDR (or LISTEN_SOCKET) names. Exit status: 0 healthy, 1 not.",
    )
    health.add_argument("--ready", action="store_true", help="ask for readiness instead of liveness")
    health.add_argument("--listen-addr", help="LISTEN_ADDR of the daemon")
    health.add_argument("--listen-socket", help="LISTEN_SOCKET of the daemon")
    health.add_argument("--listen-token-file", help="LISTEN_TOKEN_FILE of the daemon")

    session = commands.add_parser(
        "session",
        help="create, show or remove a session on a cluster",
        description="For the platform's side, with a kubeconfig of one's own (KUBECONFIG, else ~/.kube/config): a "
        "runner pod with the sidecar, and the workspace pod that it owns.",
    )
    _add_session(session)
    return parser


def _add_session(session: argparse.ArgumentParser) -> None:
    commands = session.add_subparsers(dest="session_command", required=True, metavar="COMMAND")
    up = commands.add_parser(
        "up",
        help="create a session and wait until it is ready",
        description="Create the runner pod, the workspace pod and the sidecar's access to it, and wait until a command "
        "could run: all of it or nothing. Exit status: 0 ready; 1 failed or interrupted, and nothing is left; 4 failed "
        "or interrupted, and what is named may be left (`session down` removes it); 78 refused before anything was "
        "created, because an option is wrong or the cluster lacks something.",
    )
    up.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="setting of the sidecar, such as EXEC_TIMEOUT_SECONDS=60; may be repeated",
    )
    up.add_argument("--dry-run", action="store_true", help="print the manifests as YAML and create nothing")
    down = commands.add_parser(
        "down",
        help="remove a session",
        description="Remove everything that `up` created, and nothing else; safe to repeat. Exit status: 0 nothing of "
        "it is left; 1 something is still there; 4 the cluster could not be asked, or interrupted; 78 refused before "
        "anything was removed.",
    )
    status = commands.add_parser(
        "status",
        help="say what is there",
        description="Say what is there of a session. Exit status: 0 ready; 1 not ready, or not all there; 3 nothing "
        "there; 4 the cluster could not be asked, or interrupted; 78 refused.",
    )
    for parser, options in (
        (up, session_spec.UP_OPTIONS),
        (down, session_spec.DOWN_OPTIONS),
        (status, session_spec.STATUS_OPTIONS),
    ):
        for option in options:
            note = f" (default: {option.default})" if option.default else " (required)" if option.required else ""
            if option is session_spec.NAME:
                parser.add_argument(option.field, metavar=option.flag, help=option.help)
            else:
                names = ("-n", option.flag) if option is session_spec.NAMESPACE else (option.flag,)
                parser.add_argument(*names, dest=option.field, metavar="VALUE", help=option.help + note)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (environment variable in brackets)")
    for setting in SETTINGS:
        default = f"; default {setting.default}" if setting.default else ""
        group.add_argument(
            setting.flag,
            dest=setting.variable,
            metavar="VALUE",
            help=f"{setting.help}{default} [{setting.variable}]".replace("%", "%%"),
        )


def _values(arguments: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    """Merge environment and flags."""
    values = {setting.variable: environ.get(setting.variable, "") for setting in SETTINGS}
    given = vars(arguments)
    return values | {name: given[name] for name in values if given.get(name) is not None}


def _config(values: Mapping[str, str]) -> Config | None:
    try:
        return parse_config(values)
    except ConfigError as error:
        for line in error.problems:
            print(f"session-proxy: {line}", file=sys.stderr)
        return None


def _serve(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    config = _config(_values(arguments, environ))
    if config is None:
        return EXIT_CONFIG
    from session_proxy import server  # noqa: PLC0415 (`health` runs every few seconds and must not load the daemon)

    return server.serve(config, environ)


def _dev(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from session_proxy import dev  # noqa: PLC0415 (as above)

    values = dev.default_values() | {name: value for name, value in _values(arguments, environ).items() if value}
    config = _config(values)
    if config is None:
        return EXIT_CONFIG
    return dev.run(config, directory=arguments.dir, workspace=arguments.workspace, kubeconfig=arguments.kubeconfig)


def _check(arguments: argparse.Namespace) -> int:
    from session_proxy import check  # noqa: PLC0415 (as above)

    prefixes = tuple(part.strip() for part in arguments.allowed_images.split(",") if part.strip())
    for prefix in prefixes:
        if problem := validate_image_prefix(prefix):
            print(f"session-proxy: --allowed-images: {problem}", file=sys.stderr)
            return 2
    settings = PolicySettings(
        level=arguments.level,
        allowed_images=prefixes,
        require_image_digest=arguments.require_image_digest,
        container=arguments.container,
    )
    return check.run_check(arguments.files, settings, stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=HEALTH_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _health(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Ask over HTTP; the standard library's client, because a probe starts a process every few seconds."""
    given = {
        "LISTEN_ADDR": arguments.listen_addr,
        "LISTEN_SOCKET": arguments.listen_socket,
        "LISTEN_TOKEN_FILE": arguments.listen_token_file,
    }
    # The daemon's other settings do not matter here; these stand in for those that have no default.
    values = {name: value or environ.get(name, "") for name, value in given.items()}
    config = _config(values | {"SESSION_NAME": "any", "OWNER_MODE": "none"})
    if config is None:
        return EXIT_CONFIG
    path = "/readyz" if arguments.ready else "/livez"
    # TCP always listens, and a socket with an allow-list need not let this process in.
    closed = environ.get("LISTEN_SOCKET_UIDS", "").strip()
    if arguments.listen_socket or (config.listen_socket and not arguments.listen_addr and not closed):
        connection: http.client.HTTPConnection = _UnixConnection(config.listen_socket or "")
    else:
        host, port = config.listen_addr
        connection = http.client.HTTPConnection(host, port, timeout=HEALTH_SECONDS)
    try:
        headers = {}
        if config.listen_token_file:
            token = Path(config.listen_token_file).read_text(encoding="utf-8").strip()
            headers["Authorization"] = f"Bearer {token}".encode()
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read(MAX_HEALTH_BYTES)
    except (OSError, http.client.HTTPException) as error:
        print(f"session-proxy: {path}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except ValueError:  # its text would quote the token
        print(f"session-proxy: {path}: LISTEN_TOKEN_FILE holds nothing that a header can carry", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if response.status == http.HTTPStatus.OK:
        return 0
    print(f"session-proxy: {path}: HTTP {response.status}: {_reasons(body)}", file=sys.stderr)
    return 1


def _reasons(body: bytes) -> str:
    try:
        answer = json.loads(body)
        reasons = answer.get("reasons") or [answer]
        return "; ".join(f"{reason.get('reason')}: {reason.get('detail')}" for reason in reasons)
    except (ValueError, AttributeError, TypeError):
        return body[:200].decode(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = build_parser().parse_args(argv)
    match arguments.subcommand:
        case "serve":
            return _serve(arguments, os.environ)
        case "dev":
            return _dev(arguments, os.environ)
        case "check":
            return _check(arguments)
        case "session":
            from session_proxy import session  # noqa: PLC0415 (as above)

            return session.run_session(vars(arguments), os.environ)
    return _health(arguments, os.environ)
