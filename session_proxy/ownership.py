"""Whether a pod belongs to this session: a pure function from pod JSON and settings to a verdict.

Labels and names can be chosen by whoever may create or patch pods; the UID of a living object cannot be. So only UIDs
are compared, and whatever is missing, empty or malformed does not match.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class OwnerMode(StrEnum):
    """How the owner of a workspace pod is recognised (``OWNER_MODE``)."""

    UID = "uid"
    SELF = "self"
    SIBLING = "sibling"
    NONE = "none"


def check_ownership(
    pod: Mapping[str, Any],
    *,
    mode: OwnerMode,
    owner_uid: str | None = None,
    own_pod: Mapping[str, Any] | None = None,
    own_pod_uid: str | None = None,
) -> str | None:
    """Return None when the pod is owned as ``mode`` demands, otherwise one sentence that says why it is not.

    ``uid``: an owner reference with ``owner_uid``. ``self``: an owner reference to the pod with ``own_pod_uid``.
    ``sibling``: the pod's controller is the controller of ``own_pod``, and ``own_pod`` is the one with ``own_pod_uid``
    where that is given. ``none``: always owned.
    """
    if mode is OwnerMode.NONE:
        return None
    try:
        references = _owner_references(pod, "the pod")
        if mode is OwnerMode.UID:
            return _check_uid(references, owner_uid)
        if mode is OwnerMode.SELF:
            return _check_self(references, own_pod_uid)
        return _check_sibling(references, own_pod, own_pod_uid)
    except _MalformedError as error:
        return str(error)


class _MalformedError(Exception):
    """The JSON does not have the shape of a pod."""


def _metadata(pod: object, which: str) -> Mapping[str, Any]:
    metadata = pod.get("metadata") if isinstance(pod, Mapping) else None
    if not isinstance(metadata, Mapping):
        raise _MalformedError(f"{which} has no metadata")
    return metadata


def _owner_references(pod: object, which: str) -> list[Mapping[str, Any]]:
    references = _metadata(pod, which).get("ownerReferences")
    if references is None:
        return []
    if not isinstance(references, list) or not all(isinstance(reference, Mapping) for reference in references):
        raise _MalformedError(f"the owner references of {which} are malformed")
    return references


def _is_uid(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _check_uid(references: list[Mapping[str, Any]], owner_uid: str | None) -> str | None:
    if not _is_uid(owner_uid):
        return "no owner UID is known to compare with"
    if any(reference.get("uid") == owner_uid for reference in references):
        return None
    return f"the pod has no owner reference with UID {owner_uid}"


def _check_self(references: list[Mapping[str, Any]], own_pod_uid: str | None) -> str | None:
    if not _is_uid(own_pod_uid):
        return "the UID of this pod is not known"
    if any(reference.get("uid") == own_pod_uid and reference.get("kind") == "Pod" for reference in references):
        return None
    return f"the pod has no owner reference to this pod (UID {own_pod_uid})"


def _check_sibling(
    references: list[Mapping[str, Any]], own_pod: Mapping[str, Any] | None, own_pod_uid: str | None
) -> str | None:
    if own_pod is None:
        return "this pod could not be read"
    if own_pod_uid is not None and (
        not _is_uid(own_pod_uid) or _metadata(own_pod, "this pod").get("uid") != own_pod_uid
    ):
        return f"what was read as this pod does not have its UID {own_pod_uid}"
    expected = _controller_uid(_owner_references(own_pod, "this pod"), "this pod")
    actual = _controller_uid(references, "the pod")
    if actual == expected:
        return None
    return f"the pod is controlled by UID {actual}, this pod by UID {expected}"


def _controller_uid(references: list[Mapping[str, Any]], which: str) -> str:
    # Kubernetes allows one controller; more than one is no answer to the question who it is.
    uids = [reference.get("uid") for reference in references if reference.get("controller") is True]
    if not uids:
        raise _MalformedError(f"{which} has no controller")
    uid = uids[0]
    if len(uids) > 1 or not isinstance(uid, str) or not uid:
        raise _MalformedError(f"the owner references of {which} do not name one controller")
    return uid
