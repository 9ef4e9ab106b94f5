"""Clients, engine and ranks in simulated time: the real queue and steps in flight, and a cost model for the ranks."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from moe_forward.batcher import Batcher, BatchLimits, Queued
from moe_forward.messages import RankWord, StepOrder, Ticket
from moe_forward.steps import StepsInFlight

NUMBERS = itertools.count()
LIMITS = BatchLimits(8192, 256, 200e-6, 100_000, 100_000_000)


def make_request(
    tokens: int = 1, layer: int = 3, client: int = 0, deadline_seconds: float = math.inf, front: int = 0
) -> Ticket:
    """Return a request with a number of its own."""
    return Ticket(front, next(NUMBERS), layer, tokens, deadline_seconds, client)


@dataclass(frozen=True)
class Cost:
    """A step takes `fixed_seconds` and `token_seconds` a token. way_seconds: from the engine to the ranks, or back."""

    fixed_seconds: float = 1e-3
    token_seconds: float = 1e-6
    way_seconds: float = 60e-6

    def step_seconds(self, tokens: int) -> float:
        return self.fixed_seconds + self.token_seconds * tokens


@dataclass
class Done:
    """A request that was answered: when it was sent and answered, and in which step."""

    queued: Queued
    step: int
    answered_seconds: float

    @property
    def seconds(self) -> float:
        return self.answered_seconds - self.queued.arrived_seconds


@dataclass
class Simulation:
    """limits: of the queue. cost: of the ranks. done: what was answered. steps: what was sent, with the time.
    expired: whose deadline passed in the queue. late: when what was refused since it would be answered too late."""

    limits: BatchLimits = LIMITS
    cost: Cost = field(default_factory=Cost)
    done: list[Done] = field(default_factory=list)
    steps: list[tuple[float, list[Queued]]] = field(default_factory=list)
    expired: list[Queued] = field(default_factory=list)
    late: list[tuple[float, Ticket]] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.limits)
        self.sent = StepsInFlight(self.limits, self.batcher.pace)
        self.refused = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ranks_free = 0.0
        self._answers: dict[tuple[int, int], Callable[[], None]] = {}
        self._wake = math.inf

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), event))

    def send(self, request: Ticket, answered: Callable[[], None] = lambda: None) -> bool:
        """Queue a request now; `answered` is called with its answer."""
        if self.batcher.late_seconds(request, self.now, self.sent.ahead()) is not None:
            self.late.append((self.now, request))
            return False
        if not self.batcher.add(request, self.now):
            self.refused += 1
            return False
        self._answers[request.front, request.request] = answered
        self._pump()
        return True

    def closed_loop(self, make: Callable[[], Ticket], think: Callable[[], float], start_seconds: float = 0.0) -> None:
        """A client that sends its next request some time after the answer to the one before."""

        def again() -> None:
            self.send(make(), lambda: self.at(self.now + think(), again))

        self.at(start_seconds, again)

    def run(self, until_seconds: float) -> Simulation:
        while self._events and self._events[0][0] <= until_seconds:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self

    def waits(self, client: int | None = None, after_seconds: float = 0.0) -> list[float]:
        """Return seconds from request to answer, ascending."""
        return sorted(
            done.seconds
            for done in self.done
            if done.queued.arrived_seconds >= after_seconds and client in (None, done.queued.request.client)
        )

    def tokens_per_second(self) -> float:
        return sum(done.queued.request.tokens for done in self.done) / self.now

    def batch_sizes(self, after_seconds: float = 0.0) -> list[int]:
        return [len(step) for sent, step in self.steps if sent >= after_seconds]

    def _pump(self) -> None:
        self.expired += self.batcher.expire(self.now)
        while self.sent.have_room and (queued := self.batcher.next_step(self.now, self.sent.ahead())):
            step = StepOrder(len(self.steps), 1, queued[0].request.layer, tuple(item.request for item in queued))
            self.steps.append((self.now, queued))
            self.sent.add(step, queued, self.now)
            begin = max(self.now + self.cost.way_seconds, self._ranks_free)
            self._ranks_free = begin + self.cost.step_seconds(sum(item.request.tokens for item in queued))
            self.at(self._ranks_free + self.cost.way_seconds, partial(self._answered, step))
        wake = self.batcher.wake_seconds(self.now, self.sent.ahead(), self.sent.have_room)
        if wake < math.inf and not (self.now < self._wake <= wake):
            self._wake = max(wake, self.now)
            self.at(self._wake, self._pump)

    def _answered(self, step: StepOrder) -> None:
        word = RankWord(step.step, 1, 0, b"")
        found = self.sent.find(word)
        assert found is not None
        found.results[0] = word
        finished = self.sent.pop_finished(1, self.now)
        assert finished is not None
        assert finished.step == step, "steps end in the order in which they were sent"
        self.batcher.finished(
            step.layer, finished.tokens, finished.sent_seconds, self.now - finished.began_seconds, self.now
        )
        self._pump()
        for item in finished.queued:
            self.done.append(Done(item, step.step, self.now))
            self._answers.pop(item.key)()


def thinking(seconds: float, seed: int) -> Callable[[], float]:
    """Return a client's time between answer and next request: `seconds`, give or take half."""
    rng = random.Random(seed)
    return lambda: seconds * (0.5 + rng.random())


def layers_in_turn(layers: int) -> Iterator[int]:
    return itertools.cycle(range(layers))
