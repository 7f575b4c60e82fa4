"""What the Containerfile must agree on with the rest; that the image works is shown on a cluster (tests/cluster)."""

import re
from pathlib import Path

from session_proxy import __version__
from session_proxy.session_spec import PROXY_UID

CONTAINERFILE = (Path(__file__).parents[1] / "Containerfile").read_text()


def values_of(pattern: str) -> list[str]:
    return re.findall(pattern, CONTAINERFILE, re.MULTILINE)


def test_the_version_in_the_label_is_the_packages() -> None:
    assert values_of(r"^ARG VERSION=(.*)$") == [__version__]


def test_the_user_is_the_one_that_sessions_run_it_as() -> None:
    assert values_of(r"^USER (.*)$") == [f"{PROXY_UID}:{PROXY_UID}"]
