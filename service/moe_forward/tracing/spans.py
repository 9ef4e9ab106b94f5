"""The spans of forward requests, made when a request has ended, from the moments that were noted on its way.

    POST /v1/moe/forward            the request, child of the client's span where it sent one
      receive, decode               its body
      queue, step                   the engine's part; "wait" instead where no step took the request
        rank                        one for each rank that timed the step
          dispatch, gemm1, ...      that rank's phases, laid end to end: durations are measured, places are not
      encode, send                  its reply

A step serves many requests and is told once: its ranks lie under the first traced request that was in it, and the
`step` spans of the others link to that request's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState
from opentelemetry.util.types import Attributes

from moe_forward.request_record import RequestRecord
from moe_forward.tracing.context import TraceContext
from moe_forward.types import PHASES, ForwardResult, StepReport, StepResult

KEPT_STEPS = 1024
"""Timed steps that are remembered for requests that have not ended, and requests that wait for their step's report."""

StepKey = tuple[int, int]
"""Generation and number of a step."""


@dataclass(slots=True)
class RequestSpan:
    """A request's span, and the two clocks when it began: perf_counter seconds, and nanoseconds of Unix time."""

    span: Span
    started_seconds: float
    started_ns: int

    def at(self, seconds: float) -> int:
        """Turn a moment of time.perf_counter into nanoseconds of Unix time."""
        return self.started_ns + round((seconds - self.started_seconds) * 1e9)


@dataclass(slots=True)
class _Timed:
    """A step's report, and the step span that its ranks lie under, once there is one."""

    report: StepReport
    owner: SpanContext | None = None


class SpanTracer:
    """A `moe_forward.tracing.Tracer`; everything but `close` is called from one thread.

    tracer: makes the requests' spans, and decides which are kept.
    send: takes finished spans, those of the parts, which are made whole: a sixth of the time of starting and ending
        one, and a timed step of 8 ranks has 80. resource: what they say of this process.
    shut_down: sends what is left.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        send: Callable[[ReadableSpan], None],
        resource: Resource,
        shut_down: Callable[[], None],
    ) -> None:
        self._tracer = tracer
        self._send = send
        self._resource = resource
        self._shut_down = shut_down
        self._scope = InstrumentationScope("moe_forward")
        self._ids = RandomIdGenerator()
        self._steps: OrderedDict[StepKey, _Timed] = OrderedDict()
        self._waiting: OrderedDict[StepKey, list[tuple[RequestSpan, RequestRecord]]] = OrderedDict()

    def request_started(self, record: RequestRecord, parent: TraceContext | None) -> RequestSpan:
        """See `Tracer.request_started`."""
        started_ns = time.time_ns()
        span = self._tracer.start_span(
            f"POST {record.route}",
            Context() if parent is None else _remote(parent),
            SpanKind.SERVER,
            {"http.request.method": "POST", "http.route": record.route, "moe_forward.model": record.model},
            start_time=started_ns,
        )
        known = span.get_span_context()
        record.trace_id, record.sampled = format(known.trace_id, "032x"), known.trace_flags.sampled
        return RequestSpan(span, record.moments.started, started_ns)

    def request_finished(self, span: RequestSpan, record: RequestRecord) -> None:
        """See `Tracer.request_finished`. The report of a step follows its answers, so a request may wait for it."""
        key = _step_of(record.result)
        if not span.span.is_recording():
            return
        if key is None or key in self._steps:
            self._make(span, record, None if key is None else self._steps[key])
            return
        self._waiting.setdefault(key, []).append((span, record))
        if len(self._waiting) > KEPT_STEPS:
            self._make_waiting(*self._waiting.popitem(last=False)[1])

    def step_finished(self, report: StepReport) -> None:
        """See `Tracer.step_finished`."""
        if not report.results:
            return
        key = (report.results[0].generation, report.results[0].step)
        timed = self._steps[key] = _Timed(report)
        if len(self._steps) > KEPT_STEPS:
            self._steps.popitem(last=False)
        self._make_waiting(*self._waiting.pop(key, ()), timed=timed)

    def close(self) -> None:
        """See `Tracer.close`."""
        while self._waiting:
            self._make_waiting(*self._waiting.popitem(last=False)[1])
        self._shut_down()

    def _make_waiting(self, *waiting: tuple[RequestSpan, RequestRecord], timed: _Timed | None = None) -> None:
        for span, record in waiting:
            self._make(span, record, timed)

    def _make(self, request: RequestSpan, record: RequestRecord, timed: _Timed | None) -> None:
        """Make the spans of a request's parts, and end its own."""
        parent = request.span.get_span_context()
        for name, start, end, attributes in _parts(record):
            self._child(parent, name, request.at(start), request.at(end), attributes)
        self._make_step(request, record, timed)
        request.span.set_attributes(_outcome(record))
        if record.status >= 500:
            request.span.set_status(Status(StatusCode.ERROR, record.error))
        request.span.end(request.at(_end(record)))

    def _make_step(self, request: RequestSpan, record: RequestRecord, timed: _Timed | None) -> None:
        """Make the spans between the engine and the ranks."""
        handed_over, answered, result = record.moments.handed_over, record.moments.answered, record.result
        parent = request.span.get_span_context()
        if handed_over is None:
            return
        end = _end(record) if answered is None else answered
        if result is None or result.step is None:
            self._child(parent, "wait", request.at(handed_over), request.at(end))
            return
        # What neither waited nor computed was on its way, as long there as back.
        travelled = max(0.0, end - handed_over - result.queue_seconds - result.step_seconds) / 2
        queued, started = handed_over + travelled, handed_over + travelled + result.queue_seconds
        self._child(parent, "queue", request.at(queued), request.at(started))
        step_ns = request.at(started), request.at(started + result.step_seconds)
        links = [] if timed is None or timed.owner is None else [Link(timed.owner)]
        step = self._child(parent, "step", *step_ns, _step_attributes(record, result), links)
        if timed is not None and timed.owner is None:
            timed.owner = step
            for word in timed.report.results:
                if word.phase_seconds:
                    self._make_rank(step, step_ns[0], word)

    def _make_rank(self, step: SpanContext, start_ns: int, word: StepResult) -> None:
        phases = [(name, round(s * 1e9)) for name, s in zip(PHASES, word.phase_seconds, strict=True) if s > 0]
        attributes = {
            "moe_forward.rank": word.rank,
            "moe_forward.routed_rows": word.routed_rows,
            "moe_forward.dispatch_bytes": word.dispatch_bytes,
            "moe_forward.combine_bytes": word.combine_bytes,
        }
        rank = self._child(step, "rank", start_ns, start_ns + sum(ns for _, ns in phases), attributes)
        for name, nanoseconds in phases:
            self._child(rank, name, start_ns, start_ns + nanoseconds, {"moe_forward.rank": word.rank})
            start_ns += nanoseconds

    def _child(
        self,
        parent: SpanContext,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes = None,
        links: Sequence[Link] = (),
    ) -> SpanContext:
        known = SpanContext(
            parent.trace_id, self._ids.generate_span_id(), False, parent.trace_flags, parent.trace_state
        )
        self._send(
            ReadableSpan(
                name,
                known,
                parent,
                self._resource,
                attributes,
                links=links,
                start_time=start_ns,
                end_time=max(start_ns, end_ns),
                instrumentation_scope=self._scope,
            )
        )
        return known


def _remote(parent: TraceContext) -> Context:
    """Make a context of what a client sent."""
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([parent.state]) if parent.state else None
    known = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, flags, state)
    return trace.set_span_in_context(NonRecordingSpan(known), Context())


def _step_of(result: ForwardResult | None) -> StepKey | None:
    return None if result is None or result.step is None else (result.generation, result.step)


def _end(record: RequestRecord) -> float:
    return record.moments.started + record.duration_seconds


def _parts(record: RequestRecord) -> Iterator[tuple[str, float, float, Attributes]]:
    """List what the front end did itself: (name, start, end, attributes); what failed ends where the reply begins."""
    moments = record.moments
    failed = _end(record) if moments.sending is None else moments.sending
    if record.body_bytes is not None:
        received = failed if moments.decoding is None else moments.decoding
        yield "receive", moments.started, received, {"http.request.body.size": record.body_bytes}
    for name, start, seconds in (
        ("decode", moments.decoding, record.decode_seconds),
        ("encode", moments.encoding, record.encode_seconds),
    ):
        if start is not None:
            end = failed if seconds is None else start + seconds
            yield name, start, end, {"moe_forward.encoding": record.encoding or ""}
    if moments.sending is not None:
        yield "send", moments.sending, _end(record), None


def _outcome(record: RequestRecord) -> dict[str, str | int]:
    known = {
        "http.response.status_code": record.status,
        "error.type": None if record.code is None else record.code.slug,
        "moe_forward.request_id": record.request_id,
        "moe_forward.encoding": record.encoding,
        "moe_forward.layer": record.layer,
        "moe_forward.tokens": record.tokens,
    }
    return {name: value for name, value in known.items() if value is not None}


def _step_attributes(record: RequestRecord, result: ForwardResult) -> dict[str, int]:
    return {
        "moe_forward.layer": record.layer or 0,
        "moe_forward.tokens": record.tokens or 0,
        "moe_forward.batch_tokens": result.batch_tokens,
        "moe_forward.batch_requests": result.batch_requests,
        "moe_forward.step": result.step or 0,
        "moe_forward.generation": result.generation,
    }
