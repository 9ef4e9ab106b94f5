"""Every Prometheus series of a front end, in one place: names, labels, buckets and how they are fed.

Seconds and bytes, counters end in `_total`; the names are part of the interface (dashboards and alerts use them).
Label values are bounded: the served model, the fixed routes, HTTP statuses, encodings, phases, ranks and layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from moe_forward.errors import ErrorCode
from moe_forward.types import PHASES, EngineStatus, StepReport

PREFIX = "moe_forward_"
REQUEST_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PHASE_SECONDS = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
SIZES = tuple(float(1 << power) for power in range(14))
BODY_BYTES = tuple(1000.0 * 4**power for power in range(11))

REJECTIONS = {
    ErrorCode.QUEUE_FULL: "queue_full",
    ErrorCode.DEADLINE_EXCEEDED: "deadline",
    ErrorCode.BODY_TIMEOUT: "deadline",
    ErrorCode.DRAINING: "draining",
    ErrorCode.NOT_READY: "unavailable",
    ErrorCode.RANK_LOST: "unavailable",
    ErrorCode.TOO_LARGE: "too_large",
    ErrorCode.UNAUTHORIZED: "auth",
    ErrorCode.FORBIDDEN: "auth",
}
"""Error code -> `reason` of `moe_forward_rejected_total`; a request that is simply wrong is not a rejection."""


@dataclass(slots=True)
class RequestRecord:
    """What is known of one forward request when it ends; the log line and the metrics are made from it.

    route: path template. model: the served model, whatever name the client sent.
    status: HTTP status, 499 where the client went away. code: None when answered.
    encoding, layer, tokens, body_bytes: None until known.
    error: the sentence of a 5xx; that of a 4xx may quote what the client sent, so it is not kept.
    *_seconds: None for a part that was not reached; `duration_seconds` is the whole request.
    """

    route: str
    request_id: str
    model: str
    status: int = 200
    code: ErrorCode | None = None
    encoding: str | None = None
    layer: int | None = None
    tokens: int | None = None
    body_bytes: int | None = None
    decode_seconds: float | None = None
    encode_seconds: float | None = None
    queue_seconds: float | None = None
    step_seconds: float | None = None
    duration_seconds: float = 0.0
    error: str | None = None

    def fields(self) -> dict[str, Any]:
        """Return what the log line of the request says, the code as its slug."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "code": None if self.code is None else self.code.slug}


def package_version(name: str) -> str:
    """Return the installed version of a distribution, "unknown" for one that runs from its source folder."""
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return "unknown"


class Metrics:
    """The series of one front end.

    registry: where they are registered; a test gives its own.
    wall_clock: Unix time in seconds; its value now is when the front end started.
    """

    def __init__(self, registry: CollectorRegistry, wall_clock: Callable[[], float] = time.time) -> None:
        self._started_seconds = wall_clock()
        self._restarts: dict[int, int] = {}  # rank -> restarts counted; its keys are the ranks ever seen
        self._started_ranks: set[int] = set()
        self._build: tuple[str, str] | None = None

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, registry=registry, buckets=buckets)

        self._requests = counter("requests_total", "Forward requests by HTTP status.", "model", "route", "code")
        self._tokens = counter("tokens_total", "Tokens of answered forward requests.", "model")
        self._rejected = counter("rejected_total", "Requests refused for a reason other than their content.", "reason")
        self._requantized = counter(
            "requantized_tokens_total", "fp8 tokens that came with the other scale granularity.", "model"
        )
        self._rank_tokens = counter("rank_tokens_total", "Rows that a rank's experts computed.", "rank")
        self._rank_restarts = counter("rank_restarts_total", "Times a rank was started again.", "rank")

        self._request_seconds = histogram(
            "request_duration_seconds", "Forward request, first header to last byte.", REQUEST_SECONDS, "model", "route"
        )
        self._queue_seconds = histogram(
            "queue_duration_seconds", "Wait of a request for its step.", REQUEST_SECONDS, "model"
        )
        self._phase_seconds = histogram(
            "phase_duration_seconds", "One phase of one step on one rank.", PHASE_SECONDS, "model", "rank", "phase"
        )
        self._decode_seconds = histogram(
            "decode_duration_seconds", "Body to checked tensors.", PHASE_SECONDS, "encoding"
        )
        self._encode_seconds = histogram("encode_duration_seconds", "Output to reply body.", PHASE_SECONDS, "encoding")
        self._body_bytes = histogram("request_body_bytes", "Size of a request body.", BODY_BYTES, "encoding")
        self._batch_tokens = histogram("batch_tokens", "Tokens of a step.", SIZES, "model")
        self._batch_requests = histogram("batch_requests", "Requests of a step.", SIZES, "model")

        self._queue_requests = gauge("queue_requests", "Requests waiting after the last step.", "model")
        self._queue_tokens = gauge("queue_tokens", "Tokens waiting after the last step.", "model")
        self._inflight = gauge("inflight_requests", "Forward requests being served.", "model")
        self._rank_up = gauge("rank_up", "1 while the rank is ready, else 0.", "rank")
        self._imbalance = gauge(
            "expert_load_imbalance_ratio", "Rows of the busiest rank over the mean, in the layer's last step.", "layer"
        )
        self._placement = gauge("placement_generation", "Number of the current rank group.")
        self._gpu_memory = gauge("gpu_memory_bytes", "Memory of a rank's GPU when it became ready.", "rank", "kind")
        self._load_seconds = gauge("weights_load_duration_seconds", "Time a rank took to load its shard.", "rank")
        self._startup_seconds = gauge(
            "startup_duration_seconds", "From the start of the front end until the rank was first ready.", "rank"
        )
        self._build_info = gauge(
            "build_info", "Versions and backends in use; always 1.", "version", "torch", "ray", "backend", "kernel"
        )

    def request_started(self, model: str) -> None:
        """Count a forward request in; every call is followed by one of `request_finished`."""
        self._inflight.labels(model).inc()

    def request_finished(self, record: RequestRecord) -> None:
        """Count a forward request out, however it ended."""
        model, route = record.model, record.route
        self._inflight.labels(model).dec()
        self._requests.labels(model, route, str(record.status)).inc()
        self._request_seconds.labels(model, route).observe(record.duration_seconds)
        if record.code is None:
            self._tokens.labels(model).inc(record.tokens or 0)
        else:
            self.rejected(record.code)
        if record.queue_seconds is not None:
            self._queue_seconds.labels(model).observe(record.queue_seconds)
        if record.encoding is not None:
            for series, value in (
                (self._body_bytes, record.body_bytes),
                (self._decode_seconds, record.decode_seconds),
                (self._encode_seconds, record.encode_seconds),
            ):
                if value is not None:
                    series.labels(record.encoding).observe(value)

    def rejected(self, code: ErrorCode) -> None:
        """Count a refusal; codes that blame the request's content are left to `requests_total`."""
        reason = REJECTIONS.get(code)
        if reason is not None:
            self._rejected.labels(reason).inc()

    def step_finished(self, model: str, report: StepReport) -> None:
        """Take in one finished step of the engine."""
        self._batch_tokens.labels(model).observe(report.tokens)
        self._batch_requests.labels(model).observe(report.requests)
        self._queue_requests.labels(model).set(report.queue_requests)
        self._queue_tokens.labels(model).set(report.queue_tokens)
        for result in report.results:
            timed = PHASES if result.phase_seconds else ()
            for phase, seconds in zip(timed, result.phase_seconds, strict=True):
                if seconds > 0:  # a phase that did not happen (say, routing that the client did) is no observation
                    self._phase_seconds.labels(model, result.rank, phase).observe(seconds)
            self._rank_tokens.labels(result.rank).inc(result.routed_rows)
            self._requantized.labels(model).inc(result.requantized_tokens)
        rows = [result.routed_rows for result in report.results]
        if sum(rows) > 0:
            self._imbalance.labels(report.layer).set(max(rows) * len(rows) / sum(rows))

    def status_changed(self, status: EngineStatus) -> None:
        """Take in the engine's description of itself and of its ranks."""
        self._placement.set(status.generation)
        for rank in self._restarts.keys() - {info.rank for info in status.ranks}:
            self._rank_up.labels(rank).set(0)  # the engine that knew it is gone, or the group is being started again
        for info in status.ranks:
            rank, ready = info.rank, info.state == "ready"
            self._rank_up.labels(rank).set(ready)
            again = max(0, status.restarts - self._restarts.get(rank, 0))
            self._rank_restarts.labels(rank).inc(again)  # ranks restart as one group
            self._restarts[rank] = status.restarts
            if ready:
                self._load_seconds.labels(rank).set(info.load_seconds)
            if ready and info.free_bytes:
                kinds = {"weights": info.memory_bytes, "buffers": info.buffer_bytes, "free": info.free_bytes}
                for kind, nbytes in kinds.items():
                    self._gpu_memory.labels(rank, kind).set(nbytes)
            if ready and rank not in self._started_ranks:
                self._started_ranks.add(rank)
                # a rank that was up before this front end made it wait no time at all
                self._startup_seconds.labels(rank).set(max(0.0, info.since - self._started_seconds))
        if status.backend and self._build != (status.backend, status.kernel):
            self._build = (status.backend, status.kernel)
            self._build_info.clear()
            versions = [package_version(name) for name in ("moe-forward", "torch", "ray")]
            self._build_info.labels(*versions, *self._build).set(1)
