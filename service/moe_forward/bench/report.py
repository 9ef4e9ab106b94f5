"""A load test's result: one row for each point of the load, as objects and as the JSON of `report.schema.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_forward.bench.histogram import Histogram
from moe_forward.bench.load import Load, Point
from moe_forward.bench.tally import Tally

SCHEMA_VERSION = 1
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
NS_PER_MS = 1e6

MOST_OF_CEILING = 0.7
"""Share of the generator's ceiling up to which a figure is the service's: beyond, both share the blame."""
SMALL_LAG_MILLISECONDS = 1.0
LAG_SHARE = 0.1
"""Part of the median latency that the generator's own lag may take before a warning."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What `slo_milliseconds` came to. share: of good requests among all whose moment came."""

    milliseconds: float
    requests_per_second: float
    share: float


@dataclass(frozen=True, slots=True)
class Generator:
    """How the generator itself did.

    ceiling_requests_per_second, ceiling_share: what it reaches against an idle server, and the part of that which it
    was at; None where that was not measured. cpu_share: of all its processes' time. lag_milliseconds: see `Tally`.
    """

    processes: int
    cpu_share: float
    lag_milliseconds: dict[str, float]
    ceiling_requests_per_second: float | None
    ceiling_share: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured at one point. Dictionaries of milliseconds have p50 to p99_9, min, max, mean and stdev.

    mix: [rows of a request, share]. connections: callers, or requests in flight at most. rate: asked for, None in a
    closed loop. measured_from: what latency counts from.
    requests: answered. failed, refused: without an output; refused ones had 429 or 503. late: sent a millisecond or
    more after the moment meant. unsent: never sent, for want of a connection that was free.
    elapsed_seconds: from the end of the warm-up to the last answer, or the end of the time if that came later.
    wait, queue, step, rest: parts of the latency: before sending, in the service's queue, in its step, and what
    remains; empty where the service does not tell.
    histogram: of the latency, as `Histogram.to_document`.
    """

    name: str
    size: str
    mix: tuple[tuple[int, float], ...]
    loop: Literal["closed", "open"]
    connections: int
    rate: float | None
    measured_from: Literal["send", "intended send"]
    requests: int
    failed: int
    refused: int
    late: int
    unsent: int
    elapsed_seconds: float
    requests_per_second: float
    tokens_per_second: float
    sent_bytes_per_second: float
    received_bytes_per_second: float
    objective: Objective | None
    latency_milliseconds: dict[str, float]
    latency_milliseconds_by_tokens: dict[int, dict[str, float]]
    wait_milliseconds: dict[str, float]
    queue_milliseconds: dict[str, float]
    step_milliseconds: dict[str, float]
    rest_milliseconds: dict[str, float]
    errors: dict[str, int]
    refusals: dict[str, int]
    generator: Generator
    warnings: tuple[str, ...]
    histogram: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """A load test: the service, the load, where it ran, and a row for each point. layers: that were loaded."""

    url: str
    model: str
    hidden_size: int
    layers: tuple[int, ...]
    load: Load
    environment: dict[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """The whole report as one JSON document."""
        document = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(document, indent=1, allow_nan=False)


def make_row(point: Point, load: Load, tally: Tally, start_ns: int, ceiling_requests_per_second: float | None) -> Row:
    """Work out what a run's counts mean. start_ns: of the run, its warm-up included."""
    elapsed_seconds = (tally.last_ns - start_ns) / 1e9 - load.warmup_seconds
    if load.requests is None:
        elapsed_seconds = max(elapsed_seconds, load.seconds)
    elapsed_seconds = max(elapsed_seconds, 1e-9)
    failed, refused = sum(tally.errors.values()), sum(tally.refused.values())
    due = tally.answered + failed + refused + tally.unsent
    objective = None
    if load.slo_milliseconds is not None:
        share = tally.good / due if due else 0.0
        objective = Objective(load.slo_milliseconds, tally.good / elapsed_seconds, share)
    rate = tally.answered / elapsed_seconds
    latency = tally.whole_latency
    lag = summary(tally.lag)
    ceiling_share = None if ceiling_requests_per_second is None else rate / ceiling_requests_per_second
    whole_seconds = (elapsed_seconds + load.warmup_seconds) * load.processes
    generator = Generator(
        load.processes, tally.cpu_seconds / whole_seconds, lag, ceiling_requests_per_second, ceiling_share
    )
    return Row(
        name=point.name,
        size=point.size,
        mix=point.mix,
        loop="closed" if point.rate is None else "open",
        connections=point.connections,
        rate=point.rate,
        measured_from="send" if point.rate is None else "intended send",
        requests=tally.answered,
        failed=failed,
        refused=refused,
        late=tally.late,
        unsent=tally.unsent,
        elapsed_seconds=elapsed_seconds,
        requests_per_second=rate,
        tokens_per_second=tally.tokens / elapsed_seconds,
        sent_bytes_per_second=tally.sent_bytes / elapsed_seconds,
        received_bytes_per_second=tally.received_bytes / elapsed_seconds,
        objective=objective,
        latency_milliseconds=summary(latency),
        latency_milliseconds_by_tokens={tokens: summary(part) for tokens, part in sorted(tally.latency.items())},
        wait_milliseconds=summary(tally.wait),
        queue_milliseconds=summary(tally.queue),
        step_milliseconds=summary(tally.step),
        rest_milliseconds=summary(tally.rest),
        errors=dict(sorted(tally.errors.items())),
        refusals=dict(sorted(tally.refused.items())),
        generator=generator,
        warnings=tuple(_warnings(due, tally.unsent, latency, lag, ceiling_share)),
        histogram=latency.to_document(),
    )


def summary(histogram: Histogram) -> dict[str, float]:
    """Return p50 to p99_9, min, max, mean and stdev in milliseconds; nothing of an empty histogram."""
    if not histogram.count:
        return {}
    values = {name: histogram.quantile(share) for name, share in QUANTILES.items()}
    values |= {"min": float(histogram.smallest), "max": float(histogram.largest)}
    values |= {"mean": histogram.mean, "stdev": histogram.stdev}
    return {name: value / NS_PER_MS for name, value in values.items()}


def _warnings(
    due: int, unsent: int, latency: Histogram, lag: dict[str, float], ceiling_share: float | None
) -> list[str]:
    found = []
    if ceiling_share is not None and ceiling_share > MOST_OF_CEILING:
        found.append(
            f"the service was at {ceiling_share:.0%} of what this generator can do: measure with more --processes, "
            "or from a host with more cores"
        )
    median = latency.quantile(0.5) / NS_PER_MS if latency.count else 0.0
    if lag and lag["p99"] > max(SMALL_LAG_MILLISECONDS, LAG_SHARE * median):
        found.append(
            f"the generator was late itself (p99 {lag['p99']:.1f} ms): its cores are busy, and its latencies too high"
        )
    if unsent:
        found.append(
            f"{unsent} of {due} requests were never sent: the service does not keep up with this rate, and the "
            "latencies are only of those that were"
        )
    return found
