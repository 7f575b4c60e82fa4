"""Settings: each one's good and bad values, and every problem at once."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from session_proxy.config import SETTINGS, SHOWN_VALUE_CHARACTERS, Config, LogFormat, LogLevel, Wrapper, parse_config
from session_proxy.errors import ConfigError
from session_proxy.ownership import OwnerMode
from session_proxy.policy import Level

UID = "1f0e2c7a-7a7e-4d59-9f1b-0d6a0f1c2b3d"
MINIMUM = {"SESSION_NAME": "demo", "OWNER_UID": UID}


def problems(values: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        parse_config(values)
    assert str(error.value) == "\n".join(error.value.problems)
    return error.value.problems


def test_two_settings_are_enough_and_the_rest_has_safe_defaults() -> None:
    assert parse_config(MINIMUM) == Config(
        session_name="demo",
        namespace=None,
        listen_addr=("127.0.0.1", 8080),
        listen_socket=None,
        listen_socket_uids=(),
        listen_token_file=None,
        max_concurrent_execs=10,
        exec_timeout_seconds=600,
        exec_timeout_max_seconds=3600,
        workspace_selector="session=demo,type=workspace",
        workspace_pod=None,
        workspace_container="workspace",
        owner_mode=OwnerMode.UID,
        owner_uid=UID,
        pod_name=None,
        pod_uid=None,
        pod_security_level=Level.RESTRICTED,
        allowed_images=(),
        require_image_digest=False,
        exec_rate_per_second=20,
        exec_burst=40,
        max_output_bytes=0,
        max_request_bytes=4194304,
        heartbeat_seconds=15,
        stall_seconds=60,
        kill_grace_seconds=2,
        drain_seconds=8,
        wrapper=Wrapper.SH,
        log_level=LogLevel.INFO,
        log_format=LogFormat.JSON,
        log_commands=False,
    )


def test_every_setting_is_a_field_and_every_field_a_setting() -> None:
    assert [setting.field for setting in SETTINGS] == [field.name for field in fields(Config)]
    assert all(setting.flag == "--" + setting.variable.lower().replace("_", "-") for setting in SETTINGS)
    assert all(setting.help for setting in SETTINGS)


GOOD: list[tuple[str, str, Any]] = [
    ("SESSION_NAME", "a", "a"),
    ("SESSION_NAME", "A.b_c-9", "A.b_c-9"),
    ("SESSION_NAME", "x" * 63, "x" * 63),
    ("NAMESPACE", "kube-system", "kube-system"),
    ("LISTEN_ADDR", ":8080", ("127.0.0.1", 8080)),
    ("LISTEN_ADDR", "localhost:81", ("127.0.0.1", 81)),
    ("LISTEN_ADDR", "127.9.8.7:0", ("127.9.8.7", 0)),
    ("LISTEN_ADDR", "[::1]:80", ("::1", 80)),
    ("LISTEN_ADDR", "127.0.0.1:65535", ("127.0.0.1", 65535)),
    ("LISTEN_SOCKET", "/run/session-proxy.sock", "/run/session-proxy.sock"),
    ("LISTEN_TOKEN_FILE", "/run/token", "/run/token"),
    ("MAX_CONCURRENT_EXECS", "1", 1),
    ("MAX_CONCURRENT_EXECS", "10000", 10_000),
    ("EXEC_TIMEOUT_SECONDS", "0.5", 0.5),
    ("EXEC_TIMEOUT_SECONDS", "3600", 3600),
    ("EXEC_TIMEOUT_MAX_SECONDS", "2592000", 2_592_000),
    ("WORKSPACE_SELECTOR", "a=b", "a=b"),
    ("WORKSPACE_SELECTOR", "a==b, c!=d,e,!f,g=,example.com/h=i", "a==b, c!=d,e,!f,g=,example.com/h=i"),
    ("WORKSPACE_POD", "ws-0.example", "ws-0.example"),
    ("WORKSPACE_POD", "x" * 253, "x" * 253),
    ("WORKSPACE_CONTAINER", "main", "main"),
    ("OWNER_MODE", "uid", OwnerMode.UID),
    ("OWNER_MODE", "NONE", OwnerMode.NONE),
    ("OWNER_UID", "x" * 128, "x" * 128),
    ("POD_NAME", "runner-0", "runner-0"),
    ("POD_UID", UID, UID),
    ("POD_SECURITY_LEVEL", "Baseline", Level.BASELINE),
    ("POD_SECURITY_LEVEL", "privileged", Level.PRIVILEGED),
    ("ALLOWED_IMAGES", "ghcr.io/org, registry.example:5000/a/b,,", ("ghcr.io/org", "registry.example:5000/a/b")),
    ("REQUIRE_IMAGE_DIGEST", "TRUE", True),
    ("REQUIRE_IMAGE_DIGEST", "yes", True),
    ("REQUIRE_IMAGE_DIGEST", "1", True),
    ("REQUIRE_IMAGE_DIGEST", "no", False),
    ("REQUIRE_IMAGE_DIGEST", "0", False),
    ("EXEC_RATE_PER_SECOND", "0.01", 0.01),
    ("EXEC_BURST", "1", 1),
    ("MAX_OUTPUT_BYTES", "0", 0),
    ("MAX_OUTPUT_BYTES", str(1 << 40), 1 << 40),
    ("MAX_REQUEST_BYTES", "1024", 1024),
    ("HEARTBEAT_SECONDS", "0.1", 0.1),
    ("STALL_SECONDS", "86400", 86_400),
    ("KILL_GRACE_SECONDS", "0", 0),
    ("KILL_GRACE_SECONDS", "300", 300),
    ("DRAIN_SECONDS", "25", 25),
    ("WRAPPER", "none", Wrapper.NONE),
    ("LOG_LEVEL", "warning", LogLevel.WARNING),
    ("LOG_FORMAT", "console", LogFormat.CONSOLE),
    ("LOG_COMMANDS", "true", True),
    ("NAMESPACE", "  padded  ", "padded"),
]


@pytest.mark.parametrize(("variable", "text", "value"), GOOD)
def test_a_good_value_is_taken(variable: str, text: str, value: Any) -> None:
    config = parse_config(MINIMUM | {variable: text})
    assert getattr(config, variable.lower()) == value


def test_user_ids_are_a_list_and_need_the_socket() -> None:
    config = parse_config(MINIMUM | {"LISTEN_SOCKET": "/run/s", "LISTEN_SOCKET_UIDS": "0, 1000,65534"})
    assert config.listen_socket_uids == (0, 1000, 65534)
    assert problems(MINIMUM | {"LISTEN_SOCKET_UIDS": "1000"}) == (
        "LISTEN_SOCKET_UIDS is set without LISTEN_SOCKET; TCP peers have no user id to check",
    )


BAD: list[tuple[str, str]] = [
    ("SESSION_NAME", "-a"),
    ("SESSION_NAME", "a."),
    ("SESSION_NAME", "a b"),
    ("SESSION_NAME", "a,type=other"),
    ("SESSION_NAME", "x" * 64),
    ("SESSION_NAME", "ä"),
    ("NAMESPACE", "Upper"),
    ("NAMESPACE", "a.b"),
    ("NAMESPACE", "a/../b"),
    ("NAMESPACE", "x" * 64),
    ("LISTEN_ADDR", "0.0.0.0:80"),
    ("LISTEN_ADDR", "[::]:80"),
    ("LISTEN_ADDR", "10.0.0.1:80"),
    ("LISTEN_ADDR", "[2001:db8::1]:80"),
    ("LISTEN_ADDR", "example.com:80"),
    ("LISTEN_ADDR", "8080"),
    ("LISTEN_ADDR", "127.0.0.1"),
    ("LISTEN_ADDR", "127.0.0.1:"),
    ("LISTEN_ADDR", "127.0.0.1:65536"),
    ("LISTEN_ADDR", "127.0.0.1:-1"),
    ("LISTEN_ADDR", "127.0.0.1:8o8o"),
    ("LISTEN_ADDR", "127.0.0.1:٨٠"),
    ("LISTEN_ADDR", "http://127.0.0.1:80"),
    ("LISTEN_ADDR", "127.1:80"),
    ("LISTEN_SOCKET", "run/s"),
    ("LISTEN_SOCKET", "/a\0b"),
    ("LISTEN_SOCKET_UIDS", "root"),
    ("LISTEN_SOCKET_UIDS", "1,,2"),
    ("LISTEN_SOCKET_UIDS", "-1"),
    ("LISTEN_TOKEN_FILE", "token"),
    ("MAX_CONCURRENT_EXECS", "0"),
    ("MAX_CONCURRENT_EXECS", "10001"),
    ("MAX_CONCURRENT_EXECS", "1.5"),
    ("MAX_CONCURRENT_EXECS", "ten"),
    ("MAX_CONCURRENT_EXECS", "-1"),
    ("MAX_CONCURRENT_EXECS", "1_0"),
    ("MAX_CONCURRENT_EXECS", "9" * 5000),
    ("EXEC_TIMEOUT_SECONDS", "0"),
    ("EXEC_TIMEOUT_SECONDS", "-1"),
    ("EXEC_TIMEOUT_SECONDS", "nan"),
    ("EXEC_TIMEOUT_SECONDS", "inf"),
    ("EXEC_TIMEOUT_SECONDS", "1e3"),
    ("EXEC_TIMEOUT_SECONDS", "10m"),
    ("EXEC_TIMEOUT_SECONDS", "9" * 400),
    ("EXEC_TIMEOUT_MAX_SECONDS", "2592001"),
    ("WORKSPACE_SELECTOR", "a=b,"),
    ("WORKSPACE_SELECTOR", "a in (b)"),
    ("WORKSPACE_SELECTOR", "a=b=c"),
    ("WORKSPACE_SELECTOR", "a=b&watch=1"),
    ("WORKSPACE_POD", "UPPER"),
    ("WORKSPACE_POD", "a/exec"),
    ("WORKSPACE_POD", "x" * 254),
    ("WORKSPACE_CONTAINER", "a.b"),
    ("OWNER_MODE", "label"),
    ("OWNER_UID", "a b"),
    ("OWNER_UID", "x" * 129),
    ("POD_NAME", "?"),
    ("POD_UID", "\u200b"),
    ("POD_SECURITY_LEVEL", "strict"),
    ("ALLOWED_IMAGES", "ghcr.io/org,*"),
    ("ALLOWED_IMAGES", "https://ghcr.io"),
    ("REQUIRE_IMAGE_DIGEST", "maybe"),
    ("EXEC_RATE_PER_SECOND", "0"),
    ("EXEC_RATE_PER_SECOND", "10001"),
    ("EXEC_BURST", "0"),
    ("MAX_OUTPUT_BYTES", "-1"),
    ("MAX_OUTPUT_BYTES", "1M"),
    ("MAX_REQUEST_BYTES", "1023"),
    ("MAX_REQUEST_BYTES", str((64 << 20) + 1)),
    ("HEARTBEAT_SECONDS", "0"),
    ("STALL_SECONDS", "86401"),
    ("KILL_GRACE_SECONDS", "301"),
    ("DRAIN_SECONDS", "0.09"),
    ("WRAPPER", "bash"),
    ("LOG_LEVEL", "trace"),
    ("LOG_FORMAT", "xml"),
    ("LOG_COMMANDS", "on"),
]


@pytest.mark.parametrize(("variable", "text"), BAD)
def test_a_bad_value_is_named_with_what_would_be_right(variable: str, text: str) -> None:
    found = problems(MINIMUM | {"LISTEN_SOCKET": "/run/s"} | {variable: text})
    shown = text if len(text) <= SHOWN_VALUE_CHARACTERS else text[:SHOWN_VALUE_CHARACTERS] + "…"
    assert len(found) == 1
    assert found[0].startswith(f"{variable} is {shown!r}; it must be ")
    assert "\n" not in found[0]
    assert len(found[0]) < 350


def test_every_setting_with_a_rule_has_a_bad_example() -> None:
    assert {variable for variable, _ in BAD} == {setting.variable for setting in SETTINGS}


def test_all_problems_are_reported_at_once() -> None:
    last_of_each = dict(BAD)
    found = problems(last_of_each)
    for variable in last_of_each:
        assert any(problem.startswith(f"{variable} is ") for problem in found), variable


def test_what_is_missing_and_what_is_wrong_is_reported_together() -> None:
    found = problems({"EXEC_BURST": "x", "LOG_LEVEL": "y"})
    assert [problem.split()[0] for problem in found] == ["EXEC_BURST", "LOG_LEVEL", "SESSION_NAME", "OWNER_MODE"]


def test_an_empty_value_counts_as_unset() -> None:
    empty = {setting.variable: " " for setting in SETTINGS}
    assert parse_config(empty | MINIMUM) == parse_config(MINIMUM)
    assert problems(MINIMUM | {"SESSION_NAME": ""}) == (
        "SESSION_NAME is not set; it must be the label value of this session",
    )


def test_unknown_variables_are_none_of_our_business() -> None:
    assert parse_config(MINIMUM | {"PATH": "/bin", "EXEC_BURSTS": "x"}) == parse_config(MINIMUM)


def test_a_default_timeout_above_the_maximum_is_refused() -> None:
    found = problems(MINIMUM | {"EXEC_TIMEOUT_SECONDS": "60", "EXEC_TIMEOUT_MAX_SECONDS": "30"})
    assert found == ("EXEC_TIMEOUT_SECONDS is 60; it must be at most EXEC_TIMEOUT_MAX_SECONDS, which is 30",)


def test_a_pod_name_and_a_selector_exclude_each_other() -> None:
    found = problems(MINIMUM | {"WORKSPACE_SELECTOR": "a=b", "WORKSPACE_POD": "p"})
    assert found == ("WORKSPACE_SELECTOR and WORKSPACE_POD are both set; give one of them",)


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({"OWNER_UID": UID}, OwnerMode.UID),
        ({"OWNER_UID": UID, "OWNER_MODE": "uid"}, OwnerMode.UID),
        ({"OWNER_MODE": "self", "POD_UID": UID}, OwnerMode.SELF),
        ({"OWNER_MODE": "sibling", "POD_NAME": "runner", "POD_UID": UID}, OwnerMode.SIBLING),
        ({"OWNER_MODE": "none"}, OwnerMode.NONE),
    ],
)
def test_an_owner_mode_with_what_it_needs_is_taken(values: dict[str, str], mode: OwnerMode) -> None:
    assert parse_config({"SESSION_NAME": "demo"} | values).owner_mode is mode


@pytest.mark.parametrize(
    ("mode", "missing"),
    [("uid", ["OWNER_UID"]), ("self", ["POD_UID"]), ("sibling", ["POD_NAME", "POD_UID"])],
)
def test_an_owner_mode_without_what_it_needs_is_refused(mode: str, missing: list[str]) -> None:
    found = problems({"SESSION_NAME": "demo", "OWNER_MODE": mode})
    assert found == tuple(f"{name} is not set; OWNER_MODE={mode} needs it" for name in missing)


def test_no_owner_mode_is_never_taken_for_none() -> None:
    (found,) = problems({"SESSION_NAME": "demo"})
    assert found.startswith("OWNER_MODE is not set; it must be uid")


def test_a_wrong_owner_mode_is_not_replaced_by_the_default() -> None:
    (found,) = problems(MINIMUM | {"OWNER_MODE": "off"})
    assert found.startswith("OWNER_MODE is 'off'; it must be one of uid, self, sibling, none")


_values = st.dictionaries(
    st.sampled_from([setting.variable for setting in SETTINGS]),
    st.text(max_size=70)
    | st.sampled_from([text for _, text, _ in GOOD])
    | st.floats().map(str)
    | st.integers().map(str)
    | st.from_regex(r"[\[\]0-9a-f.:%]{0,20}:[0-9]{0,6}", fullmatch=True),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(_values)
def test_arbitrary_values_raise_nothing_but_a_config_error(values: dict[str, str]) -> None:
    found: tuple[str, ...] = ()
    try:
        config = parse_config(values)
    except ConfigError as error:
        found = error.problems
    else:
        assert config.listen_addr[0].startswith(("127.", "::1"))
        assert 0 < config.exec_timeout_seconds <= config.exec_timeout_max_seconds
        return
    assert found
    assert {problem.split()[0] for problem in found} <= {setting.variable for setting in SETTINGS}
