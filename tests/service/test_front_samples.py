"""Several front ends on one metrics page: what it shows is what one front end would show that did all of it."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from moe_forward.datagrams import pack, unpack
from moe_forward.errors import ErrorCode
from moe_forward.front_samples import MergedSamples, read_samples
from moe_forward.messages import FrontSamples
from moe_forward.metrics import Metrics
from moe_forward.request_record import RequestRecord
from moe_forward.types import PHASES, EngineStatus, RankInfo, StepReport, StepResult

ROUTE = "/v1/moe/forward"
# Seconds whose sums are exact.
SHORT, MIDDLE, LONG, TINY = 2**-9, 2**-8, 0.25, 2**-17


class Counted:
    """A registry with the series of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, wall_clock=lambda: 100.0, tracing=True)

    def samples(self) -> FrontSamples:
        """What is sent of it, as it comes out of the datagram."""
        sent = unpack(memoryview(pack(read_samples(self.registry))))
        assert isinstance(sent, FrontSamples)
        return sent


@pytest.fixture
def service() -> Counted:
    """The process that watches the engine."""
    made = Counted()
    step = StepResult(1, 1, 0, (0.001,) * len(PHASES), 9)
    made.metrics.step_finished("tiny", StepReport(1, 48, 3, 5, 70, (step,)))
    made.metrics.status_changed("tiny", EngineStatus(True, ranks=(RankInfo(0, "ready", 103.0),), generation=3))
    return made


def serve(metrics: Metrics, *seconds: float, trace_id: str | None = None, code: ErrorCode | None = None) -> None:
    """Count requests that took so long."""
    for duration in seconds:
        metrics.request_started("tiny")
        record = RequestRecord(ROUTE, "id", "tiny", 200 if code is None else 429, code, "json", 1, 4, 1000)
        record.duration_seconds, record.queue_seconds, record.decode_seconds = duration, duration / 2, TINY
        record.trace_id, record.sampled = trace_id, trace_id is not None
        metrics.request_finished(record)


def lines(registry: CollectorRegistry) -> list[str]:
    """Return the page, without the moments that series were made at, which the service does not show."""
    return sorted(line for line in generate_latest(registry).decode().splitlines() if "_created" not in line)


def value(merged: MergedSamples, name: str, **labels: Any) -> float | None:
    return merged.registry.get_sample_value(f"moe_forward_{name}", {key: str(text) for key, text in labels.items()})


def test_the_page_of_two_front_ends_is_that_of_one_that_did_all(service: Counted) -> None:
    merged = MergedSamples(service.registry)
    first, second = Counted(), Counted()
    merged.update(0, first.samples())  # what came later takes its place
    serve(first.metrics, MIDDLE, LONG)
    serve(second.metrics, MIDDLE, TINY)
    serve(second.metrics, SHORT, code=ErrorCode.QUEUE_FULL)
    second.metrics.request_started("tiny")
    merged.update(0, first.samples())
    merged.update(1, second.samples())
    shown = lines(merged.registry)

    serve(service.metrics, MIDDLE, LONG, MIDDLE, TINY)
    serve(service.metrics, SHORT, code=ErrorCode.QUEUE_FULL)
    service.metrics.request_started("tiny")
    assert shown == lines(service.registry)


def test_what_a_front_end_counted_outlives_it_and_what_it_was_doing_does_not(service: Counted) -> None:
    merged = MergedSamples(service.registry)
    for _ in range(2):  # it dies twice
        front = Counted()
        serve(front.metrics, MIDDLE, LONG)
        front.metrics.request_started("tiny")
        merged.update(0, front.samples())
        assert value(merged, "inflight_requests", model="tiny") == 1
        merged.front_is_gone(0)
        assert value(merged, "inflight_requests", model="tiny") is None
    assert value(merged, "requests_total", model="tiny", route=ROUTE, code=200) == 4
    assert value(merged, "request_duration_seconds_count", model="tiny", route=ROUTE) == 4
    assert value(merged, "request_duration_seconds_bucket", model="tiny", route=ROUTE, le="0.005") == 2
    assert value(merged, "tokens_total", model="tiny") == 16


def test_a_front_end_that_sent_nothing_can_be_gone(service: Counted) -> None:
    merged = MergedSamples(service.registry)
    merged.front_is_gone(5)
    assert lines(merged.registry) == lines(service.registry)


def test_front_ends_that_serve_nothing_do_not_change_what_the_engine_says(service: Counted) -> None:
    merged = MergedSamples(service.registry)
    for number in range(3):
        merged.update(number, Counted().samples())
    assert lines(merged.registry) == lines(service.registry)
    assert value(merged, "placement_generation") == 3


def test_the_newest_trace_of_a_bucket_is_its_exemplar(service: Counted) -> None:
    merged = MergedSamples(service.registry)
    for number, trace_id in enumerate(("a" * 32, "b" * 32)):
        front = Counted()
        serve(front.metrics, MIDDLE, trace_id=trace_id)
        merged.update(1 - number, front.samples())
    exemplars = [
        sample.exemplar.labels
        for family in text_string_to_metric_families(openmetrics(merged.registry).decode())
        for sample in family.samples
        if sample.exemplar
    ]
    assert exemplars == [{"trace_id": "b" * 32}]
