"""Every error this program raises on purpose, with the ``reason`` that clients see.

Which HTTP status a reason gets is decided in one place only, ``app.STATUS_BY_REASON``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of a manifest that a rule does not allow.

    ``field`` is the JSON path (``spec.containers[0].securityContext.privileged``), ``value`` what stands there
    (shortened), ``expected`` what it must be, ``rule`` the control's name and ``message`` the sentence that Kubernetes'
    own pod security admission would print.
    """

    field: str
    value: str
    expected: str
    rule: str
    message: str

    def to_json(self) -> Mapping[str, str]:
        """Return the violation as clients see it."""
        return {
            "field": self.field,
            "value": self.value,
            "expected": self.expected,
            "rule": self.rule,
            "message": self.message,
        }


class SessionProxyError(Exception):
    """Root of all errors of this package."""


class RefusedError(SessionProxyError):
    """A request is refused before anything ran. ``reason`` is part of the HTTP contract."""

    reason = "internal_error"

    def __init__(
        self,
        detail: str,
        *,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.extra = dict(extra or {})


class InvalidRequestError(RefusedError):
    """The request itself is wrong; ``extra['member']`` names the member where there is one."""

    reason = "invalid_request"


class NotFoundError(RefusedError):
    """No such route or exec."""

    reason = "not_found"


class MethodNotAllowedError(RefusedError):
    """The route exists, this method does not."""

    reason = "method_not_allowed"


class NotAcceptableError(RefusedError):
    """``Accept`` names no format that /exec has."""

    reason = "not_acceptable"


class RequestTooLargeError(RefusedError):
    """The body is larger than MAX_REQUEST_BYTES."""

    reason = "request_too_large"


class RequestTimeoutError(RefusedError):
    """The body did not arrive in time."""

    reason = "request_timeout"


class UnauthorizedError(RefusedError):
    """LISTEN_TOKEN_FILE is set and the request carries no matching bearer token."""

    reason = "unauthorized"


class HostNotAllowedError(RefusedError):
    """The Host header is not a loopback name (DNS rebinding)."""

    reason = "host_not_allowed"


class OriginNotAllowedError(RefusedError):
    """The request comes from a browser page."""

    reason = "origin_not_allowed"


class PeerNotAllowedError(RefusedError):
    """The peer's UID is not in LISTEN_SOCKET_UIDS."""

    reason = "peer_not_allowed"


class RateLimitedError(RefusedError):
    """More requests than EXEC_RATE_PER_SECOND and EXEC_BURST allow."""

    reason = "rate_limited"


class TooManyExecsError(RefusedError):
    """MAX_CONCURRENT_EXECS are running."""

    reason = "too_many_execs"


class ShuttingDownError(RefusedError):
    """The sidecar is stopping."""

    reason = "shutting_down"


class WorkspaceNotFoundError(RefusedError):
    """No pod matches."""

    reason = "workspace_not_found"


class WorkspaceNotRunningError(RefusedError):
    """The pod is there, its workspace container is not running."""

    reason = "workspace_not_running"


class WorkspaceAmbiguousError(RefusedError):
    """More than one pod matches."""

    reason = "workspace_ambiguous"


class WorkspaceNotOwnedError(RefusedError):
    """The pod does not belong to this session."""

    reason = "workspace_not_owned"


class WorkspacePolicyViolationError(RefusedError):
    """The pod is not what it must be; see ``violations``."""

    reason = "workspace_policy_violation"


class KubeError(RefusedError):
    """The API server could not be asked, or said no."""

    reason = "kube_unavailable"


class KubeUnavailableError(KubeError):
    """The API server cannot be reached or answers 5xx."""


class KubeForbiddenError(KubeError):
    """RBAC lacks something; the detail names verb and resource."""

    reason = "kube_forbidden"


class KubeUnauthorizedError(KubeError):
    """The credential is not accepted, also not after it was read again."""

    reason = "kube_unauthorized"


class KubeTimeoutError(KubeError):
    """The API server did not answer in time."""

    reason = "kube_timeout"


class KubeNotFoundError(KubeError):
    """The API server has no such object (the caller says what that means)."""

    reason = "workspace_not_found"


class ExecStartError(SessionProxyError):
    """The command never started: outcome ``failed`` with this ``reason``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class RemoteCommandProtocolError(SessionProxyError):
    """The peer broke the channel.k8s.io protocol."""


class ConfigError(SessionProxyError):
    """Settings are wrong; ``problems`` holds a sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ManifestError(SessionProxyError):
    """A manifest cannot be read (exit status 2 of ``session-proxy check``)."""
