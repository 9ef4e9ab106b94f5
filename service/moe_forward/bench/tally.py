"""What one run counts, and how the counts of several processes become one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from moe_forward.bench.histogram import Histogram
from moe_forward.bench.sender import Answer, Request

LATE_NS = 1_000_000
REFUSED = (429, 503)


@dataclass(slots=True)
class Progress:
    """What happened since the last one: latencies of outputs, and how many requests failed."""

    latency: Histogram = field(default_factory=Histogram)
    failed: int = 0

    def merge(self, other: Progress) -> None:
        """Add what `other` has seen."""
        self.latency.merge(other.latency)
        self.failed += other.failed


@dataclass(slots=True)
class Tally:
    """Counts of requests whose moment lay after the warm-up; nanoseconds.

    latency: of outputs, by rows of their request; from the moment that was meant for sending to the reply's last byte.
    wait: from that moment to sending. queue, step: as the server says. rest: of the time from sending.
    lag: how late the event loop of the generator itself was, sampled.
    errors: code -> requests without an output, refusals apart. refused: code -> 429 and 503.
    late: sent a millisecond or more after the moment meant. unsent: their moment came, their turn did not.
    good: outputs within the objective. sent_bytes, received_bytes: of bodies.
    last_ns: moment of the last answer. cpu_seconds: that generating took.
    """

    slo_ns: int | None = None
    latency: dict[int, Histogram] = field(default_factory=dict)
    wait: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)
    step: Histogram = field(default_factory=Histogram)
    rest: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)
    errors: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    late: int = 0
    unsent: int = 0
    good: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    last_ns: int = 0
    cpu_seconds: float = 0.0
    recent: Progress = field(default_factory=Progress)

    def record(self, request: Request, meant_ns: int, sent_ns: int, answer: Answer) -> None:
        """Count one answered or failed request."""
        self.last_ns = max(self.last_ns, answer.ended_ns)
        self.sent_bytes += len(request.body)
        self.received_bytes += answer.received_bytes
        self.late += sent_ns - meant_ns >= LATE_NS
        if answer.code:
            (self.refused if answer.status in REFUSED else self.errors)[answer.code] += 1
            self.recent.failed += 1
            return
        latency_ns = answer.ended_ns - meant_ns
        self.good += self.slo_ns is None or latency_ns <= self.slo_ns
        self.recent.latency.add(latency_ns)
        if request.tokens not in self.latency:
            self.latency[request.tokens] = Histogram()
        self.latency[request.tokens].add(latency_ns)
        self.wait.add(sent_ns - meant_ns)
        if answer.queue_ns is not None and answer.step_ns is not None:
            self.queue.add(answer.queue_ns)
            self.step.add(answer.step_ns)
            self.rest.add(answer.ended_ns - sent_ns - answer.queue_ns - answer.step_ns)

    def take_recent(self) -> Progress:
        """Return what happened since the last call."""
        recent, self.recent = self.recent, Progress()
        return recent

    def merge(self, other: Tally) -> None:
        """Add what another process counted in the same run."""
        for tokens, latency in other.latency.items():
            self.latency.setdefault(tokens, Histogram()).merge(latency)
        for name in ("wait", "queue", "step", "rest", "lag"):
            getattr(self, name).merge(getattr(other, name))
        self.errors.update(other.errors)
        self.refused.update(other.refused)
        for name in ("late", "unsent", "good", "sent_bytes", "received_bytes", "cpu_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last_ns = max(self.last_ns, other.last_ns)

    @property
    def whole_latency(self) -> Histogram:
        """Of requests of every size."""
        whole = Histogram()
        for latency in self.latency.values():
            whole.merge(latency)
        return whole

    @property
    def answered(self) -> int:
        """Requests that got their output."""
        return sum(latency.count for latency in self.latency.values())

    @property
    def tokens(self) -> int:
        """Rows of the requests that got their output."""
        return sum(tokens * latency.count for tokens, latency in self.latency.items())
