"""Every Prometheus series of a front end, in one place: names, labels, buckets and how they are fed.

Seconds and bytes, counters end in `_total`; the names are part of the interface (dashboards and alerts use them).
Label values are bounded: the served model, the fixed routes, HTTP statuses, encodings, phases, ranks, layers, experts.
A scrape in OpenMetrics format also names traces, one a bucket of the request durations, as exemplars.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from prometheus_client import CollectorRegistry

from moe_forward.counted_together import CountedTogether
from moe_forward.errors import ErrorCode
from moe_forward.expert_tokens import ExpertTokens
from moe_forward.rebalances import RESULTS, Rebalances
from moe_forward.request_record import RequestRecord
from moe_forward.series import Counter, Gauge, Histogram, Settling
from moe_forward.types import PHASES, EngineStatus, QueueReport, StepReport

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
    expert_metrics: count the tokens of every expert. tracing: count what goes wrong with spans.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        wall_clock: Callable[[], float] = time.time,
        *,
        expert_metrics: bool = False,
        tracing: bool = False,
    ) -> None:
        self._started_seconds = wall_clock()
        self._restarts: dict[int, int] = {}  # rank -> restarts counted; its keys are the ranks ever seen
        self._started_ranks: set[int] = set()
        self._rank_counters: dict[int, tuple[Counter, Counter, Counter]] = {}
        self._build: tuple[str, str] | None = None
        self._changes = Rebalances()
        self._missing: dict[int, tuple[int, ...]] = {}  # experts that a rank group lacked, by its generation
        self._finished: CountedTogether[RequestRecord] = CountedTogether(self._count_requests)
        self._steps: CountedTogether[tuple[str, StepReport]] = CountedTogether(self._count_steps)
        self._queue: tuple[str, QueueReport] | None = None  # as last told
        registry.register(Settling(self._settle))  # the first, so that what it counts is in what the others show

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
        self._dropped = counter(
            "dropped_assignments_total", "Routes of tokens to experts that no rank holds; they added nothing.", "model"
        )
        self._rebalances = counter(
            "rebalances_total", "Changes of which ranks hold which experts: degraded, restored or failed.", "result"
        )
        for result in RESULTS:
            self._rebalances.labels(result)  # there from the start, so that the first one is seen as a rise
        self._rank_restarts = counter("rank_restarts_total", "Times a rank was started again.", "rank")
        self._exchange_bytes = counter(
            "exchange_bytes_total",
            "Payload that a rank got from other ranks (dispatch) and sent back to them (combine).",
            *("rank", "direction"),
        )
        self._expert_tokens: ExpertTokens | None = None
        if expert_metrics:
            self._expert_tokens = ExpertTokens(PREFIX + "expert_tokens", "Rows that an expert computed.", registry)
        self._export_failures: Counter | None = None
        if tracing:
            self._export_failures = counter("trace_export_failures_total", "Batches of spans that were lost.")

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

        self._queue_requests = gauge("queue_requests", "Requests waiting for a step.", "model")
        self._queue_tokens = gauge("queue_tokens", "Tokens waiting for a step.", "model")
        self._inflight = gauge("inflight_requests", "Forward requests being served.", "model")
        self._rank_up = gauge("rank_up", "1 while the rank is ready, else 0.", "rank")
        self._imbalance = gauge(
            "expert_load_imbalance_ratio", "Rows of the busiest rank over the mean, in the layer's last step.", "layer"
        )
        self._degraded = gauge(
            "degraded", "1 while ranks or experts are missing or requests are refused, else 0.", "model"
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
        self._finished.add(record)

    def _settle(self) -> None:
        self._finished.settle()
        self._steps.settle()
        if self._queue is not None:
            model, report = self._queue
            self._queue_requests.labels(model).set(report.requests)
            self._queue_tokens.labels(model).set(report.tokens)

    def _count_requests(self, records: list[RequestRecord]) -> None:
        alike: dict[tuple[str, str, int, ErrorCode | None, str | None], list[RequestRecord]] = defaultdict(list)
        for record in records:
            alike[record.model, record.route, record.status, record.code, record.encoding].append(record)
        for (model, route, status, code, encoding), found in alike.items():
            self._inflight.labels(model).dec(len(found))
            self._requests.labels(model, route, str(status)).inc(len(found))
            if code is None:
                self._tokens.labels(model).inc(sum([record.tokens or 0 for record in found]))
            else:
                self.rejected(code, len(found))
            observe = self._request_seconds.labels(model, route).observe
            for record in found:
                exemplar = {"trace_id": record.trace_id} if record.sampled and record.trace_id else None
                observe(record.duration_seconds, exemplar)
            _observe(self._queue_seconds, model, [record.queue_seconds for record in found])
            if encoding is not None:
                _observe(self._body_bytes, encoding, [record.body_bytes for record in found])
                _observe(self._decode_seconds, encoding, [record.decode_seconds for record in found])
                _observe(self._encode_seconds, encoding, [record.encode_seconds for record in found])

    def rejected(self, code: ErrorCode, requests: int = 1) -> None:
        """Count refusals for one reason; codes that blame the request's content are left to `requests_total`."""
        reason = REJECTIONS.get(code)
        if reason is not None:
            self._rejected.labels(reason).inc(requests)

    def export_failed(self) -> None:
        """Count a batch of spans that nobody took; may be called from any thread."""
        if self._export_failures is not None:
            self._export_failures.inc()

    def queue_changed(self, model: str, report: QueueReport) -> None:
        """Take in what waits in the engine."""
        self._queue = model, report

    def step_finished(self, model: str, report: StepReport) -> None:
        """Take in one finished step of the engine."""
        self._steps.add((model, report))
        self.queue_changed(model, QueueReport(report.queue_requests, report.queue_tokens))

    def _count_steps(self, steps: list[tuple[str, StepReport]]) -> None:
        sums: dict[Counter, int] = defaultdict(int)
        for model, report in steps:
            self._count_step(model, report, sums)
        for series, amount in sums.items():
            series.inc(amount)

    def _count_step(self, model: str, report: StepReport, sums: dict[Counter, int]) -> None:
        self._batch_tokens.labels(model).observe(report.tokens)
        self._batch_requests.labels(model).observe(report.requests)
        requantized, dropped, rows = 0, 0, []
        for result in report.results:
            timed = PHASES if result.phase_seconds else ()
            for phase, seconds in zip(timed, result.phase_seconds, strict=True):
                if seconds > 0:  # a phase that did not happen (say, routing that the client did) is no observation
                    self._phase_seconds.labels(model, result.rank, phase).observe(seconds)
            tokens, dispatched, combined = self._counters_of(result.rank)
            sums[tokens] += result.routed_rows
            sums[dispatched] += result.dispatch_bytes
            sums[combined] += result.combine_bytes
            requantized += result.requantized_tokens
            dropped += sum(result.missing_routes)
            rows.append(result.routed_rows)
        sums[self._requantized.labels(model)] += requantized
        sums[self._dropped.labels(model)] += dropped
        if sum(rows) > 0:
            self._imbalance.labels(report.layer).set(max(rows) * len(rows) / sum(rows))
        if self._expert_tokens is not None:
            by_rank = sorted(report.results, key=lambda result: result.rank)  # ranks hold experts in id order
            counts = [count for result in by_rank for count in result.expert_rows]
            # a step's report may come after the status of the next group; ascending, so that each lands at its own id
            for expert in self._missing.get(by_rank[0].generation, ()) if counts else ():
                counts.insert(expert, 0)
            self._expert_tokens.add(report.layer, counts)

    def _counters_of(self, rank: int) -> tuple[Counter, Counter, Counter]:
        """Return a rank's rows, bytes in dispatch and bytes in combine: looked up once, since every step counts."""
        found = self._rank_counters.get(rank)
        if found is None:
            moved = [self._exchange_bytes.labels(rank, direction) for direction in ("dispatch", "combine")]
            found = self._rank_counters[rank] = (self._rank_tokens.labels(rank), moved[0], moved[1])
        return found

    def status_changed(self, model: str, status: EngineStatus) -> None:
        """Take in the engine's description of itself and of its ranks."""
        self._placement.set(status.generation)
        self._degraded.labels(model).set(not status.ready or bool(status.lacking_ranks or status.missing))
        self._missing[status.generation] = status.missing
        for result in self._changes.seen(status):
            self._rebalances.labels(result).inc()
        if not status.ready:
            self.queue_changed(model, QueueReport(0, 0))  # everything that waited was refused; the engine may be gone
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


def _observe(series: Histogram, label: str, values: Sequence[float | None]) -> None:
    """Observe what is known of several requests; None is what one did not come to."""
    known = [value for value in values if value is not None]
    if known:
        observe = series.labels(label).observe
        for value in known:
            observe(value)
