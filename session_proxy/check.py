"""``session-proxy check``: the verdict of :mod:`session_proxy.policy` on manifests, without a cluster.

Reads any number of YAML or JSON files with any number of documents and evaluates every pod and pod template in them.
Manifests may come from anywhere, so reading them is bounded: the size of a file, what its aliases expand to, and no
key given twice (of which another parser might keep the other value).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import yaml

from session_proxy.errors import ManifestError, Violation
from session_proxy.policy import PolicySettings, evaluate

EXIT_OK: Final = 0
EXIT_VIOLATIONS: Final = 1
EXIT_UNREADABLE: Final = 2

MAX_FILE_BYTES: Final = 4 * 1024 * 1024
MAX_EXPANDED_NODES: Final = 1_000_000

_TEMPLATE_PATHS: Final[Mapping[str, tuple[str, ...]]] = {
    "Pod": (),
    "PodTemplate": ("template",),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Deployment": ("spec", "template"),
    "Job": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
}


def run_check(paths: Sequence[str], settings: PolicySettings, *, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> int:
    """Print the verdict on every pod and pod template in the files (``-`` is ``stdin``) and return the exit status.

    0: all are acceptable. 1: there are violations. 2: something could not be read, or there was nothing to evaluate;
    the verdicts on the rest are printed all the same.
    """
    evaluated, violated, unreadable = 0, False, False
    for path in paths:
        shown = "<stdin>" if path == "-" else path
        found, problem = _load(path, stdin, shown)
        for item in found:
            if isinstance(item, _Skipped):
                _print(stderr, f"{shown}: {item.title}: skipped, it has no pod template")
                continue
            violations = evaluate(item.pod, settings)
            evaluated += 1
            violated = violated or bool(violations)
            _print_verdict(stdout, shown, item, violations)
        if problem is not None:
            unreadable = True
            _print(stderr, problem)
    if not evaluated and not unreadable:
        unreadable = True
        _print(stderr, "no pod and no pod template found")
    if unreadable:
        return EXIT_UNREADABLE
    return EXIT_VIOLATIONS if violated else EXIT_OK


# ---------------------------------------------------------------------------------------------------------------------
# Printing.


def _print(stream: TextIO, line: str) -> None:
    # A manifest is someone else's text: it must not steer the terminal that shows it.
    stream.write("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line) + "\n")


def _print_verdict(stdout: TextIO, shown: str, found: "_Evaluable", violations: Sequence[Violation]) -> None:
    count = len(violations)
    verdict = "ok" if not count else f"{count} violation{'s' if count > 1 else ''}"
    _print(stdout, f"{shown}: {found.title}: {verdict}")
    for violation in violations:
        field = found.locate(violation.field)
        _print(stdout, f"  {field}: is {violation.value}, must be {violation.expected} [{violation.rule}]")
        _print(stdout, f"    {violation.message}")


# ---------------------------------------------------------------------------------------------------------------------
# Finding pods in documents.


@dataclass(frozen=True, slots=True)
class _Skipped:
    title: str


@dataclass(frozen=True, slots=True)
class _Evaluable:
    title: str
    prefix: str
    pod: Mapping[str, Any]

    def locate(self, field: str) -> str:
        """Return the field's path from the root of the document."""
        return f"{self.prefix}.{field}" if self.prefix else field


def _objects_of(documents: Iterator[object], shown: str) -> Iterator[_Evaluable | _Skipped]:
    for document in documents:
        if document is not None:
            yield from _objects_in(document, prefix="", kind=None, shown=shown)


def _objects_in(document: object, *, prefix: str, kind: str | None, shown: str) -> Iterator[_Evaluable | _Skipped]:
    where = f"{shown}: {prefix}: " if prefix else f"{shown}: "
    if not isinstance(document, Mapping):
        raise ManifestError(f"{where}not a Kubernetes object")
    kind = document.get("kind", kind)
    if not isinstance(kind, str) or not kind:
        raise ManifestError(f"{where}not a Kubernetes object: it has no kind")
    if kind.endswith("List"):
        items = document.get("items")
        if not isinstance(items, list):
            raise ManifestError(f"{where}{kind} without a list of items")
        for index, item in enumerate(items):
            # The items of a PodList and the like do not repeat their kind.
            item_kind = kind.removesuffix("List") or None
            yield from _objects_in(item, prefix=_join(prefix, f"items[{index}]"), kind=item_kind, shown=shown)
        return
    title = f"{kind}/{_name(document)}"
    keys = _TEMPLATE_PATHS.get(kind)
    if keys is None:
        yield _Skipped(title)
        return
    pod: object = document
    for key in keys:
        pod = pod.get(key) if isinstance(pod, Mapping) else None
    path = _join(prefix, ".".join(keys))
    if not isinstance(pod, Mapping):
        raise ManifestError(f"{shown}: {title}: {path} is not a pod template")
    yield _Evaluable(title, path, pod)


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _name(document: Mapping[str, Any]) -> str:
    metadata = document.get("metadata")
    if isinstance(metadata, Mapping):
        for key in ("name", "generateName"):
            name = metadata.get(key)
            if isinstance(name, str) and name:
                return name
    return "(unnamed)"


# ---------------------------------------------------------------------------------------------------------------------
# Reading documents.


def _load(path: str, stdin: TextIO, shown: str) -> tuple[list[_Evaluable | _Skipped], str | None]:
    """Return what the file holds, up to what is wrong with it (None when all of it could be read)."""
    found: list[_Evaluable | _Skipped] = []
    try:
        for item in _objects_of(_documents(_read(path, stdin), shown), shown):
            found.append(item)  # noqa: PERF402 - what came before an error counts
    except ManifestError as error:
        return found, str(error)
    except OSError as error:
        return found, f"{shown}: cannot be read: {error.strerror or error}"
    except ValueError as error:
        return found, f"{shown}: cannot be read: {error}"
    except RecursionError:
        return found, f"{shown}: nested too deeply"
    return found, None


def _read(path: str, stdin: TextIO) -> str:
    if path == "-":
        text = stdin.read(MAX_FILE_BYTES + 1)
        size = len(text)
    else:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        size = len(content)
        text = content.decode("utf-8-sig") if size <= MAX_FILE_BYTES else ""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return text


def _documents(text: str, shown: str) -> Iterator[object]:
    try:
        if text.lstrip()[:1] == "{":
            # Much faster than YAML, for what `kubectl get -o json` prints. Text that is no JSON may still be YAML.
            try:
                yield json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
            except json.JSONDecodeError:
                yield from _yaml_documents(text)
        else:
            yield from _yaml_documents(text)
    except yaml.MarkedYAMLError as error:
        line = f"{error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ManifestError(f"{shown}:{line} {error.problem or error}") from error
    except yaml.YAMLError as error:
        # Control characters; the error says at which position, and has no line.
        number = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise ManifestError(f"{shown}:{number}: {getattr(error, 'reason', error)}") from error


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        duplicate = next(key for key, following in pairwise(keys) if key == following)
        raise ValueError(f"the key {json.dumps(duplicate)} is given twice")
    return result


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_MERGE_TAG: Final = "tag:yaml.org,2002:merge"


def _constructor_error(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _ManifestLoader(yaml.SafeLoader):
    """YAML as Kubernetes' own tools read it: JSON values only, string keys, none of them twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is given twice, before merges (``<<``), which may be overridden, bring in more keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            key = self._key(key_node)
            if key in seen:
                raise _constructor_error(key_node, f"the key {json.dumps(key)} is given twice")
            seen.add(key)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct the mapping with string keys."""
        self.flatten_mapping(node)
        return {self._key(key): self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; one that does not fit its tag (``!!int x``) is an error of the document."""
        try:
            return super().construct_object(node, deep=deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise _constructor_error(node, f"not a value of {node.tag}") from error

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise _constructor_error(node, "a key is not a string")
        # `on: x` and `8080: x` have the keys "true" and "8080" for kubectl.
        key = self.construct_object(node)
        return key if isinstance(key, str) else json.dumps(key)

    def as_string(self, node: yaml.ScalarNode) -> str:
        """Take a timestamp as the string that it is."""
        return str(self.construct_scalar(node))

    def refuse(self, node: yaml.Node) -> NoReturn:
        """Refuse a value that JSON does not have."""
        raise _constructor_error(node, f"{node.tag} has no place in a manifest")


_ManifestLoader.add_constructor("tag:yaml.org,2002:timestamp", _ManifestLoader.as_string)
for _tag in ("binary", "omap", "pairs", "set"):
    _ManifestLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _ManifestLoader.refuse)


def _yaml_documents(text: str) -> Iterator[object]:
    loader = _ManifestLoader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None and _expanded_size(node, {}) > MAX_EXPANDED_NODES:
                raise _constructor_error(node, f"aliases expand to more than {MAX_EXPANDED_NODES} values")
            yield loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Return how many values the node has once every alias is written out; an alias to its own parent is refused."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise _constructor_error(node, "an alias contains itself")
    if known:
        return known
    sizes[id(node)] = None
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_expanded_size(item, sizes) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_expanded_size(part, sizes) for pair in node.value for part in pair)
    sizes[id(node)] = size
    return size
