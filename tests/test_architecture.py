"""What the modules may import and touch: the pure ones nothing but data, the client library only kube."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import session_proxy

PACKAGE = Path(session_proxy.__file__).parent
PURE = ("policy", "ownership", "remotecommand", "wire", "wrapper", "config", "errors", "session_spec")
IMPURE_IMPORTS = {"asyncio", "aiohttp", "kubernetes_asyncio", "structlog", "subprocess", "socket", "threading", "os"}
IO_NAMES = {"environ", "getenv", "putenv", "open", "print", "input", "exec", "eval", "__import__"}


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in the source, function bodies included, and literal dynamic imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names):
                yield module or "."
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module" | "find_spec"), args=[ast.Constant(value=str(name))]):
                yield name


def names_used(tree: ast.AST) -> set[str]:
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
    }


def roots(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imports(tree)}


ALL_MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_nothing_that_does_input_or_output(module: str) -> None:
    assert not roots(tree_of(module)) & IMPURE_IMPORTS


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_names_nothing_that_does_input_or_output(module: str) -> None:
    assert not names_used(tree_of(module)) & IO_NAMES


def test_these_checks_see_what_they_look_for() -> None:
    source = "def f():\n    import asyncio.subprocess\n    from os import environ as e\n    import importlib\n"
    source += "    importlib.import_module('structlog.dev')\n    x.environ; open('f')\n"
    tree = ast.parse(source)
    assert roots(tree) & IMPURE_IMPORTS == {"asyncio", "os", "structlog"}
    assert names_used(tree) & IO_NAMES == {"environ", "open"}


TRAP = """
import collections.abc, os, sys
class Trap(collections.abc.MutableMapping):
    def __getitem__(self, name): raise SystemExit(f"the environment was read: {name}")
    def __setitem__(self, name, value): raise SystemExit(f"the environment was set: {name}")
    __delitem__ = __getitem__
    def __iter__(self): raise SystemExit("the environment was listed")
    __len__ = __iter__
os.environ = os.environb = Trap()
os.getenv = os.environ.__getitem__
"""


def in_a_fresh_process(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", PURE)
def test_importing_a_pure_module_loads_no_input_or_output_and_reads_no_environment(module: str) -> None:
    script = f"{TRAP}\nimport session_proxy.{module}\nprint(*sys.modules)\n"
    result = in_a_fresh_process(script)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert f"session_proxy.{module}" in loaded
    assert not loaded & {"asyncio", "aiohttp", "kubernetes_asyncio", "structlog"}
    impure = {f"session_proxy.{name}" for name in ALL_MODULES if name not in PURE}
    assert not loaded & impure


def test_the_trap_catches_a_module_that_reads_the_environment() -> None:
    result = in_a_fresh_process(f"{TRAP}\nos.getenv('HOME')\n")
    assert result.returncode == 1
    assert "the environment was read: HOME" in result.stderr


def test_a_probe_does_not_load_the_daemon() -> None:
    script = (
        "import sys\nfrom session_proxy import cli\n"
        "status = cli.main(['health', '--listen-addr', '127.0.0.1:0'])\n"
        "print(status, *sys.modules)\n"
    )
    result = in_a_fresh_process(script)
    status, *loaded = result.stdout.split()
    assert status == "1", result.stderr
    assert not set(loaded) & {"asyncio", "aiohttp", "kubernetes_asyncio", "structlog", "yaml", "prometheus_client"}


def test_only_kube_mentions_the_client_library() -> None:
    assert {module for module in ALL_MODULES if "kubernetes_asyncio" in roots(tree_of(module))} == {"kube"}


def test_the_daemon_does_not_load_the_stand_in_for_the_api_server() -> None:
    result = in_a_fresh_process("import sys, session_proxy.server\nprint(*sys.modules)\n")
    assert result.returncode == 0, result.stderr
    assert "session_proxy.kube" in result.stdout.split()
    assert "session_proxy.devcluster" not in result.stdout.split()


def test_errors_end_in_error() -> None:
    for module in ALL_MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                bases = {name for base in node.bases for name in names_used(base)}
                if any(name.endswith(("Error", "Exception")) for name in bases):
                    assert node.name.endswith("Error"), f"{module}.{node.name}"


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not set(ALL_MODULES) & {"utils", "util", "helpers", "manager", "common", "misc", "base", "core"}
