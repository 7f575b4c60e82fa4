"""The admission policies: their own CEL, evaluated as Kubernetes does, on requests that must and must not pass.

The evaluator follows Kubernetes' own (k8s.io/apiserver/pkg/admission/plugin/{policy,cel}) as far as these policies go:
expressions are checked when they are compiled, conditions and validations must be exactly bool, what is not there is an
error, an error denies (failurePolicy Fail), and parameters are looked up before any condition is. ``request`` leaves out
what is empty. CEL itself is that of cel-expr-python, Google's; the real API server is not there to be asked.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import kubernetes_validate
import pytest
from cel_expr_python import cel
from cel_expr_python.ext import ext_strings
from kustomize import DEPLOY, Manifest, build, overlay

NAMESPACE = "session-proxy"
PERSON = "alice@example.com"
CREATOR = "system:serviceaccount:session-platform:session-creator"
SIDECAR = "system:serviceaccount:session-proxy:demo-proxy"
ELSEWHERE = "system:serviceaccount:runners:demo-proxy"
ADMINISTRATOR = "kubernetes-admin"
NODE = "system:node:node1"
REPLICA_SETS = "system:serviceaccount:kube-system:replicaset-controller"
COLLECTOR = "system:serviceaccount:kube-system:generic-garbage-collector"
CONTROLLERS = "system:kube-controller-manager"

# What an expression may name: the fields of BuildRequestType in Kubernetes' compile.go. Declared one by one, so that any
# other one is an error of compilation; unset ones are errors of evaluation.
REQUEST_FIELDS = {
    **{f"{kind}.{part}": cel.Type.STRING for kind in ("kind", "requestKind") for part in ("group", "version", "kind")},
    **{
        f"{resource}.{part}": cel.Type.STRING
        for resource in ("resource", "requestResource")
        for part in ("group", "version", "resource")
    },
    **dict.fromkeys(("subResource", "requestSubResource", "name", "namespace", "operation"), cel.Type.STRING),
    "userInfo.username": cel.Type.STRING,
    "userInfo.uid": cel.Type.STRING,
    "userInfo.groups": cel.Type.List(cel.Type.STRING),
    "dryRun": cel.Type.BOOL,
    "options": cel.Type.DYN,
}


@dataclass(frozen=True)
class Request:
    """One request as admission sees it."""

    user: str
    operation: str
    resource: str
    object: Manifest
    old: Manifest | None = None
    namespace: str = NAMESPACE

    def variables(self) -> dict[str, Any]:
        resource, _, subresource = self.resource.partition("/")
        request = {
            "operation": self.operation,
            "resource.version": "v1",
            "resource.resource": resource,
            "subResource": subresource,
            "namespace": self.namespace,
            "userInfo.username": self.user,
        }
        named = {f"request.{name}": value for name, value in request.items() if value}
        return {"object": self.object, "oldObject": self.old, **named}


class Expression:
    """A compiled expression. Raises ValueError where Kubernetes refuses to compile it."""

    def __init__(
        self, text: str, *, params: bool, variables: Mapping[str, cel.Type] | None = None, boolean: bool = True
    ) -> None:
        self.text = text
        declared = {"object": cel.Type.DYN, "oldObject": cel.Type.DYN}
        declared |= {f"request.{name}": kind for name, kind in REQUEST_FIELDS.items()}
        declared |= {f"variables.{name}": kind for name, kind in (variables or {}).items()}
        if params:
            declared["params"] = cel.Type.DYN
        environment = cel.NewEnv(variables=declared, extensions=[ext_strings.ExtStrings()])
        try:
            self._compiled = environment.compile(text)
        except RuntimeError as error:
            raise ValueError(f"{text}: {error}") from error
        self.type = self._compiled.return_type()
        if boolean and self.type != cel.Type.BOOL:
            raise ValueError(f"{text}: must evaluate to bool, not {self.type.name()}")

    def value(self, variables: Mapping[str, Any]) -> Any:
        """Evaluate; raise LookupError for whatever CEL calls an error."""
        result = self._compiled.eval(data=variables)
        if result.type() == cel.Type.ERROR:
            raise LookupError(f"{self.text}: {result.plain_value()}")
        return result.plain_value()


@dataclass(frozen=True)
class Policy:
    """A ValidatingAdmissionPolicy with its one binding."""

    name: str
    rules: tuple[Mapping[str, Any], ...]
    conditions: tuple[Expression, ...]
    variables: Mapping[str, Expression]
    validations: tuple[tuple[Expression, str], ...]
    binding: Mapping[str, Any]
    takes_params: bool

    @classmethod
    def of(cls, policy: Manifest, binding: Manifest) -> "Policy":
        spec = policy["spec"]
        params = "paramKind" in spec
        assert spec["failurePolicy"] == "Fail"
        assert "Deny" in binding["spec"]["validationActions"]
        assert set(spec["matchConstraints"]) == {"resourceRules"}
        assert set(binding["spec"]["matchResources"]) == {"namespaceSelector"}
        assert set(binding["spec"]["matchResources"]["namespaceSelector"]) == {"matchLabels"}
        assert params == ("paramRef" in binding["spec"])
        if params:
            assert spec["paramKind"] == {"apiVersion": "v1", "kind": "ConfigMap"}
        variables: dict[str, Expression] = {}
        for variable in spec.get("variables", ()):
            # Each sees the ones before it, with the types that they turned out to have.
            known = {name: expression.type for name, expression in variables.items()}
            variables[variable["name"]] = Expression(
                variable["expression"], params=params, variables=known, boolean=False
            )
        types = {name: expression.type for name, expression in variables.items()}
        return cls(
            name=policy["metadata"]["name"],
            rules=tuple(spec["matchConstraints"]["resourceRules"]),
            conditions=tuple(Expression(each["expression"], params=params) for each in spec.get("matchConditions", ())),
            variables=variables,
            validations=tuple(
                (Expression(each["expression"], params=params, variables=types), each["message"])
                for each in spec["validations"]
            ),
            binding=binding["spec"],
            takes_params=params,
        )

    def denials(self, request: Request, cluster: "Cluster") -> Iterator[str]:
        """Yield why this policy denies the request; nothing when it does not."""
        if not any(_rule_matches(rule, request) for rule in self.rules):
            return
        wanted = self.binding["matchResources"]["namespaceSelector"]["matchLabels"]
        if not wanted.items() <= cluster.namespaces[request.namespace].items():
            return
        known = request.variables()
        if self.takes_params:
            reference = self.binding["paramRef"]
            found = cluster.config_maps.get((reference["namespace"], reference["name"]))
            if found is None:
                assert reference["parameterNotFoundAction"] == "Deny"
                yield "failed to configure binding: no params found"
                return
            known["params"] = found
        errors = []
        for condition in self.conditions:
            try:
                if condition.value(known) is False:
                    return  # whatever the other conditions say, errors too
            except LookupError as error:
                errors.append(str(error))
        if errors:
            yield from errors
            return
        for name, variable in self.variables.items():
            try:
                known[f"variables.{name}"] = variable.value(known)
            except LookupError:
                continue  # an error only where it is used
        for expression, message in self.validations:
            try:
                if expression.value(known) is not True:
                    yield message
            except LookupError as error:
                yield str(error)


def _rule_matches(rule: Mapping[str, Any], request: Request) -> bool:
    assert not any("*" in text for texts in rule.values() for text in texts)
    return (
        "" in rule["apiGroups"]
        and "v1" in rule["apiVersions"]
        and request.operation in rule["operations"]
        and request.resource in rule["resources"]
    )


@functools.cache
def policies() -> tuple[Policy, ...]:
    objects = build(DEPLOY / "components" / "admission")
    bindings = {each["spec"]["policyName"]: each for each in objects if each["kind"].endswith("PolicyBinding")}
    found = [each for each in objects if each["kind"] == "ValidatingAdmissionPolicy"]
    assert {each["metadata"]["name"] for each in found} == set(bindings)
    return tuple(Policy.of(each, bindings[each["metadata"]["name"]]) for each in found)


@dataclass(frozen=True)
class Cluster:
    """What the policies look at beside the request."""

    namespaces: Mapping[str, Mapping[str, str]]
    config_maps: Mapping[tuple[str, str], Manifest]


@functools.cache
def cluster() -> Cluster:
    """The namespace as the component labels it, another one, and the ConfigMap as it is shipped."""
    objects = overlay("admission")
    labels = objects["Namespace", NAMESPACE]["metadata"]["labels"]
    shipped = objects["ConfigMap", "session-proxy-admission"]
    key = (shipped["metadata"]["namespace"], shipped["metadata"]["name"])
    return Cluster({NAMESPACE: labels, "elsewhere": {"kubernetes.io/metadata.name": "elsewhere"}}, {key: shipped})


def denials(request: Request, where: Cluster | None = None, these: tuple[Policy, ...] | None = None) -> list[str]:
    where = where or cluster()
    return [why for policy in (policies() if these is None else these) for why in policy.denials(request, where)]


# --- objects ----------------------------------------------------------------------------------------------------------

WORKSPACE = {"session": "demo", "type": "workspace"}
RUNNER = {"session": "demo", "type": "runner"}
OWNER = {"apiVersion": "v1", "kind": "Pod", "name": "demo-runner", "uid": "u-1", "controller": True}
REPLICA_SET = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "u-2", "controller": True}
SECOND = {"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "u-3"}
DEBUGGER = {"name": "debugger", "image": "busybox"}


def pod(
    labels: Mapping[str, str] | None = None,
    owners: tuple[Mapping[str, Any], ...] = (),
    ephemeral: tuple[Mapping[str, Any], ...] = (),
    **metadata: Any,
) -> Manifest:
    """A pod; empty lists and maps are absent, as the API server leaves them out."""
    lists = {"labels": dict(labels or {}), "ownerReferences": [dict(each) for each in owners]}
    spec = {"containers": [{"name": "workspace", "image": "i"}], "ephemeralContainers": [dict(c) for c in ephemeral]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "demo-workspace", "namespace": NAMESPACE, **metadata}
        | {k: v for k, v in lists.items() if v},
        "spec": {k: v for k, v in spec.items() if v},
    }


def with_image(manifest: Manifest, image: str, containers: str = "containers") -> Manifest:
    """The same pod with another image: containers are as they were, but for the first of a kind."""
    changed = copy.deepcopy(manifest)
    changed["spec"][containers][0]["image"] = image
    return changed


def runner_pod() -> Manifest:
    """A runner pod with the sidecar that holds the token."""
    runner = pod(RUNNER)
    runner["spec"]["initContainers"] = [{"name": "session-proxy", "image": "i", "restartPolicy": "Always"}]
    return runner


def generated(labels: Mapping[str, str]) -> Manifest:
    created = pod(labels, generateName="demo-")
    del created["metadata"]["name"]
    return created


def create(user: str, created: Manifest) -> Request:
    return Request(user, "CREATE", "pods", created)


def update(user: str, old: Manifest, new: Manifest, subresource: str = "") -> Request:
    return Request(user, "UPDATE", f"pods/{subresource}" if subresource else "pods", new, old)


def bind(user: str, labels: Mapping[str, str], resource: str = "pods/binding") -> Request:
    metadata = {"name": "demo-workspace", "namespace": NAMESPACE, **({"labels": dict(labels)} if labels else {})}
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": {"kind": "Node", "name": "node1"}}
    return Request(user, "CREATE", resource, binding)


def connect(user: str, subresource: str = "exec", **options: Any) -> Request:
    """A CONNECT request; its object is the options, without metadata, and what is unset is left out."""
    kinds = {
        "exec": "PodExecOptions",
        "attach": "PodAttachOptions",
        "portforward": "PodPortForwardOptions",
        "proxy": "PodProxyOptions",
    }
    if subresource == "exec":
        options = {"command": ["sh"], "stdin": True, "stdout": True, "stderr": True} | options
    return Request(user, "CONNECT", f"pods/{subresource}", {"kind": kinds[subresource], "apiVersion": "v1"} | options)


# --- the table --------------------------------------------------------------------------------------------------------

CREATES = "may create session pods"
LABELS = "set or change the labels"
OWNERS = "set or change the owner references"
IMAGES = "change the images of session pods"
SUBRESOURCES = "by way of its subresources"
EPHEMERAL = "no ephemeral container"
CONTAINER = "the workspace container only"
NO_ATTACH = "neither attach, forward ports nor proxy"

blocking = OWNER | {"blockOwnerDeletion": True}

ALLOWED = {
    # identity
    "a creator creates a workspace": create(CREATOR, pod(WORKSPACE, (OWNER,))),
    "a creator creates a runner": create(CREATOR, pod(RUNNER)),
    "a creator sets the owner": update(CREATOR, pod(WORKSPACE), pod(WORKSPACE, (OWNER,))),
    "a creator changes an image": update(CREATOR, runner_pod(), with_image(runner_pod(), "j", "initContainers")),
    "a person changes the image of an ordinary pod": update(PERSON, pod(), with_image(pod(), "j")),
    "a person annotates a runner": update(
        PERSON, runner_pod(), pod(RUNNER, annotations={}) | {"spec": runner_pod()["spec"]}
    ),
    "a creator takes labels away": update(CREATOR, pod(WORKSPACE), pod()),
    "a person creates an ordinary pod": create(PERSON, pod()),
    "a person creates a pod with a generated name": create(PERSON, generated({"app": "web"})),
    "a person creates a pod with the label session alone": create(PERSON, pod({"session": "demo"})),
    "a person creates a pod with the label type alone": create(PERSON, pod({"type": "workspace"})),
    "a person creates a pod of another type": create(PERSON, pod({"session": "demo", "type": "database"})),
    "a person annotates a workspace": update(
        PERSON, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE, (OWNER,), annotations={})
    ),
    "a person adds another label to a workspace": update(PERSON, pod(WORKSPACE), pod(WORKSPACE | {"team": "a"})),
    "a person labels an ordinary pod": update(PERSON, pod(), pod({"session": "demo"})),
    "a controller creates an ordinary pod with its owner": create(REPLICA_SETS, pod({"app": "web"}, (REPLICA_SET,))),
    "a controller without an account of its own does": create(CONTROLLERS, pod({"app": "web"}, (REPLICA_SET,))),
    "a controller adopts an ordinary pod": update(REPLICA_SETS, pod({"a": "b"}), pod({"a": "b"}, (REPLICA_SET,))),
    "the garbage collector takes a reference away": update(
        COLLECTOR, pod(WORKSPACE, (OWNER, SECOND)), pod(WORKSPACE, (OWNER,))
    ),
    "the garbage collector orphans a workspace": update(COLLECTOR, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE)),
    "a collector without an account of its own does": update(CONTROLLERS, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE)),
    "the garbage collector unblocks an owner": update(COLLECTOR, pod(WORKSPACE, (blocking,)), pod(WORKSPACE, (OWNER,))),
    "anybody does anything in a namespace without the label": replace(
        create(PERSON, pod(WORKSPACE, (OWNER,))), namespace="elsewhere"
    ),
    # subresources
    "the kubelet reports a status": update(NODE, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE, (OWNER,)), "status"),
    "a status of a pod without labels": update(NODE, pod(), pod(), "status"),
    "a status changes another label": update(PERSON, pod(WORKSPACE), pod(WORKSPACE | {"a": "b"}), "status"),
    "a person resizes a workspace": update(PERSON, pod(WORKSPACE), pod(WORKSPACE), "resize"),
    "the scheduler binds a pod": bind("system:kube-scheduler", {}),
    "a binding brings the node's topology": bind("system:kube-scheduler", {"topology.kubernetes.io/zone": "a"}),
    "a binding by the old resource": bind("system:kube-scheduler", {}, "bindings"),
    # ephemeral containers
    "ephemeral containers stay as they are": update(
        PERSON, pod(WORKSPACE, (), (DEBUGGER,)), pod(WORKSPACE, (), (DEBUGGER,)), "ephemeralcontainers"
    ),
    "no ephemeral container is added": update(PERSON, pod(WORKSPACE), pod(WORKSPACE), "ephemeralcontainers"),
    # exec
    "the sidecar execs into the workspace": connect(SIDECAR, container="workspace"),
    "a sidecar of another namespace execs into the workspace": connect(ELSEWHERE, container="workspace"),
    "a person execs into the runner": connect(PERSON, container="runner"),
    "a person execs without naming a container": connect(PERSON),
    "a person forwards a port": connect(PERSON, "portforward", ports=[8080]),
    "a creator execs into the runner": connect(CREATOR, container="runner"),
    "a creator attaches": connect(CREATOR, "attach", container="runner"),
}

DENIED = {
    # identity
    "a person creates a workspace": (create(PERSON, pod(WORKSPACE)), CREATES),
    "an administrator who is no creator does": (create(ADMINISTRATOR, pod(WORKSPACE)), CREATES),
    "a person creates a runner": (create(PERSON, pod(RUNNER)), CREATES),
    "a person creates a workspace with a generated name": (create(PERSON, generated(WORKSPACE)), CREATES),
    "a ReplicaSet makes a workspace": (create(REPLICA_SETS, pod(WORKSPACE, (REPLICA_SET,))), CREATES),
    "a node makes a static workspace": (create(NODE, pod(WORKSPACE)), CREATES),
    "the sidecar creates a workspace": (create(SIDECAR, pod(WORKSPACE)), CREATES),
    "a person whose name begins as a creator's": (create(CREATOR[:-1], pod(WORKSPACE)), CREATES),
    "a person changes the sidecar's image": (
        update(PERSON, runner_pod(), with_image(runner_pod(), "j", "initContainers")),
        IMAGES,
    ),
    "a person changes the runner's image": (update(PERSON, runner_pod(), with_image(runner_pod(), "j")), IMAGES),
    "a person changes the workspace's image": (update(PERSON, pod(WORKSPACE), with_image(pod(WORKSPACE), "j")), IMAGES),
    "a person labels a pod as a workspace": (update(PERSON, pod(), pod(WORKSPACE)), LABELS),
    "a person adds type to session": (update(PERSON, pod({"session": "demo"}), pod(WORKSPACE)), LABELS),
    "a person adds session to type": (update(PERSON, pod({"type": "workspace"}), pod(WORKSPACE)), LABELS),
    "a person turns another type into a workspace": (
        update(PERSON, pod({"session": "demo", "type": "database"}), pod(WORKSPACE)),
        LABELS,
    ),
    "a person moves a workspace to another session": (
        update(PERSON, pod(WORKSPACE), pod(WORKSPACE | {"session": "other"})),
        LABELS,
    ),
    "a person turns a workspace into a runner": (update(PERSON, pod(WORKSPACE), pod(RUNNER)), LABELS),
    "a person takes type away": (update(PERSON, pod(WORKSPACE), pod({"session": "demo"})), LABELS),
    "a person takes session away": (update(PERSON, pod(WORKSPACE), pod({"type": "workspace"})), LABELS),
    "a person takes every label away": (update(PERSON, pod(WORKSPACE), pod()), LABELS),
    "a controller relabels a workspace": (update(REPLICA_SETS, pod(WORKSPACE), pod({"app": "web"})), LABELS),
    "a person sets the owner of a workspace": (update(PERSON, pod(WORKSPACE), pod(WORKSPACE, (OWNER,))), OWNERS),
    "a person changes the owner's UID": (
        update(PERSON, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE, (OWNER | {"uid": "u-9"},))),
        OWNERS,
    ),
    "a person adds an owner": (update(PERSON, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE, (OWNER, SECOND))), OWNERS),
    "a person takes the owner away": (update(PERSON, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE)), OWNERS),
    "a person creates a pod of the workspace's name and owner without labels": (
        create(PERSON, pod({}, (OWNER,))),
        OWNERS,
    ),
    "the same with an owner of another kind and the same UID": (
        create(PERSON, pod({}, (OWNER | {"kind": "ConfigMap"},))),
        OWNERS,
    ),
    "a person gives an ordinary pod an owner": (update(PERSON, pod(), pod({}, (OWNER,))), OWNERS),
    "a ReplicaSet adopts a workspace": (update(REPLICA_SETS, pod(WORKSPACE), pod(WORKSPACE, (REPLICA_SET,))), OWNERS),
    "a ReplicaSet adopts a runner": (update(REPLICA_SETS, pod(RUNNER), pod(RUNNER, (REPLICA_SET,))), OWNERS),
    "a ReplicaSet adopts and unlabels at once": (
        update(REPLICA_SETS, pod(WORKSPACE), pod({"app": "web"}, (REPLICA_SET,))),
        OWNERS,
    ),
    "the garbage collector adds an owner": (update(COLLECTOR, pod(WORKSPACE), pod(WORKSPACE, (OWNER,))), OWNERS),
    "the garbage collector changes a UID": (
        update(COLLECTOR, pod(WORKSPACE, (OWNER,)), pod(WORKSPACE, (OWNER | {"uid": "u-9"},))),
        OWNERS,
    ),
    # subresources
    "a status makes a workspace": (update(PERSON, pod({"session": "demo"}), pod(WORKSPACE), "status"), SUBRESOURCES),
    "a status takes type away": (update(NODE, pod(WORKSPACE), pod({"session": "demo"}), "status"), SUBRESOURCES),
    "a status takes every label away": (update(NODE, pod(WORKSPACE), pod(), "status"), SUBRESOURCES),
    "a status moves a session, by a creator": (
        update(CREATOR, pod(WORKSPACE), pod(WORKSPACE | {"session": "other"}), "status"),
        SUBRESOURCES,
    ),
    "a resize makes a workspace": (update(PERSON, pod(), pod(WORKSPACE), "resize"), SUBRESOURCES),
    "ephemeralcontainers makes a workspace": (
        update(PERSON, pod(), pod(WORKSPACE), "ephemeralcontainers"),
        SUBRESOURCES,
    ),
    "a binding brings both labels": (bind(PERSON, WORKSPACE), SUBRESOURCES),
    "a binding brings one label": (bind("system:kube-scheduler", {"type": "workspace"}), SUBRESOURCES),
    "a binding by the old resource brings both": (bind(CREATOR, WORKSPACE, "bindings"), SUBRESOURCES),
    # ephemeral containers
    "a person debugs a workspace": (
        update(PERSON, pod(WORKSPACE), pod(WORKSPACE, (), (DEBUGGER,)), "ephemeralcontainers"),
        EPHEMERAL,
    ),
    "a creator debugs a runner": (
        update(CREATOR, pod(RUNNER), pod(RUNNER, (), (DEBUGGER,)), "ephemeralcontainers"),
        EPHEMERAL,
    ),
    "a person debugs a pod without labels": (
        update(PERSON, pod(), pod({}, (), (DEBUGGER,)), "ephemeralcontainers"),
        EPHEMERAL,
    ),
    "one more ephemeral container": (
        update(
            PERSON,
            pod(WORKSPACE, (), (DEBUGGER,)),
            pod(WORKSPACE, (), (DEBUGGER, DEBUGGER | {"name": "two"})),
            "ephemeralcontainers",
        ),
        EPHEMERAL,
    ),
    "another image in an ephemeral container": (
        update(
            PERSON,
            pod(WORKSPACE, (), (DEBUGGER,)),
            pod(WORKSPACE, (), (DEBUGGER | {"image": "evil"},)),
            "ephemeralcontainers",
        ),
        EPHEMERAL,
    ),
    # exec
    "the sidecar execs into another container": (connect(SIDECAR, container="session-proxy"), CONTAINER),
    "the sidecar names no container": (connect(SIDECAR), CONTAINER),
    "the sidecar names an empty container": (connect(SIDECAR, container=""), CONTAINER),
    "a sidecar of another namespace execs into another container": (connect(ELSEWHERE, container="runner"), CONTAINER),
    "the sidecar attaches to the workspace": (connect(SIDECAR, "attach", container="workspace"), NO_ATTACH),
    "the sidecar forwards a port": (connect(SIDECAR, "portforward", ports=[8080]), NO_ATTACH),
    "the sidecar proxies": (connect(SIDECAR, "proxy", path="/"), NO_ATTACH),
}


@pytest.mark.parametrize("request_", ALLOWED.values(), ids=ALLOWED)
def test_what_has_to_work_is_admitted(request_: Request) -> None:
    assert denials(request_) == []


@pytest.mark.parametrize(("request_", "why"), DENIED.values(), ids=DENIED)
def test_the_rest_is_denied_with_the_reason(request_: Request, why: str) -> None:
    found = denials(request_)
    assert any(why in message for message in found), found
    assert not any("ERROR" in message or "not found" in message for message in found), found


def test_the_objects_of_the_table_are_kubernetes_objects() -> None:
    everything = pod(WORKSPACE, (OWNER, REPLICA_SET, SECOND, blocking), (DEBUGGER,), annotations={"a": "b"})
    for manifest in (everything, generated(WORKSPACE), bind(PERSON, WORKSPACE).object):
        kubernetes_validate.validate(manifest, "1.30", strict=True)


# --- each part is needed ----------------------------------------------------------------------------------------------


def without(policy: Policy, *, validation: int | None = None, condition: int | None = None) -> tuple[Policy, ...]:
    changed = replace(
        policy,
        validations=tuple(each for index, each in enumerate(policy.validations) if index != validation),
        conditions=tuple(each for index, each in enumerate(policy.conditions) if index != condition),
    )
    return tuple(changed if each is policy else each for each in policies())


def test_without_any_one_validation_something_denied_would_pass() -> None:
    for policy in policies():
        for index, (_, message) in enumerate(policy.validations):
            rest = without(policy, validation=index)
            assert any(not denials(request, these=rest) for request, _ in DENIED.values()), message


def test_without_any_one_condition_something_admitted_would_be_denied() -> None:
    for policy in policies():
        for index, condition in enumerate(policy.conditions):
            rest = without(policy, condition=index)
            assert any(denials(request, these=rest) for request in ALLOWED.values()), condition.text


def test_every_resource_of_every_rule_is_needed() -> None:
    for policy in policies():
        for number, rule in enumerate(policy.rules):
            for resource in rule["resources"]:
                less = {**rule, "resources": [each for each in rule["resources"] if each != resource]}
                changed = replace(policy, rules=(*policy.rules[:number], less, *policy.rules[number + 1 :]))
                rest = tuple(changed if each is policy else each for each in policies())
                passes = [why for request, why in DENIED.values() if not denials(request, these=rest)]
                assert passes, f"{policy.name}: {resource}"


# --- parameters -------------------------------------------------------------------------------------------------------

Change = Callable[[Manifest], object]


def with_config_map(change: Change) -> Cluster:
    changed = copy.deepcopy(cluster().config_maps)
    for config_map in changed.values():
        change(config_map)
    return replace(cluster(), config_maps=changed)


WITHOUT_CREATORS: dict[str, Change] = {
    "no data": lambda config_map: config_map.pop("data"),
    "no key": lambda config_map: config_map["data"].pop("creators"),
    "an empty value": lambda config_map: config_map["data"].update(creators=""),
    "a value of white space": lambda config_map: config_map["data"].update(creators=" \n \n"),
    "the name with more on its line": lambda config_map: config_map["data"].update(creators=f"{CREATOR} # us"),
}


@pytest.mark.parametrize("change", WITHOUT_CREATORS.values(), ids=WITHOUT_CREATORS)
def test_without_creators_nobody_is_one(change: Change) -> None:
    where = with_config_map(change)
    assert any(CREATES in why for why in denials(create(CREATOR, pod(WORKSPACE)), where))
    assert any(CONTAINER in why for why in denials(connect(CREATOR, container="runner"), where))
    assert denials(create(PERSON, pod()), where) == []


def test_several_creators_stand_on_a_line_each() -> None:
    where = with_config_map(lambda config_map: config_map["data"].update(creators=f"first\n{PERSON}\nlast\n"))
    for user in ("first", PERSON, "last"):
        assert denials(create(user, pod(WORKSPACE)), where) == []
    for user in (CREATOR, "fir", "first\nlast", f"{PERSON}\n"):
        assert denials(create(user, pod(WORKSPACE)), where)


@pytest.mark.parametrize("change", [WITHOUT_CREATORS["no data"], lambda c: c["data"].pop("workspaceContainer")])
def test_without_the_workspace_containers_name_no_service_account_execs(change: Change) -> None:
    where = with_config_map(change)
    assert any(CONTAINER in why for why in denials(connect(SIDECAR, container="workspace"), where))
    assert denials(connect(PERSON, container="runner"), where) == []


def test_without_the_config_map_nobody_changes_pods_or_execs_but_the_kubelet_reports() -> None:
    where = replace(cluster(), config_maps={})
    for request in (
        create(CREATOR, pod(WORKSPACE)),
        create(PERSON, pod()),
        connect(SIDECAR, container="workspace"),
        connect(PERSON, container="workspace"),
    ):
        assert denials(request, where) == ["failed to configure binding: no params found"]
    assert denials(ALLOWED["the kubelet reports a status"], where) == []
    assert denials(ALLOWED["the scheduler binds a pod"], where) == []


# --- the evaluator itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("request.verb == 'get'", "undeclared reference"),
        ("params.data.x == ''", "undeclared reference"),
        ("variables.labels == {}", "undeclared reference"),
        ("object.metadata.labels", "must evaluate to bool"),
        ("request.operation == 1", "no matching overload"),
        ("nothing(object)", "undeclared reference"),
        ("object.metadata ==", "Syntax error"),
    ],
)
def test_what_kubernetes_would_not_compile_is_not_compiled(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Expression(text, params=False)


@pytest.mark.parametrize(
    "text", ["oldObject.metadata.name == 'x'", "has(oldObject.metadata)", "object.metadata.x == 'x'"]
)
def test_what_is_not_there_is_an_error_and_an_error_denies(text: str) -> None:
    (policy,) = [each for each in policies() if each.name == "session-proxy-identity"]
    failing = replace(policy, conditions=(), variables={}, validations=((Expression(text, params=False), "no"),))
    (why,) = failing.denials(create(CREATOR, pod()), cluster())
    assert text in why
    # A condition that fails denies as well, unless another one says that the policy does not apply.
    failing = replace(policy, conditions=(Expression(text, params=False),), validations=())
    (why,) = failing.denials(create(CREATOR, pod()), cluster())
    assert text in why
    excused = replace(failing, conditions=(*failing.conditions, Expression("false", params=False)))
    assert list(excused.denials(create(CREATOR, pod()), cluster())) == []
