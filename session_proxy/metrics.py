"""Prometheus metrics, by the naming conventions (prometheus.io/docs/practices/naming)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from session_proxy import __version__
from session_proxy.errors import RefusedError
from session_proxy.execution import Execution, Outcome

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600, 1800, 3600)


class Metrics:
    """All metrics of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        Gauge("session_proxy_build_info", "Version of the daemon.", ["version"], registry=registry).labels(
            __version__
        ).set(1)
        self._execs = Counter("session_proxy_execs", "Ended execs by outcome.", ["outcome"], registry=registry)
        self._duration = Histogram(
            "session_proxy_exec_duration_seconds",
            "From the open gate to the verdict.",
            ["outcome"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_byte = Histogram(
            "session_proxy_exec_first_byte_seconds",
            "From the request to the first byte of output.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge("session_proxy_execs_in_flight", "Execs that are running.", registry=registry)
        self._bytes = Counter(
            "session_proxy_exec_output_bytes", "Output passed on, by stream.", ["stream"], registry=registry
        )
        self._refusals = Counter(
            "session_proxy_refusals", "Requests refused before anything ran, by reason.", ["reason"], registry=registry
        )
        self._calls = Counter(
            "session_proxy_kube_requests",
            "Requests to the API server by verb, resource and HTTP status (0: no answer).",
            ["verb", "resource", "code"],
            registry=registry,
        )
        self._call_seconds = Histogram(
            "session_proxy_kube_request_duration_seconds",
            "Time to the API server's answer.",
            ["verb", "resource"],
            buckets=_SECONDS[:13],
            registry=registry,
        )
        self._reaps = Counter(
            "session_proxy_reaps",
            "Kills, by whether it was verified that nothing was left.",
            ["result"],
            registry=registry,
        )
        for outcome in Outcome:
            self._execs.labels(outcome)
        for stream in ("stdout", "stderr"):
            self._bytes.labels(stream)
        for result in ("verified", "unverified"):
            self._reaps.labels(result)

    def render(self) -> bytes:
        """Return the text exposition."""
        return generate_latest(self._registry)

    def exec_started(self, execution: Execution) -> None:
        """Count one in flight."""
        del execution
        self._in_flight.inc()

    def exec_ended(self, execution: Execution) -> None:
        """Count the outcome, the time and the bytes."""
        if execution.verdict is None:
            return
        outcome = execution.verdict.outcome
        self._execs.labels(outcome).inc()
        self._bytes.labels("stdout").inc(execution.stdout_bytes)
        self._bytes.labels("stderr").inc(execution.stderr_bytes)
        if execution.started:
            self._in_flight.dec()
            self._duration.labels(outcome).observe(execution.duration_seconds)
        if "first_byte" in execution.stages:
            before = ("locate", "upgrade", "gate", "first_byte")
            self._first_byte.observe(sum(execution.stages.get(stage, 0.0) for stage in before))
        if execution.started and execution.reaped is not None:
            self._reaps.labels("verified" if execution.reaped else "unverified").inc()

    def exec_refused(self, execution: Execution, error: RefusedError) -> None:
        """Nothing: refusals of every kind are counted where they become responses."""

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        self._refusals.labels(reason).inc()

    def kube_called(self, verb: str, resource: str, code: int, seconds: float) -> None:
        """Count a call of the API server."""
        self._calls.labels(verb, resource, str(code)).inc()
        self._call_seconds.labels(verb, resource).observe(seconds)
