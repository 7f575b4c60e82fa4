"""The settings: parsed purely from a mapping, every problem reported at once."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from session_proxy.errors import ConfigError
from session_proxy.ownership import OwnerMode
from session_proxy.policy import Level, validate_image_prefix

SHOWN_VALUE_CHARACTERS = 60
"""How much of a wrong value an error repeats."""

MAX_LABEL_VALUE = 63
"""Kubernetes' limit on a label value and on a DNS label."""

MAX_SUBDOMAIN = 253
"""Kubernetes' limit on most object names."""

T = TypeVar("T")


class Wrapper(StrEnum):
    """What runs in the container around a command."""

    SH = "sh"
    NONE = "none"


class LogFormat(StrEnum):
    """How log lines look."""

    JSON = "json"
    CONSOLE = "console"


class LogLevel(StrEnum):
    """Least severe line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, valid. Seconds and bytes where a name ends so."""

    session_name: str
    namespace: str | None
    listen_addr: tuple[str, int]
    listen_socket: str | None
    listen_socket_uids: tuple[int, ...]
    listen_token_file: str | None
    max_concurrent_execs: int
    exec_timeout_seconds: float
    exec_timeout_max_seconds: float
    workspace_selector: str
    workspace_pod: str | None
    workspace_container: str
    owner_mode: OwnerMode
    owner_uid: str | None
    pod_name: str | None
    pod_uid: str | None
    pod_security_level: Level
    allowed_images: tuple[str, ...]
    require_image_digest: bool
    exec_rate_per_second: float
    exec_burst: int
    max_output_bytes: int
    max_request_bytes: int
    heartbeat_seconds: float
    stall_seconds: float
    kill_grace_seconds: float
    drain_seconds: float
    wrapper: Wrapper
    log_level: LogLevel
    log_format: LogFormat
    log_commands: bool


class InvalidValueError(ValueError):
    """Why a value is wrong, as the end of the sentence ``NAME must be ...``."""


def _text(text: str) -> str:
    return text


_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", re.ASCII)
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)
_SELECTOR = re.compile(r"[A-Za-z0-9._/-]+(=|==|!=)[A-Za-z0-9._-]*|!?[A-Za-z0-9._/-]+", re.ASCII)


def _label_value(text: str) -> str:
    if len(text) > MAX_LABEL_VALUE or not _LABEL_VALUE.fullmatch(text):
        raise InvalidValueError(
            "a label value: at most 63 letters, digits, '-', '_' and '.', beginning and ending with one"
        )
    return text


def shown(text: str) -> str:
    """Return a wrong value as an error repeats it, quoted and shortened."""
    return repr(text if len(text) <= SHOWN_VALUE_CHARACTERS else text[:SHOWN_VALUE_CHARACTERS] + "…")


def dns_label(text: str) -> str:
    """Return the text when it is a DNS label (RFC 1123). Raises InvalidValueError."""
    if len(text) > MAX_LABEL_VALUE or not _DNS_LABEL.fullmatch(text):
        raise InvalidValueError("a DNS label: at most 63 lower-case letters, digits and '-'")
    return text


def _pod_name(text: str) -> str:
    if len(text) > MAX_SUBDOMAIN or not _DNS_SUBDOMAIN.fullmatch(text):
        raise InvalidValueError("a pod's name: at most 253 lower-case letters, digits, '-' and '.'")
    return text


def _selector(text: str) -> str:
    if not all(_SELECTOR.fullmatch(part.strip()) for part in text.split(",")):
        raise InvalidValueError("a label selector such as session=demo,type=workspace")
    return text


def _uid(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,128}", text, re.ASCII):
        raise InvalidValueError("an object's metadata.uid, such as 1f0e2c7a-7a7e-4d59-9f1b-0d6a0f1c2b3d")
    return text


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII) else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (above and value == low):
            raise InvalidValueError(
                f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
            )
        return value

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[0-9]{1,15}", text, re.ASCII) else None
        if value is None or not low <= value <= high:
            raise InvalidValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def _boolean(text: str) -> bool:
    match text.lower():
        case "true" | "1" | "yes":
            return True
        case "false" | "0" | "no":
            return False
    raise InvalidValueError("true or false")


E = TypeVar("E", bound=StrEnum)


def _choice(kind: type[E]) -> Callable[[str], E]:
    def parse(text: str) -> E:
        try:
            return kind(text.lower())
        except ValueError:
            raise InvalidValueError("one of " + ", ".join(kind)) from None

    return parse


def _listen_addr(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    wrong = InvalidValueError(
        "a loopback address and port such as 127.0.0.1:8080, [::1]:8080 or :8080 (no other is listened on)"
    )
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or int(port) > 65_535:  # noqa: PLR2004
        raise wrong
    if host in ("", "localhost"):
        return "127.0.0.1", int(port)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise wrong from None
    if not address.is_loopback:
        raise wrong
    return str(address), int(port)


def _absolute_path(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise InvalidValueError("an absolute path")
    return text


def _uids(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,10}", part, re.ASCII) for part in parts):
        raise InvalidValueError("numeric user ids, separated by commas")
    return tuple(int(part) for part in parts)


def _images(text: str) -> tuple[str, ...]:
    prefixes = tuple(part.strip() for part in text.split(",") if part.strip())
    for prefix in prefixes:
        if problem := validate_image_prefix(prefix):
            raise InvalidValueError(f"registry or repository prefixes, separated by commas ({problem})")
    return prefixes


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """One setting: its variable, how to read it, its default as text (None: no default) and what it is for."""

    variable: str
    parse: Callable[[str], T]
    default: str | None
    help: str

    @property
    def flag(self) -> str:
        """The same on the command line."""
        return "--" + self.variable.lower().replace("_", "-")

    @property
    def field(self) -> str:
        """The field of Config."""
        return self.variable.lower()


_DAY = 86_400
_GIB = 1 << 30

SETTINGS: tuple[Setting[Any], ...] = (
    Setting("SESSION_NAME", _label_value, None, "label value of this session (required)"),
    Setting("NAMESPACE", dns_label, None, "namespace of the workspace (default: the service account's own)"),
    Setting("LISTEN_ADDR", _listen_addr, "127.0.0.1:8080", "loopback address and port to listen on"),
    Setting("LISTEN_SOCKET", _absolute_path, None, "also listen on this Unix socket (mode 0660)"),
    Setting("LISTEN_SOCKET_UIDS", _uids, None, "user ids that may use the Unix socket (default: whoever can open it)"),
    Setting("LISTEN_TOKEN_FILE", _absolute_path, None, "file with a bearer token that every request must carry"),
    Setting("MAX_CONCURRENT_EXECS", _integer(1, 10_000), "10", "execs that may run at once"),
    Setting("EXEC_TIMEOUT_SECONDS", _number(0, 30 * _DAY, above=True), "600", "timeout of a request that names none"),
    Setting(
        "EXEC_TIMEOUT_MAX_SECONDS", _number(0, 30 * _DAY, above=True), "3600", "longest timeout a request may name"
    ),
    Setting(
        "WORKSPACE_SELECTOR",
        _selector,
        None,
        "label selector of the workspace pod (default: session={SESSION_NAME},type=workspace)",
    ),
    Setting("WORKSPACE_POD", _pod_name, None, "name of the workspace pod, instead of a selector"),
    Setting("WORKSPACE_CONTAINER", dns_label, "workspace", "container to run commands in"),
    Setting(
        "OWNER_MODE",
        _choice(OwnerMode),
        None,
        "how the workspace must be owned: uid (default with OWNER_UID), self, sibling or none; required",
    ),
    Setting("OWNER_UID", _uid, None, "UID of the owner, for OWNER_MODE=uid"),
    Setting("POD_NAME", _pod_name, None, "name of this pod (downward API), for OWNER_MODE=sibling"),
    Setting("POD_UID", _uid, None, "UID of this pod (downward API), for OWNER_MODE=self and sibling"),
    Setting("POD_SECURITY_LEVEL", _choice(Level), "restricted", "Pod Security Standard that the workspace must meet"),
    Setting(
        "ALLOWED_IMAGES", _images, "", "registry or repository prefixes the workspace's images must have (default: any)"
    ),
    Setting("REQUIRE_IMAGE_DIGEST", _boolean, "false", "whether images must be pinned by digest"),
    Setting("EXEC_RATE_PER_SECOND", _number(0, 10_000, above=True), "20", "requests admitted a second, on average"),
    Setting("EXEC_BURST", _integer(1, 100_000), "40", "requests admitted at once"),
    Setting("MAX_OUTPUT_BYTES", _integer(0, 1024 * _GIB), "0", "output after which any exec is ended (0: no limit)"),
    Setting("MAX_REQUEST_BYTES", _integer(1024, 64 << 20), "4194304", "largest request body"),
    Setting("HEARTBEAT_SECONDS", _number(0.1, 3600), "15", "silence after which client and API server are pinged"),
    Setting("STALL_SECONDS", _number(0.1, _DAY), "60", "a reader that takes nothing for so long loses its exec"),
    Setting("KILL_GRACE_SECONDS", _number(0, 300), "2", "from TERM to KILL"),
    Setting("DRAIN_SECONDS", _number(0.1, 3600), "8", "from SIGTERM to the end, at the latest"),
    Setting("WRAPPER", _choice(Wrapper), "sh", "sh, or none for images without a shell"),
    Setting("LOG_LEVEL", _choice(LogLevel), "info", "debug, info, warning or error"),
    Setting("LOG_FORMAT", _choice(LogFormat), "json", "json or console"),
    Setting("LOG_COMMANDS", _boolean, "false", "whether the audit log holds whole commands"),
)
"""Every setting, in the order of the README's table. An empty value counts as unset."""


def parse_config(values: Mapping[str, str]) -> Config:
    """Read the settings from a mapping of variables. Raises ConfigError with all problems, a sentence each."""
    problems: list[str] = []
    fields: dict[str, Any] = {}
    for setting in SETTINGS:
        text = values.get(setting.variable, "").strip() or setting.default
        fields[setting.field] = None
        if text is None:
            continue
        try:
            fields[setting.field] = setting.parse(text)
        except InvalidValueError as error:
            problems.append(f"{setting.variable} is {shown(text)}; it must be {error}")
    problems += _across(values, fields)
    if problems:
        raise ConfigError(problems)
    if fields["workspace_selector"] is None:
        fields["workspace_selector"] = f"session={fields['session_name']},type=workspace"
    return Config(
        **{name: value for name, value in fields.items() if value is not None or name in _OPTIONAL} | _lists(fields)
    )


_OPTIONAL = frozenset(
    {"namespace", "listen_socket", "listen_token_file", "workspace_pod", "owner_uid", "pod_name", "pod_uid"}
)


def _lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] or () for name in ("listen_socket_uids", "allowed_images")}


def _across(values: Mapping[str, str], fields: dict[str, Any]) -> list[str]:
    """Check what concerns more than one setting, where each alone was readable; fills in OWNER_MODE."""
    problems: list[str] = []

    def is_set(name: str) -> bool:
        return bool(values.get(name, "").strip())

    if not is_set("SESSION_NAME"):
        problems.append("SESSION_NAME is not set; it must be the label value of this session")
    if is_set("WORKSPACE_SELECTOR") and is_set("WORKSPACE_POD"):
        problems.append("WORKSPACE_SELECTOR and WORKSPACE_POD are both set; give one of them")
    if is_set("LISTEN_SOCKET_UIDS") and not is_set("LISTEN_SOCKET"):
        problems.append("LISTEN_SOCKET_UIDS is set without LISTEN_SOCKET; TCP peers have no user id to check")
    default, longest = fields["exec_timeout_seconds"], fields["exec_timeout_max_seconds"]
    if default is not None and longest is not None and default > longest:
        problems.append(
            f"EXEC_TIMEOUT_SECONDS is {default:g}; it must be at most EXEC_TIMEOUT_MAX_SECONDS, which is {longest:g}"
        )
    if not is_set("OWNER_MODE"):
        if is_set("OWNER_UID"):
            fields["owner_mode"] = OwnerMode.UID
        else:
            problems.append(
                "OWNER_MODE is not set; it must be uid (with OWNER_UID), self (with POD_UID), sibling (with POD_NAME "
                "and POD_UID), or none, which runs commands in any pod that the selector matches"
            )
    needs = {OwnerMode.UID: ("OWNER_UID",), OwnerMode.SELF: ("POD_UID",), OwnerMode.SIBLING: ("POD_NAME", "POD_UID")}
    mode = fields["owner_mode"]
    problems.extend(
        f"{name} is not set; OWNER_MODE={mode} needs it" for name in needs.get(mode, ()) if not is_set(name)
    )
    return problems
