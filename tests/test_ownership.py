"""Whether a pod belongs to this session."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from session_proxy.ownership import OwnerMode, check_ownership

OWNER = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"
OWN = "33333333-3333-3333-3333-333333333333"

MODES = [OwnerMode.UID, OwnerMode.SELF, OwnerMode.SIBLING]
MALFORMED_PODS: list[Any] = [
    None,
    [],
    "pod",
    {},
    {"metadata": None},
    {"metadata": []},
    {"metadata": {"ownerReferences": {}}},
    {"metadata": {"ownerReferences": "x"}},
    {"metadata": {"ownerReferences": [None]}},
    {"metadata": {"ownerReferences": [{"uid": OWNER, "kind": "Pod", "controller": True}, "x"]}},
]


def reference(uid: object, **more: object) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Pod", "name": "same-name", "uid": uid, **more}


def pod(*references: Mapping[str, object], uid: str = "44444444-4444-4444-4444-444444444444") -> dict[str, Any]:
    return {"metadata": {"name": "workspace", "uid": uid, "ownerReferences": list(references)}}


def controlled(by: object, uid: str = "55555555-5555-5555-5555-555555555555") -> dict[str, Any]:
    return pod(reference(by, kind="Job", controller=True), uid=uid)


def verdict(candidate: Any, mode: OwnerMode) -> str | None:
    return check_ownership(
        candidate, mode=mode, owner_uid=OWNER, own_pod=controlled(OWNER, uid=OWNER), own_pod_uid=OWNER
    )


def test_without_an_owner_mode_every_pod_is_owned() -> None:
    assert check_ownership({}, mode=OwnerMode.NONE) is None


def test_a_pod_with_the_owner_uid_is_owned() -> None:
    assert check_ownership(pod(reference(OTHER), reference(OWNER)), mode=OwnerMode.UID, owner_uid=OWNER) is None


def test_a_pod_with_the_owner_name_but_another_uid_is_not_owned() -> None:
    problem = check_ownership(pod(reference(OTHER)), mode=OwnerMode.UID, owner_uid=OWNER)
    assert problem == f"the pod has no owner reference with UID {OWNER}"


@pytest.mark.parametrize("expected", [None, ""])
@pytest.mark.parametrize("actual", [None, "", OWNER])
@pytest.mark.parametrize("mode", [OwnerMode.UID, OwnerMode.SELF])
def test_an_expected_uid_that_is_empty_never_matches(mode: OwnerMode, actual: object, expected: str | None) -> None:
    assert check_ownership(pod(reference(actual)), mode=mode, owner_uid=expected, own_pod_uid=expected)


def test_a_pod_owned_by_this_very_pod_is_owned() -> None:
    assert check_ownership(pod(reference(OWN)), mode=OwnerMode.SELF, own_pod_uid=OWN) is None


@pytest.mark.parametrize("bad", [reference(OTHER), reference(OWN, kind="Job"), reference(OWN.upper() + "x")])
def test_a_pod_owned_by_something_else_than_this_pod_is_not_owned(bad: Mapping[str, object]) -> None:
    problem = check_ownership(pod(bad), mode=OwnerMode.SELF, own_pod_uid=OWN)
    assert problem == f"the pod has no owner reference to this pod (UID {OWN})"


@pytest.mark.parametrize("own_pod_uid", [None, OWN])
def test_a_pod_with_the_controller_of_this_pod_is_a_sibling(own_pod_uid: str | None) -> None:
    own = controlled(OWNER, uid=OWN)
    assert check_ownership(controlled(OWNER), mode=OwnerMode.SIBLING, own_pod=own, own_pod_uid=own_pod_uid) is None


def test_a_pod_with_another_controller_is_no_sibling() -> None:
    problem = check_ownership(controlled(OTHER), mode=OwnerMode.SIBLING, own_pod=controlled(OWNER))
    assert problem == f"the pod is controlled by UID {OTHER}, this pod by UID {OWNER}"


@pytest.mark.parametrize("controller", [None, False, "true", 1])
def test_an_owner_that_is_not_the_controller_makes_no_sibling(controller: object) -> None:
    candidate = pod(reference(OWNER, controller=controller))
    problem = check_ownership(candidate, mode=OwnerMode.SIBLING, own_pod=controlled(OWNER))
    assert problem == "the pod has no controller"
    assert check_ownership(controlled(OWNER), mode=OwnerMode.SIBLING, own_pod=candidate) == "this pod has no controller"


def test_two_pods_without_a_controller_are_no_siblings() -> None:
    assert check_ownership(pod(), mode=OwnerMode.SIBLING, own_pod=pod())


@pytest.mark.parametrize("uid", [None, "", 7])
def test_two_controllers_without_a_uid_are_not_the_same(uid: object) -> None:
    assert check_ownership(controlled(uid), mode=OwnerMode.SIBLING, own_pod=controlled(uid))


def test_a_pod_with_two_controllers_is_no_sibling() -> None:
    two = pod(reference(OWNER, controller=True), reference(OTHER, controller=True))
    problem = check_ownership(two, mode=OwnerMode.SIBLING, own_pod=controlled(OWNER))
    assert problem == "the owner references of the pod do not name one controller"


@pytest.mark.parametrize("own_pod_uid", [OTHER, ""])
def test_a_sibling_of_a_pod_that_only_has_the_name_of_this_one_is_not_owned(own_pod_uid: str) -> None:
    own = controlled(OWNER, uid=OWN if own_pod_uid else "")
    problem = check_ownership(controlled(OWNER), mode=OwnerMode.SIBLING, own_pod=own, own_pod_uid=own_pod_uid)
    assert problem == f"what was read as this pod does not have its UID {own_pod_uid}"


def test_without_this_pod_nothing_is_a_sibling() -> None:
    assert check_ownership(controlled(OWNER), mode=OwnerMode.SIBLING) == "this pod could not be read"


@pytest.mark.parametrize("candidate", MALFORMED_PODS, ids=repr)
@pytest.mark.parametrize("mode", MODES)
def test_a_malformed_pod_is_not_owned(mode: OwnerMode, candidate: Any) -> None:
    assert verdict(candidate, mode)


@pytest.mark.parametrize("own", MALFORMED_PODS, ids=repr)
@pytest.mark.parametrize("own_pod_uid", [None, OWN])
def test_a_malformed_own_pod_has_no_siblings(own_pod_uid: str | None, own: Any) -> None:
    assert check_ownership(controlled(OWNER), mode=OwnerMode.SIBLING, own_pod=own, own_pod_uid=own_pod_uid)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = st.sampled_from(["uid", "kind", "controller", "name"])


@settings(max_examples=100, deadline=None)
@given(
    references=JSON | st.lists(st.dictionaries(MEMBERS, JSON, max_size=4) | JSON, max_size=3),
    mode=st.sampled_from(MODES),
)
def test_no_json_without_the_expected_uid_is_owned_or_raises(references: Any, mode: OwnerMode) -> None:
    assert verdict({"metadata": {"ownerReferences": references}}, mode)
