"""The in-container programs, run for real under every shell they must work with."""

import contextlib
import hashlib
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import quote_plus

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from session_proxy.errors import ExecStartError, RemoteCommandProtocolError
from session_proxy.wrapper import (
    EXEC_ID_VARIABLE,
    HANG_UP,
    MAX_ARGUMENT_BYTES,
    MAX_HANDSHAKE_BYTES,
    SHELL_OWNED_VARIABLES,
    Census,
    Handshake,
    Ready,
    Started,
    escape_bytes,
    go_payload,
    parse_census,
    reaper_argv,
    wrapper_argv,
)

PATIENCE = 20.0
SHELLS = ("busybox", "dash", "bash")
GAVE_UP = 125


def tool(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"the tests need {name}"
    return found


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file named sh that is this shell, as images have it."""
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"{request.param} is not installed")
    link = tmp_path_factory.mktemp(request.param) / "sh"
    link.symlink_to(found)
    return link


# --- processes ------------------------------------------------------------------------------------------------------


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; none for a process that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if fields[0] in "ZX" else fields


def alive(pid: int) -> bool:
    return bool(stat_of(pid))


def gone(pid: int, seconds: float = PATIENCE) -> bool:
    """Wait for the end of a process, whoever's child it is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def members(exec_id: str, session: int) -> set[int]:
    """Every living process that carries the id in its environment or command line, or is of the session."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = stat_of(int(entry.name))
            if fields and (
                int(fields[3]) == session
                or exec_id.encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            ):
                found.add(int(entry.name))
    return found


class Result(NamedTuple):
    """How a wrapped command ended."""

    code: int
    stdout: bytes
    stderr: bytes


class Program:
    """The wrapper under one shell, driven as the executor drives it. Leaving the context leaves nothing running."""

    def __init__(self, shell: Path, *, grace: float = 0, environ: Mapping[str, str] | None = None) -> None:
        self.id = secrets.token_hex(8)
        self.nonce = secrets.token_hex(8)
        self._handshake = Handshake(self.nonce)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._output = b""
        self.process = subprocess.Popen(
            wrapper_argv(self.id, self.nonce, grace),
            executable=shell,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            env=environ,
        )
        self.ready = Ready(0, 0)

    def __enter__(self) -> Self:
        try:
            said: Ready | Started | None = None
            while not isinstance(said, Ready):
                data = self._read()
                assert data, f"the shell ended: {self.stderr()!r}"
                said = self._handshake.feed(data)
            self.ready = said
        except BaseException:
            self.__exit__(AssertionError, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = members(self.id, self.process.pid)
        # After an orderly end nothing may be left; after a kill the last ones may still be on their way out.
        stayed = {pid for pid in left if self.process.poll() is None or not gone(pid, 2)}
        for pid in left:
            kill(pid)
        for pid in left:
            gone(pid)
        self.process.wait(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]
        assert kind is not None or not stayed, f"left running: {stayed}"

    def _read(self) -> bytes:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        assert ready, f"no output; so far {self._output[-200:]!r}, {self.stderr()!r}"
        return os.read(self.process.stdout.fileno(), 65_536)

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def stderr(self) -> bytes:
        self._stderr.seek(0)
        return self._stderr.read()

    def go(
        self,
        *argv: str,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> None:
        """Open the gate and wait for the wrapper's word that the command was started."""
        self.send(go_payload(self.nonce, argv, cwd=cwd, env=env, stdin=stdin))
        said = self._handshake.feed(b"")
        while not isinstance(said, Started):
            data = self._read()
            assert data, f"the wrapper ended: {self.stderr()!r}"
            said = self._handshake.feed(data)
        self._output = said.output

    def lines(self, count: int) -> list[bytes]:
        """Wait for so many lines of standard output."""
        while self._output.count(b"\n") < count:
            data = self._read()
            assert data, f"only {self._output!r}, {self.stderr()!r}"
            self._output += data
        return self._output.splitlines()

    def finish(self) -> Result:
        """Wait for the command's end with standard input open, as the executor does."""
        while data := self._read():
            self._output += data
        code = self.process.wait(PATIENCE)
        return Result(code, self._output, self.stderr())


def run(
    shell: Path,
    *argv: str,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    environ: Mapping[str, str] | None = None,
) -> Result:
    with Program(shell, environ=environ) as program:
        program.go(*argv, cwd=cwd, env=env, stdin=stdin)
        return program.finish()


def start_failure(
    shell: Path, *argv: str, cwd: str | None = None, env: Mapping[str, str] | None = None
) -> ExecStartError:
    with Program(shell) as program:
        with pytest.raises(ExecStartError) as failure:
            program.go(*argv, cwd=cwd, env=env)
        assert program.finish() == Result(GAVE_UP, b"", b"")
        return failure.value


def arguments(output: bytes) -> list[str]:
    """Split what ``printf '%s\\0'`` or ``env -0`` printed."""
    return [part.decode() for part in output.split(b"\0")[:-1]]


def environment(output: bytes) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in arguments(output))
    return {name: value for name, _, value in pairs}


def make_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# --- before the gate ------------------------------------------------------------------------------------------------


def test_the_program_says_which_process_it_is(shell: Path) -> None:
    with Program(shell) as program:
        assert program.ready.pid == program.process.pid
        assert program.ready.start_time == int(stat_of(program.process.pid)[19])
        program.go("true")
        assert program.finish() == Result(0, b"", b"")


def test_nothing_runs_when_the_gate_stays_shut(shell: Path) -> None:
    with Program(shell) as program:
        program.close_stdin()
        assert program.finish() == Result(GAVE_UP, b"", b"")


@pytest.mark.parametrize("line", [b"go\n", b"\n", b"other go\n"])
def test_nothing_runs_when_the_gate_is_opened_with_another_nonce(shell: Path, line: bytes) -> None:
    with Program(shell) as program:
        program.send(line)
        assert program.finish() == Result(GAVE_UP, b"", b"")


@pytest.mark.parametrize("stdin", [None, b"text\n", b"x" * 5000], ids=["none", "short", "long"])
def test_nothing_runs_when_the_payload_is_cut(shell: Path, tmp_path: Path, stdin: bytes | None) -> None:
    marker = tmp_path / "marker"
    whole = len(go_payload("0" * 16, ["touch", str(marker)], env={"A": "x\ny"}, stdin=stdin))
    for length in {1, 18, 19, 20, 30, whole // 2, whole - 18, whole - 2}:
        with Program(shell) as program:
            program.send(go_payload(program.nonce, ["touch", str(marker)], env={"A": "x\ny"}, stdin=stdin)[:length])
            program.close_stdin()
            assert program.finish() == Result(GAVE_UP, b"", b"")
            assert not marker.exists()


def test_noise_before_the_handshake_is_skipped(shell: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "sh"
    make_executable(noisy, f'#!/bin/sh\necho "welcome to this image"\nprintf "no newline "\nexec {shell} "$@"\n')
    assert run(noisy, "echo", "x") == Result(0, b"x\n", b"")


def test_the_programs_fit_an_exec_url() -> None:
    ready = Ready(4_194_304, 1 << 40)
    for argv in (wrapper_argv("f" * 16, "f" * 16, 300), reaper_argv("f" * 16, "f" * 16, ready)):
        query = "&".join(f"command={quote_plus(argument)}" for argument in argv)
        assert len(query) < 7_000  # load balancers take 8 KiB, path and host included


@pytest.mark.parametrize(("grace", "seconds"), [(0, "0"), (0.1, "1"), (1, "1"), (2.0, "2"), (2.5, "3"), (-1, "0")])
def test_the_grace_is_rounded_up_to_whole_seconds(grace: float, seconds: str) -> None:
    assert wrapper_argv("i", "n", grace)[-1] == seconds


# --- how commands end and what they get -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 64, 125, 126, 127, 128, 137, 143, 255])
def test_the_exit_code_is_the_commands(shell: Path, code: int) -> None:
    assert run(shell, "sh", "-c", f"exit {code}").code == code
    assert run(shell, "sh", "-c", f"cat; exit {code}", stdin=b"x") == Result(code, b"x", b"")


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "KILL", "USR1", "PIPE", "ALRM", "TERM"])
def test_a_command_killed_by_a_signal_ends_with_128_and_its_number(shell: Path, name: str) -> None:
    result = run(shell, "sh", "-c", f"ulimit -c 0; kill -s {name} $$")
    assert result.code == 128 + signal.Signals[f"SIG{name}"]
    assert result.stdout == b""


def test_the_two_outputs_stay_apart(shell: Path) -> None:
    assert run(shell, "sh", "-c", "echo out; echo err >&2") == Result(0, b"out\n", b"err\n")


@pytest.mark.parametrize(
    "name", ["plain", "two words", "-dash", "new\nline", "trailing\n", "$(x) `y` *", "üñ…😀", "a\\b"]
)
def test_the_working_directory_is_the_one_asked_for(shell: Path, tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    result = run(shell, "readlink", "-n", "/proc/self/cwd", cwd=str(directory))
    assert result == Result(0, os.fsencode(directory), b"")


def test_without_a_working_directory_the_command_gets_the_containers(shell: Path) -> None:
    assert run(shell, "readlink", "-n", "/proc/self/cwd").stdout == os.fsencode(Path.cwd())


def test_a_working_directory_that_cannot_be_entered_is_a_failure_to_start(shell: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nosuch", tmp_path / "file", tmp_path / "nosuch\n", Path("/nosuch/..")):
        error = start_failure(shell, "true", cwd=str(path))
        assert error.reason == "cwd_not_found"


def test_a_command_that_is_not_there_is_a_failure_to_start(shell: Path, tmp_path: Path) -> None:
    for name in ("nosuch", "/bin/nosuch", "./nosuch", str(tmp_path / "nosuch"), "no such\n$(x)", "-nosuch", "a=b"):
        assert start_failure(shell, name, "x").reason == "command_not_found"
    assert start_failure(shell, "true", env={"PATH": str(tmp_path)}).reason == "command_not_found"


def test_a_command_that_is_not_executable_is_a_failure_to_start(shell: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    for name in (str(tmp_path / "data"), "./data", str(tmp_path)):
        error = start_failure(shell, name, cwd=str(tmp_path))
        assert error.reason == "start_failed"
        assert "not an executable file" in error.message
    assert start_failure(shell, "data", env={"PATH": str(tmp_path)}).reason == "start_failed"


def test_the_command_is_searched_as_the_kernels_callers_do(shell: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first/tool").write_text("not executable")
    (tmp_path / "second/tool").mkdir(parents=True)
    make_executable(tmp_path / "third/tool", '#!/bin/sh\necho third "$@"\n')
    make_executable(tmp_path / "glob/tool", "#!/bin/sh\necho wrong\n")
    path = f"{tmp_path}/first:{tmp_path}/second:{tmp_path}/glo*:{tmp_path}/third"
    assert run(shell, "tool", "a  b", env={"PATH": path}) == Result(0, b"third a  b\n", b"")
    assert run(shell, "tool", cwd=str(tmp_path / "third"), env={"PATH": ":/nosuch"}).stdout == b"third\n"
    assert run(shell, "./tool", cwd=str(tmp_path / "third")).stdout == b"third\n"


@pytest.mark.parametrize(
    "name", ["cd", "exit", "eval", "export", "exec", "set", "trap", ":", "kill", "printf", "true", "read", "if", "line"]
)
def test_a_command_with_a_builtins_name_is_a_program_all_the_same(shell: Path, tmp_path: Path, name: str) -> None:
    make_executable(tmp_path / name, f'#!/bin/sh\necho "program {name}" "$@"\n')
    result = run(shell, name, "7", "-x", env={"PATH": str(tmp_path)})
    assert result == Result(0, f"program {name} 7 -x\n".encode(), b"")
    assert start_failure(shell, name, "7", env={"PATH": "/nosuch"}).reason == "command_not_found"


def test_the_builtin_that_reads_a_file_is_not_run(shell: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("echo sourced\n")
    assert start_failure(shell, ".", str(tmp_path / "file")).reason == "command_not_found"


def test_a_command_keeps_its_name(shell: Path, tmp_path: Path) -> None:
    (tmp_path / "mycat").symlink_to(tool("cat"))
    output = run(shell, "mycat", "/proc/self/cmdline", env={"PATH": str(tmp_path)}).stdout
    # A busybox that prefers its own applets to $PATH has to be given the whole path.
    names = ["mycat", str(tmp_path / "mycat")] if shell.resolve().name == "busybox" else ["mycat"]
    assert arguments(output)[0] in names
    assert arguments(output)[1:] == ["/proc/self/cmdline"]


_special = st.sampled_from("\n\\$`'\"*?[]{}~-=%!#;&|()<> \t\r\x01\x7f\x81\x88é€😀xn0")
_no_nul = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
_texts = st.text(_special | _no_nul, max_size=12)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@settings(max_examples=13, deadline=None)
@given(argv=st.lists(_texts, max_size=8))
@example(
    argv=["-e", "--", "\n", "\n\n", "x\n", "$(touch /tmp/x)", "`x`", "*", "\\n", "\\", "\\\\", "'", '"', "%s", "", "%"]
)
def test_any_arguments_arrive_as_they_were_given(shell: Path, locale: str, argv: list[str]) -> None:
    environ = {"PATH": os.environ["PATH"], "LC_ALL": locale}
    result = run(shell, tool("printf"), "%s\\0", "first", *argv, environ=environ)
    assert arguments(result.stdout) == ["first", *argv]
    assert result.code == 0


@settings(max_examples=25, deadline=None)
@given(
    values=st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True), _texts, max_size=5).filter(
        lambda values: "PATH" not in values
    )
)
@example(
    values={"A": "two\nlines\n", "_": "x", "B": "-n", "C": "'\"", "D": "ü€😀", "E": "$(x)`y`", "F": "", "IFS": "\n"}
)
def test_any_environment_arrives_as_it_was_given(shell: Path, values: dict[str, str]) -> None:
    # ``_`` is set by every shell for its children, env(1) included where a shell starts it.
    result = run(shell, tool("env"), "-0", env=values)
    assert result.code == 0
    got = environment(result.stdout)
    assert {name: got.get(name) for name in values} == values


def names_a_shell_may_own() -> list[str]:
    known = subprocess.run(["bash", "-c", "compgen -v"], capture_output=True, text=True, check=True).stdout.split()
    ours = [f"_p{letter}" for letter in "abcdefghijklmnopqrstuvwxyz01"] + ["_p998", "line", "say", "run", "watch"]
    more = {"CDPATH", "ENV", "BASH_ENV", "LC_ALL", "LANG", "PS1", "PS4", "HOME", "SHLVL", "PWD", "OLDPWD", "OPTARG"}
    more |= {"FUNCNEST", "TMOUT", "POSIXLY_CORRECT", "BASH_XTRACEFD", "BASH_COMPAT", "TIMEFORMAT", "GLOBIGNORE"}
    return sorted({*known, *SHELL_OWNED_VARIABLES, *ours, *more} - {EXEC_ID_VARIABLE, "PATH"})


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash names its variables")
@pytest.mark.parametrize("value", ["7", "not a number"])
def test_even_a_variable_that_a_shell_owns_can_be_set(shell: Path, value: str) -> None:
    values = dict.fromkeys(names_a_shell_may_own(), value)
    assert {"UID", "PPID", "IFS", "_", "EPOCHSECONDS", "_pn", "_pa"} <= values.keys()
    result = run(shell, tool("env"), "-0", env=values)
    assert (result.code, result.stderr) == (0, b"")
    got = environment(result.stdout)
    assert {name: got.get(name) for name in values} == values


def test_a_new_path_is_where_the_command_is_looked_up(shell: Path, tmp_path: Path) -> None:
    make_executable(tmp_path / "bin/tool", '#!/bin/sh\necho "$PATH"\n')
    assert run(shell, "tool", env={"PATH": f"{tmp_path}/bin"}).stdout == f"{tmp_path}/bin\n".encode()


def test_the_longest_argument_and_the_longest_variable_arrive(shell: Path) -> None:
    for text in ("x" * 102_400, "y" * MAX_ARGUMENT_BYTES, "\n" * 50_000):
        result = run(shell, tool("printf"), "%s\\0", text)
        assert arguments(result.stdout) == [text]
    value = "z" * (MAX_ARGUMENT_BYTES - len("LONG="))
    assert environment(run(shell, tool("env"), "-0", env={"LONG": value}).stdout)["LONG"] == value


@pytest.mark.parametrize("count", [994, 995, 996, 1994, 2000])
def test_many_arguments_arrive_in_order(shell: Path, count: int) -> None:
    # The program reads 999 entries at a time; four are the working directory, "--", printf and its format.
    argv = [f"{number} " + "\n" * (number % 20 == 0) for number in range(count)]
    assert arguments(run(shell, tool("printf"), "%s\\0", *argv).stdout) == argv


def test_nothing_is_added_to_the_environment_but_the_id(shell: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": "/root", "A": "1", "PS4": "+ ", "LC_ALL": "C"}
    bare = subprocess.run([tool("env"), "-0"], env=environ, capture_output=True, check=True).stdout
    with Program(shell, environ=environ) as program:
        program.go(tool("env"), "-0", env={"B": "2"})
        got = environment(program.finish().stdout)
        assert got.pop(EXEC_ID_VARIABLE) == program.id
    assert got.pop("B") == "2"
    assert {name: value for name, value in got.items() if name not in {"PWD", "SHLVL", "OLDPWD", "_"}} == environment(
        bare
    )


@pytest.mark.parametrize("stdin", [None, b"x"])
def test_no_descriptor_but_the_three_is_inherited(shell: Path, stdin: bytes | None) -> None:
    bare = subprocess.run(
        ["ls", "/proc/self/fd"], stdin=subprocess.DEVNULL, capture_output=True, check=True, start_new_session=True
    ).stdout
    assert bare.split() == [b"0", b"1", b"2", b"3"]  # the last is ls's own
    assert run(shell, "ls", "/proc/self/fd", stdin=stdin).stdout == bare


@pytest.mark.parametrize("stdin", [None, b"x"])
def test_no_signal_is_ignored_or_blocked_that_was_not_before(shell: Path, stdin: bytes | None) -> None:
    def signals(status: bytes) -> list[bytes]:
        return [line for line in status.splitlines() if line.startswith((b"SigBlk", b"SigIgn"))]

    bare = subprocess.run(["cat", "/proc/self/status"], capture_output=True, check=True, start_new_session=True)
    wrapped = signals(run(shell, "cat", "/proc/self/status", stdin=stdin).stdout)
    assert len(wrapped) == 2
    assert wrapped == signals(bare.stdout)


# --- standard input -------------------------------------------------------------------------------------------------


def test_no_standard_input_is_dev_null(shell: Path) -> None:
    assert run(shell, "readlink", "/proc/self/fd/0").stdout == b"/dev/null\n"
    assert run(shell, "cat") == Result(0, b"", b"")


def test_an_empty_standard_input_is_a_pipe_that_ends(shell: Path) -> None:
    assert run(shell, "readlink", "/proc/self/fd/0", stdin=b"").stdout.startswith(b"pipe:")
    assert run(shell, "cat", stdin=b"") == Result(0, b"", b"")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@settings(max_examples=13, deadline=None)
@given(data=st.binary(max_size=64), times=st.sampled_from([1, 1, 3, 200]))
@example(data=bytes(range(256)), times=1)
@example(data=bytes(range(256)), times=40)
@example(data=b"\0", times=5000)
@example(data=b"\n", times=5000)
@example(data=b"\\0101%s\\c\n", times=1)
@example(data=b"\xe2\n\xe2\x82", times=3000)
@example(data=b"\xe2\n", times=1)
@example(data=b"\xe2\\", times=1)
@example(data=b"\xc3\0\xf0\x9f\x98\x80\\", times=1)
def test_any_bytes_arrive_on_standard_input_and_then_it_ends(shell: Path, locale: str, data: bytes, times: int) -> None:
    environ = {"PATH": os.environ["PATH"], "LC_ALL": locale}
    assert run(shell, "cat", stdin=data * times, environ=environ) == Result(0, data * times, b"")


def test_a_large_standard_input_arrives(shell: Path) -> None:
    data = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(9_600))
    assert len(data) == 300 * 1024
    assert run(shell, "cat", stdin=data) == Result(0, data, b"")


def test_a_command_need_not_read_its_standard_input(shell: Path) -> None:
    assert run(shell, "sh", "-c", "exit 5", stdin=b"x" * 2_000_000) == Result(5, b"", b"")
    assert run(shell, "head", "-c", "1", stdin=b"x" * 2_000_000) == Result(0, b"x", b"")


# --- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stdin", [None, b"x" * 2_000_000], ids=["no-stdin", "unread-stdin"])
@pytest.mark.parametrize("how", ["end-of-stdin", "line"])
def test_hanging_up_kills_the_whole_process_group(shell: Path, how: str, stdin: bytes | None) -> None:
    script = "trap '' TERM; sleep 300 & echo $!; sh -c 'sleep 301 & echo $!; wait' & wait"
    with Program(shell) as program:
        program.go("sh", "-c", script, stdin=stdin)
        pids = [int(line) for line in program.lines(2)]
        assert all(alive(pid) for pid in pids)
        if how == "line":
            program.send(HANG_UP)
        else:
            program.close_stdin()
        assert all(gone(pid) for pid in pids)
        assert program.finish().code == -signal.SIGKILL


def test_a_command_has_the_grace_period_between_term_and_kill(shell: Path) -> None:
    script = """
    trap 'echo bye; exit 3' TERM
    (trap '' TERM; echo up; exec sleep 300) & echo $!
    wait
    """
    with Program(shell, grace=1) as program:
        program.go("sh", "-c", script)
        stubborn = next(int(line) for line in program.lines(2) if line != b"up")
        hung_up_at = time.monotonic()
        program.close_stdin()
        assert program.lines(3)[2] == b"bye"
        assert alive(stubborn)
        assert gone(stubborn)
        assert 0.9 < time.monotonic() - hung_up_at < 10
        program.finish()


def test_a_command_that_ends_by_itself_leaves_its_background_processes_alone(shell: Path) -> None:
    with Program(shell) as program:
        program.go("sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!")
        background = int(program.lines(1)[0])
        assert program.finish().code == 0
        assert members(program.id, program.process.pid) == {background}
        kill(background)
        assert gone(background)


def test_a_hang_up_after_the_commands_end_is_too_late_to_matter(shell: Path) -> None:
    with Program(shell) as program:
        program.go("sh", "-c", "exit 4")
        with contextlib.suppress(BrokenPipeError):
            program.send(HANG_UP)
        assert program.finish().code in (4, -signal.SIGKILL)


# --- the reaper -----------------------------------------------------------------------------------------------------


class Reaper:
    """The second program, beside a running first one."""

    def __init__(self, shell: Path, exec_id: str, ready: Ready, path: str) -> None:
        self._nonce = secrets.token_hex(8)
        self._process = subprocess.Popen(
            reaper_argv(exec_id, self._nonce, ready),
            executable=shell,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={"PATH": path},
        )

    def __enter__(self) -> Self:
        assert self._line() is None
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0

    def _line(self) -> Census | None:
        assert self._process.stdout is not None
        return parse_census(self._nonce, self._process.stdout.readline())

    def scan(self, order: str) -> Census:
        assert self._process.stdin is not None
        self._process.stdin.write(order.encode() + b"\n")
        self._process.stdin.flush()
        census = self._line()
        assert census is not None
        return census


ESCAPING = """
trap '' TERM
setsid sh -c 'echo $$; exec sleep 300' &
( (setsid sh -c 'echo $$; exec sleep 301' >&1 &) & )
echo $$
exec sleep 302
"""


@pytest.fixture(params=["tools", "no-tools"])
def path(request: pytest.FixtureRequest) -> str:
    """The reaper's $PATH: it is faster with some tools, and needs none."""
    return os.environ["PATH"] if request.param == "tools" else "/nosuch"


def kernel_thread() -> Path | None:
    """One that starts after most processes did, where kernel threads are visible."""
    threads = [path for path in Path("/proc").glob("[0-9]*") if not memory_of(path) and state_of(path) not in "ZX"]
    return max(threads, key=start_of, default=None)


def fields_of(process: Path) -> list[str]:
    """Fields of /proc/PID/stat from the third on, proc_pid_stat(5)."""
    with contextlib.suppress(OSError):
        return (process / "stat").read_text().rpartition(") ")[2].split()
    return ["X", *["0"] * 49]


def state_of(process: Path) -> str:
    return fields_of(process)[0]


def start_of(process: Path) -> int:
    return int(fields_of(process)[19])


def memory_of(process: Path) -> int:
    return int(fields_of(process)[20])


def test_a_kernel_thread_is_no_process_that_cannot_be_read(shell: Path, path: str) -> None:
    """They cannot be on some kernels (ESRCH), and a new one would make a verified kill an unverified one."""
    thread = kernel_thread()
    if thread is None:
        pytest.skip("no kernel thread is visible here")
    with Program(shell) as program:
        program.go("sleep", "300")
        with Reaper(shell, program.id, Ready(program.ready.pid, start_of(thread)), path) as reaper:
            # Other processes come and go; one that is just ending may count once.
            assert any(reaper.scan("LOOK").unreadable == 0 for _ in range(20))
        program.close_stdin()
        program.finish()


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any exec, but started after it."""
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as process:
        yield process
        process.kill()


def test_the_reaper_finds_and_kills_what_left_the_process_group(
    shell: Path, path: str, bystander: subprocess.Popen[bytes]
) -> None:
    with Program(shell) as other, Program(shell) as program:
        other.go("sleep", "300")
        program.go("sh", "-c", ESCAPING)
        pids = [int(line) for line in program.lines(3)]
        assert len({stat_of(pid)[3] for pid in pids}) == 3  # three sessions
        with Reaper(shell, program.id, program.ready, path) as reaper:
            census = reaper.scan("LOOK")
            assert census.command == 3
            assert census.wrapper == 2  # the shell that waits for the command, and the watcher
            assert not census.nothing_left
            assert reaper.scan("TERM").command == 3
            assert all(alive(pid) for pid in pids)
            assert reaper.scan("KILL").command == 3
            assert all(gone(pid) for pid in pids)
            assert program.finish().code == 128 + signal.SIGKILL
            last = reaper.scan("END")
            assert (last.command, last.wrapper) == (0, 0)
        assert bystander.poll() is None
        assert other.process.poll() is None
        with Reaper(shell, other.id, other.ready, path) as reaper:
            assert reaper.scan("LOOK").command == 1
            reaper.scan("END")
        assert other.finish().code == -signal.SIGKILL
        assert bystander.poll() is None


def test_looking_signals_nothing(shell: Path, path: str) -> None:
    script = "trap 'echo signalled' TERM HUP INT; echo up; while :; do sleep 0.01; done"
    with Program(shell) as program:
        program.go("sh", "-c", script)
        program.lines(1)
        with Reaper(shell, program.id, program.ready, path) as reaper:
            for _ in range(3):
                census = reaper.scan("LOOK")
                assert census.command >= 1
                assert census.wrapper == 2
            reaper.scan("anything else")
            assert program.process.poll() is None
            reaper.scan("END")
        assert program.finish() == Result(-signal.SIGKILL, b"up\n", b"")


def test_the_reapers_term_is_for_those_that_left_the_group(shell: Path, path: str) -> None:
    script = """
    trap 'echo inside' TERM
    setsid sh -c 'trap "echo outside; exit" TERM; echo up; while :; do sleep 0.01; done' &
    while :; do sleep 0.01; done
    """
    with Program(shell) as program:
        program.go("sh", "-c", script)
        program.lines(1)
        with Reaper(shell, program.id, program.ready, path) as reaper:
            reaper.scan("TERM")
            assert program.lines(2) == [b"up", b"outside"]
            reaper.scan("END")
        assert b"inside" not in program.finish().stdout


def test_the_reaper_finds_what_dropped_its_environment_but_stayed_in_the_session(shell: Path, path: str) -> None:
    with Program(shell) as program:
        program.go("env", "-i", tool("sh"), "-c", f"echo $$; exec {tool('sleep')} 300")
        pid = int(program.lines(1)[0])
        with Reaper(shell, program.id, program.ready, path) as reaper:
            assert reaper.scan("LOOK").command == 1
            reaper.scan("KILL")
            assert gone(pid)
            assert program.finish().code == 128 + signal.SIGKILL
            assert reaper.scan("LOOK").command == 0


def test_the_reaper_leaves_alone_what_is_older_than_the_exec(shell: Path, path: str) -> None:
    exec_id, no_such_pid = secrets.token_hex(8), 1 << 23
    with subprocess.Popen([tool("sleep"), "300"], env={EXEC_ID_VARIABLE: exec_id}) as older:
        started = int(stat_of(older.pid)[19])
        with Reaper(shell, exec_id, Ready(no_such_pid, started + 1), path) as reaper:
            assert reaper.scan("END").command == 0
        assert older.poll() is None
        with Reaper(shell, exec_id, Ready(no_such_pid, started), path) as reaper:
            assert reaper.scan("END").command == 1
        assert older.wait(PATIENCE) == -signal.SIGKILL


def test_all_of_it_works_without_any_tool(shell: Path, tmp_path: Path) -> None:
    (tmp_path / "cat").symlink_to(tool("cat"))
    environ = {"PATH": str(tmp_path)}
    data = bytes(range(256)) * 400
    assert run(shell, "cat", stdin=data, environ=environ) == Result(0, data, b"")
    with Program(shell, environ=environ) as program:
        program.go(
            tool("sh"), "-c", f"trap '' TERM; {tool('setsid')} {tool('sleep')} 300 & echo $!; exec {tool('sleep')} 301"
        )
        outside = int(program.lines(1)[0])
        program.close_stdin()
        with Reaper(shell, program.id, program.ready, str(tmp_path)) as reaper:
            assert reaper.scan("LOOK").command >= 1
            assert program.process.wait(PATIENCE) == -signal.SIGKILL  # the watcher counted the seconds of /proc/uptime
            assert alive(outside)
            assert reaper.scan("KILL").command == 1
            assert gone(outside)
            assert reaper.scan("LOOK").command == 0
        program.finish()


# --- what is read from the container --------------------------------------------------------------------------------


def test_the_handshake_is_read_from_pieces_of_any_size() -> None:
    handshake = Handshake("n0")
    said = [handshake.feed(bytes([byte])) for byte in b"motd\nn0 ready 17 900\nn0 started\nn0 started\nout"]
    assert [event for event in said if event is not None][:2] == [Ready(17, 900), Started(b"")]


def test_output_right_behind_the_handshake_is_not_lost() -> None:
    handshake = Handshake("n0")
    assert handshake.feed(b"n0 ready 1 2\nn0 started\nn0 ready 3 4\n\xff\0") == Ready(1, 2)
    assert handshake.feed(b"") == Started(b"n0 ready 3 4\n\xff\0")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("command_not_found", "command_not_found"),
        ("cwd_not_found", "cwd_not_found"),
        ("not_executable", "start_failed"),
        ("never_heard_of", "start_failed"),
    ],
)
def test_a_failure_to_start_has_its_reason(word: str, reason: str) -> None:
    with pytest.raises(ExecStartError) as failure:
        Handshake("n0").feed(f"n0 failed {word}\n".encode())
    assert failure.value.reason == reason
    assert failure.value.message


@pytest.mark.parametrize(
    "line",
    [b"", b"ready", b"ready 1", b"ready 1 2 3", b"ready -1 2", b"ready 1 x", b"ready " + b"1" * 5000 + b" 1", b"hi"],
)
def test_a_line_that_the_wrapper_never_prints_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="does not know"):
        Handshake("n0").feed(b"n0 " + line + b"\n")


def test_endless_noise_before_the_handshake_is_a_protocol_error() -> None:
    handshake = Handshake("n0")
    assert handshake.feed(b"x" * MAX_HANDSHAKE_BYTES) is None
    with pytest.raises(RemoteCommandProtocolError, match="without end"):
        handshake.feed(b"x")


_words = st.sampled_from(
    [b"n0 ", b"ready ", b"started", b"failed ", b"cwd_not_found", b"\n", b" ", b"9" * 4400, b"12 "]
)


@settings(max_examples=150)
@given(st.lists(st.binary(max_size=8) | _words, max_size=12))
@example([b"n0 ready ", b"9" * 4400, b" 1\n"])
@example([b"n0 failed \xff\n"])
def test_arbitrary_output_raises_nothing_but_the_two_errors_of_a_handshake(pieces: list[bytes]) -> None:
    handshake = Handshake("n0")
    for piece in pieces:
        try:
            said = handshake.feed(piece)
        except (ExecStartError, RemoteCommandProtocolError):
            return
        if isinstance(said, Started):
            return


@pytest.mark.parametrize(
    ("line", "census"),
    [(b"n0 0 0 0\n", Census(0, 0, 0)), (b"n0 3 2 1", Census(3, 2, 1)), (b" n0  1 0 0 \r\n", Census(1, 0, 0))],
)
def test_a_census_is_read(line: bytes, census: Census) -> None:
    assert parse_census("n0", line) == census


def test_the_reapers_greeting_is_no_census() -> None:
    assert parse_census("n0", b"n0 ready\n") is None


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"n0",
        b"n0 noproc\n",
        b"n0 1 2\n",
        b"n0 1 2 3 4\n",
        b"n1 0 0 0\n",
        b"n1 ready\n",
        b"n0 -1 0 0\n",
        b"n0 x 0 0\n",
        "n0 \u0661 0 0\n".encode(),
        b"n0 0 0 " + b"0" * 5000,
        b"\xff",
    ],
)
def test_anything_else_is_no_proof_that_nothing_is_left(line: bytes) -> None:
    with pytest.raises(RemoteCommandProtocolError, match="nothing can be verified"):
        parse_census("n0", line)


@settings(max_examples=150)
@given(st.binary(max_size=30) | st.lists(_words, max_size=5).map(b"".join))
def test_an_arbitrary_census_raises_nothing_but_a_protocol_error(line: bytes) -> None:
    for text in (line, b"n0 " + line):
        with contextlib.suppress(RemoteCommandProtocolError):
            census = parse_census("n0", text)
            assert census is None or min(census.command, census.wrapper, census.unreadable) >= 0


@pytest.mark.parametrize("census", [Census(1, 0, 0), Census(0, 1, 0), Census(0, 0, 1)])
def test_only_a_census_of_nothing_is_proof(census: Census) -> None:
    assert not census.nothing_left
    assert Census(0, 0, 0).nothing_left


_ESCAPE = re.compile(rb"\\(\\|n|0[0-7]{3})")


def unescape(data: bytes) -> bytes:
    """Do what ``printf %b`` does with the escapes that are used."""
    plain = {b"\\": b"\\", b"n": b"\n"}
    return _ESCAPE.sub(lambda match: plain.get(match[1]) or bytes([int(match[1], 8)]), data)


@settings(max_examples=200)
@given(st.binary() | st.text().map(str.encode))
@example(bytes(range(256)))
@example("ü\0\n\\0101".encode())
def test_escaped_bytes_are_one_line_of_utf8_without_nul_and_mean_the_same(data: bytes) -> None:
    escaped = escape_bytes(data)
    assert b"\n" not in escaped
    assert b"\0" not in escaped
    escaped.decode()
    assert unescape(escaped) == data


@settings(max_examples=100)
@given(
    st.lists(_texts, min_size=1, max_size=4), st.dictionaries(st.sampled_from("AB_"), _texts), st.none() | st.binary()
)
def test_a_payload_has_a_line_for_everything_in_it(
    argv: Sequence[str], env: Mapping[str, str], stdin: bytes | None
) -> None:
    payload = go_payload("n0", argv, env=env, stdin=stdin)
    assert b"\0" not in payload
    assert payload.endswith(b"\n")
    gate, count, *rest = payload.removesuffix(b"\n").split(b"\n")
    assert gate == b"n0 go"
    entries, tail = rest[: int(count)], rest[int(count) :]
    assert len(entries) == int(count)
    assert all(entry[:1] in (b"=", b"%") for entry in entries)
    assert b"=--" in entries
    if stdin is None:
        assert tail == [b"-"]
    else:
        assert tail == [b"stdin %d" % (len(tail[1]) + 1), escape_bytes(stdin) + b"n0"]


@pytest.mark.parametrize("stdin", [None, b"x"], ids=["no-stdin", "stdin"])
@pytest.mark.parametrize("name", ["TERM", "HUP", "INT", "QUIT", "USR1", "USR2", "ALRM"])
def test_a_signal_to_its_own_group_that_a_command_survives_ends_nothing_else(
    shell: Path, name: str, stdin: bytes | None
) -> None:
    """``trap 'kill 0' EXIT`` is an everyday idiom, and the wrapper is of that group, too."""
    script = f"trap '' {name}; kill -s {name} 0; sleep 0.3; echo on; exit 3"
    result = run(shell, "sh", "-c", script, stdin=stdin)
    assert (result.code, result.stdout) == (3, b"on\n")


def test_a_command_that_terms_its_own_group_ends_with_143(shell: Path) -> None:
    assert run(shell, "sh", "-c", "trap 'kill 0' EXIT; sleep 300 & exit 0").code == 143


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT", "USR1"])
def test_hanging_up_still_kills_after_a_signal_to_the_whole_group(shell: Path, name: str) -> None:
    with Program(shell) as program:
        program.go("sh", "-c", f"trap '' TERM {name}; sleep 0.2; kill -s {name} 0; echo $$; exec sleep 300")
        pid = int(program.lines(1)[0])
        assert alive(pid)
        program.close_stdin()
        assert gone(pid, 5)
        program.finish()
