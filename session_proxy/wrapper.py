r"""The small program that runs inside the workspace container, and the bytes that drive it.

Dropping an exec connection kills nothing (kubernetes/kubernetes#89031), and pods/exec has no precondition on the pod's
UID. So a command does not run bare: a POSIX ``sh`` program starts first, says that it is alive, waits for ``go``, and
from then on watches the exec's standard input. Any line there, or its end (the sidecar half-closed it, dropped the
connection, or was killed), means TERM, the grace period, KILL for the command's process group.

The program works with busybox ash, dash and bash, and needs nothing but shell built-ins and ``kill``; ``head`` and
``sleep`` are used when the image has them. The command never travels in the exec URL, so it is in no audit log and is
never bound by the size of a header; it comes over standard input once the gate is open, as lines that the program
``read``\ s and never evaluates::

    <nonce> go
    <number of entries>
    entry...            the working directory ("" for none), NAME=value..., "--", argv...
    - | stdin <bytes>   whether the command has standard input, and the length of the next line
    escaped bytes and the nonce

An entry is ``=`` and the text as it is, or, where it holds a newline, ``%`` and the text in ``printf %b`` escapes.

The program answers on standard output, each line led by the nonce: ``ready PID STARTTIME`` before the gate, then
``started``, or ``failed REASON`` when nothing was run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from session_proxy.errors import ExecStartError, RemoteCommandProtocolError

EXEC_ID_VARIABLE = "SESSION_PROXY_EXEC_ID"
"""Environment variable that every process of a command carries; how the reaper finds those that called setsid."""

MAX_ARGUMENT_BYTES = 131_071
"""Longest single argument or environment entry Linux accepts (MAX_ARG_STRLEN, 32 pages, less the final NUL)."""

MAX_HANDSHAKE_BYTES = 65_536
"""How much output before the program's own lines (a noisy shell start-up file) is skipped."""

SHELL_OWNED_VARIABLES = frozenset(
    {
        "BASHOPTS",
        "BASHPID",
        "BASH_ARGC",
        "BASH_ARGV",
        "BASH_CMDS",
        "BASH_COMMAND",
        "BASH_ALIASES",
        "BASH_LINENO",
        "BASH_MONOSECONDS",
        "BASH_SOURCE",
        "BASH_SUBSHELL",
        "BASH_TRAPSIG",
        "BASH_VERSINFO",
        "DIRSTACK",
        "EPOCHREALTIME",
        "EPOCHSECONDS",
        "EUID",
        "FUNCNAME",
        "GROUPS",
        "HISTCMD",
        "IFS",
        "LINENO",
        "OPTIND",
        "PIPESTATUS",
        "PPID",
        "RANDOM",
        "SECONDS",
        "SHELLOPTS",
        "SRANDOM",
        "UID",
        "_",
    }
)
"""Names that some shell will not let anyone assign freely; these are set by env(1) instead."""

_OWN_VARIABLE = re.compile(r"_p[a-z0-9]+", re.ASCII)
"""The program's own variables: to export a namesake would change the program, so these too are set by env(1)."""

_PROCESS_TITLE = "session-proxy-exec:"

# Both programs keep the exec's standard error open as descriptor 4: once either output ends, containerd closes the
# exec's standard input.

# $0 title:id, $1 nonce, $2 grace in whole seconds. Variables start with _p so as not to change the command's own.
# A busybox built to prefer its own applets to $PATH (it finds cat where none is) gets the whole path of the command, or
# exec would run an applet of that name.
_WRAPPER_SOURCE = r"""
_pn=$1 _pg=$2 _pk= _ps=0
exec 3<&0 4>&2 </dev/null 2>/dev/null
trap : HUP INT QUIT USR1 USR2 ALRM TERM
trap _pk=1 URG
export SESSION_PROXY_EXEC_ID="${0#*:}"
{ read -r _ps <"/proc/$$/stat" && _ps=${_ps##*) } && set -- $_ps && _ps=${20}; } || _ps=0
echo "$_pn ready $$ $_ps"
line() { IFS= read -r _pl <&3 || exit 125; }
say() { echo "$_pn failed $1"; exit 125; }
line
[ "$_pl" = "$_pn go" ] || exit 125
line
_pc=$_pl
set --
while [ "$_pc" -gt 0 ]; do
  _pb=0 _pa=
  while [ "$_pb" -lt 999 ] && [ "$_pc" -gt 0 ]; do
    line
    case $_pl in
    %*) _pv=$(printf '%bx' "${_pl#%}"); _pv=${_pv%x} ;;
    *) _pv=${_pl#=} ;;
    esac
    eval "_p$_pb=\$_pv"
    _pa="$_pa \"\$_p$_pb\""
    _pb=$((_pb+1)) _pc=$((_pc-1))
  done
  eval "set -- \"\$@\" $_pa"
done
line
_pi=$_pl _pd=
case $_pi in
stdin*)
  _pc=${_pi#* }
  if [ "$_pc" -gt 4096 ] && command -v head >/dev/null; then _pd=$(head -c "$_pc" <&3); else line; _pd=$_pl; fi
  case $_pd in *"$_pn") _pd=${_pd%"$_pn"} ;; *) exit 125 ;; esac ;;
esac
[ -z "$1" ] || cd -P -- "$1" || say cwd_not_found
shift
watch() {
  trap '' HUP INT QUIT USR1 USR2 ALRM TERM
  SESSION_PROXY_EXEC_ID=watch$SESSION_PROXY_EXEC_ID
  IFS= read -r _pl <&3
  trap 'kill -s KILL -- "-$$"' EXIT
  kill -s URG "$$"
  kill -s TERM -- "-$$"
  if command -v sleep >/dev/null; then sleep "$_pg.5" || sleep "$((_pg+1))"; else
    read -r _pa _pb </proc/uptime; _pc=$((${_pa%.*}+_pg))
    while read -r _pa _pb </proc/uptime && [ "${_pa%.*}" -le "$_pc" ]; do :; done
  fi
  kill -s KILL -- "-$$"
}
run() {
  exec 3<&-
  until [ "$1" = -- ]; do export "$1"; shift; done
  shift
  exec 2>&4 4>&-
  case $1 in
  */*) _pa=$1 ;;
  *) _pa= _pb=
    set -f; IFS=:
    for _pc in $PATH; do
      _pc=${_pc:-.}/$1
      [ -f "$_pc" ] || continue
      if [ -x "$_pc" ]; then _pa=$_pc; break; fi
      _pb=$_pc
    done
    unset IFS; set +f
    _pa=${_pa:-$_pb} ;;
  esac
  [ -n "$_pa" ] && [ -e "$_pa" ] || say command_not_found
  [ -f "$_pa" ] && [ -x "$_pa" ] || say not_executable
  echo "$_pn started"
  case $1 in -*) _pb=1 ;; *) _pb= ;; esac
  if [ -n "$_pb" ] || PATH=/dev/null command -v cat >/dev/null 2>&1; then shift; set -- "$_pa" "$@"; fi
  exec "$@"
}
watch >/dev/null 4>&- &
_pw=$!
if [ "$_pi" = - ]; then (run "$@"); else printf %b "$_pd" 3<&- 4>&- | (run "$@"); fi
_pc=$?
[ -n "$_pk" ] || kill -s KILL "$_pw"
wait "$_pw"
exit "$_pc"
"""

# What is older than the wrapper cannot be the command's, nor what has no memory: a process that has just ended, or a
# kernel thread (where they are visible, new ones appear at any time and cannot be read). Reading with built-ins takes a
# system call a byte; where the image has grep, that finds what is worth reading, and only the wrapper's own session is
# read further.
#
# $0 nonce, $1 exec id, $2 the wrapper's pid, $3 its start time in clock ticks. One line in, one scan, one line out:
# "<nonce> <processes of the command> <the wrapper's own> <that cannot be read>". TERM leaves the wrapper's own group
# out (the wrapper signals it), KILL leaves out the wrapper's first process (it reaps its child and then ends by itself;
# PID 1 of a container often reaps nobody), END leaves out nothing, LOOK signals nothing.
_REAPER_SOURCE = r"""
exec 4>&2 2>/dev/null
has() {
  while IFS= read -r l || [ -n "$l" ]; do case $l in *"$1"*) return 0 ;; esac; done
  return 1
}
marked() {
  if [ -n "$grep" ]; then case $nl$marked$nl in *"$nl$d/environ$nl"*) return 0 ;; *) return 1 ;; esac; fi
  has "SESSION_PROXY_EXEC_ID=$id" <"$d/environ"
}
look() {
  set -- $t
  [ "$1" != Z ] && [ "$1" != X ] && [ "${20}" -ge "$begin" ] && [ "${21}" != 0 ] || return
  if marked; then :
  elif [ "$p" = "$leader" ] || [ "$4" = "$leader" ]; then
    if has "session-proxy-exec:$id" <"$d/cmdline" || has "SESSION_PROXY_EXEC_ID=watch$id" <"$d/environ"; then
      own=$((own+1))
      case $signal in
      KILL) [ "$p" = "$leader" ] || kill -s KILL "$p" ;;
      END) kill -s KILL "$p" ;;
      esac
      return
    fi
    ! has SESSION_PROXY_EXEC_ID= <"$d/environ" || return
  else
    { true <"$d/environ"; } || [ ! -d "$d" ] || unread=$((unread+1))
    return
  fi
  cmd=$((cmd+1))
  case $signal in
  KILL | END) kill -s KILL "$p" ;;
  TERM) [ "$3" = "$leader" ] || kill -s TERM "$p" ;;
  esac
}
nonce=$0 id=$1 leader=$2 begin=$3
nl='
'
grep=$(command -v grep)
[ -r /proc/self/stat ] || { echo "$nonce noproc"; exit; }
echo "$nonce ready"
while read -r signal; do
  cmd=0 own=0 unread=0 all='/proc/[0-9]*'
  if [ -n "$grep" ]; then
    marked=$(grep -ls "SESSION_PROXY_EXEC_ID=$id" /proc/[0-9]*/environ)
    near=$(grep -lsE "\) [^ZX] [0-9]+ [0-9]+ $leader " /proc/[0-9]*/stat)
    all=$(grep -lsE "\) [^ZX] " /proc/[0-9]*/stat)
  fi
  for d in $all; do
    d=${d%/stat} t=
    p=${d#/proc/}
    [ "$p" != $$ ] || continue
    if [ -n "$grep" ]; then
      case $nl$marked$nl$near$nl in
      *"$nl$d/environ$nl"* | *"$nl$d/stat$nl"*) ;;
      *) ! true <"$d/environ" || continue ;;
      esac
    fi
    while IFS= read -r l; do t=$l; done <"$d/stat"
    t=${t##*) }
    [ -z "$t" ] || look
  done
  echo "$nonce $cmd $own $unread"
done
"""


def _compact(source: str) -> str:
    """Strip indentation and blank lines: the program is part of the exec URL, which must stay short."""
    return "\n".join(line.strip() for line in source.splitlines() if line.strip())


_WRAPPER = _compact(_WRAPPER_SOURCE)
_REAPER = _compact(_REAPER_SOURCE)


def wrapper_argv(exec_id: str, nonce: str, grace_seconds: float) -> list[str]:
    """Return the argv that starts the program for one exec. ``grace_seconds`` is rounded up to whole seconds.

    The program's own KILL comes half a second later still, for when nobody else is there to send one. The reaper's is
    better: it lets the program reap its child, where PID 1 of a container often reaps nobody.
    """
    return ["sh", "-c", _WRAPPER, _PROCESS_TITLE + exec_id, nonce, str(max(0, -int(-grace_seconds // 1)))]


def reaper_argv(exec_id: str, nonce: str, ready: "Ready") -> list[str]:
    """Return the argv that starts the scan for what is left of an exec."""
    return ["sh", "-c", _REAPER, nonce, exec_id, str(ready.pid), str(ready.start_time)]


_B_ESCAPES = {bytes([byte]): b"\\0%03o" % byte for byte in (0, *range(128, 256))} | {b"\n": b"\\n", b"\\": b"\\\\"}
_B_SPECIAL = re.compile(rb"[\x00\n\\]")
_B_SPECIAL_OR_HIGH = re.compile(rb"[\x00\n\\\x80-\xff]")


def escape_bytes(data: bytes) -> bytes:
    """Escape bytes for ``printf %b`` so that they hold no newline, no NUL, and nothing that is not UTF-8.

    bash reads and prints by characters of its locale, and garbles bytes that are none.
    """
    try:
        data.decode()
        special = _B_SPECIAL
    except UnicodeDecodeError:
        special = _B_SPECIAL_OR_HIGH
    return special.sub(lambda match: _B_ESCAPES[match.group()], data)


def _entry(text: str) -> bytes:
    data = text.encode()
    return b"%" + escape_bytes(data) if b"\n" in data else b"=" + data


def _is_owned(name: str) -> bool:
    return name in SHELL_OWNED_VARIABLES or _OWN_VARIABLE.fullmatch(name) is not None


def go_payload(
    nonce: str,
    argv: Sequence[str],
    *,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> bytes:
    """Return what opens the gate: everything the program reads from standard input, in one piece.

    No string may hold NUL (the request parser sees to that).
    """
    environment = dict(env or {})
    owned = {name: environment.pop(name) for name in list(environment) if _is_owned(name)}
    command = ["env", *(f"{name}={value}" for name, value in owned.items()), *argv] if owned else list(argv)
    entries = [cwd or "", *(f"{name}={value}" for name, value in environment.items()), "--", *command]
    lines = [f"{nonce} go".encode(), str(len(entries)).encode(), *map(_entry, entries)]
    if stdin is None:
        lines.append(b"-")
    else:
        body = escape_bytes(stdin) + nonce.encode()
        # One more than the body: its newline, so that head(1) takes the whole line.
        lines += [f"stdin {len(body) + 1}".encode(), body]
    return b"\n".join(lines) + b"\n"


_COUNT = re.compile(rb"[0-9]{1,19}")
"""A number as the programs print it. It comes from a container that nobody vouches for, so it has a length."""

HANG_UP = b"\n"
"""A line after the payload: the same to the program as the end of standard input, which v4 cannot signal."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The program is alive in the container and waits: its process id there and its start time in clock ticks."""

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class Started:
    """The command was started; ``output`` is the first of its standard output."""

    output: bytes


_START_FAILURES = {
    "command_not_found": ("command_not_found", "the command was not found in the container"),
    "cwd_not_found": ("cwd_not_found", "the working directory does not exist in the container or cannot be entered"),
    "not_executable": ("start_failed", "the command is not an executable file (permission denied)"),
}


class Handshake:
    """Reads the program's own lines off the front of standard output. No sockets here: bytes in, events out."""

    def __init__(self, nonce: str) -> None:
        self._mark = nonce.encode() + b" "
        self._buffer = b""

    def feed(self, data: bytes) -> Ready | Started | None:
        """Take output; return what the program said, or None while its line is incomplete.

        Call it until it returns ``Started``; after ``Ready`` call it again with ``b""`` in case more had arrived.

        Raises ExecStartError when the program says that it ran nothing, and RemoteCommandProtocolError when more than
        MAX_HANDSHAKE_BYTES arrive without one of its lines.
        """
        self._buffer += data
        start = self._buffer.find(self._mark)
        end = self._buffer.find(b"\n", start) if start >= 0 else -1
        if end < 0:
            if len(self._buffer) > MAX_HANDSHAKE_BYTES:
                raise RemoteCommandProtocolError(
                    f"no line of the wrapper within {MAX_HANDSHAKE_BYTES} bytes of output; "
                    "something in the image's sh start-up prints without end"
                )
            return None
        words = self._buffer[start:end].split()
        self._buffer = self._buffer[end + 1 :]
        match words[1:]:
            case [b"ready", pid, start_time] if _COUNT.fullmatch(pid) and _COUNT.fullmatch(start_time):
                return Ready(int(pid), int(start_time))
            case [b"started"]:
                output, self._buffer = self._buffer, b""
                return Started(output)
            case [b"failed", reason]:
                raise ExecStartError(
                    *_START_FAILURES.get(reason.decode(errors="replace"), ("start_failed", "the wrapper gave up"))
                )
        raise RemoteCommandProtocolError("the wrapper printed a line that this version does not know")


@dataclass(frozen=True, slots=True)
class Census:
    """What one scan of /proc found: processes of the command, of the wrapper itself, and unreadable newer ones."""

    command: int
    wrapper: int
    unreadable: int

    @property
    def nothing_left(self) -> bool:
        """Whether it is certain that no process of the command is left."""
        return not (self.command or self.wrapper or self.unreadable)


def parse_census(nonce: str, line: bytes) -> Census | None:
    """Parse a line of the reaper; None for its greeting. Raises RemoteCommandProtocolError for anything else."""
    match line.split():
        case [mark, b"ready"] if mark == nonce.encode():
            return None
        case [mark, *counts] if mark == nonce.encode() and len(counts) == 3 and all(map(_COUNT.fullmatch, counts)):  # noqa: PLR2004
            return Census(*map(int, counts))
    raise RemoteCommandProtocolError("the container's /proc cannot be read, so nothing can be verified")
