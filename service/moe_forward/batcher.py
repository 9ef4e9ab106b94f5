"""Many requests become one step: same layer, first come first served, bounded in rows, requests and waiting time.

Pure: time is an argument, nothing is sent. The engine asks `next_step` whenever something has changed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from moe_forward.types import ForwardRequest


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """max_step_tokens, max_step_requests: size of one step. max_wait_seconds: patience of a step that is not full.
    max_queue_requests, max_queue_tokens: what may wait at most."""

    max_step_tokens: int
    max_step_requests: int
    max_wait_seconds: float
    max_queue_requests: int
    max_queue_tokens: int


@dataclass(frozen=True, slots=True)
class Queued:
    """A waiting request and when it arrived (CLOCK_MONOTONIC)."""

    request: ForwardRequest
    arrived_seconds: float


class Batcher:
    """The queue of one engine, a line for each layer."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._lines: dict[int, deque[Queued]] = {}
        self._tokens: dict[int, int] = {}
        self._soonest_deadline = math.inf
        self.requests = 0
        self.tokens = 0

    def add(self, request: ForwardRequest, now: float) -> bool:
        """Queue a request; False when the queue has no room for it."""
        if self.requests + 1 > self._limits.max_queue_requests:
            return False
        if self.tokens + request.tokens > self._limits.max_queue_tokens:
            return False
        self._lines.setdefault(request.layer, deque()).append(Queued(request, now))
        self._count(request, +1)
        self._soonest_deadline = min(self._soonest_deadline, request.deadline_seconds)
        return True

    def cancel(self, front: int, request: int) -> Queued | None:
        """Take one request out of the queue; None when it is not (or no longer) there."""
        taken = self._take(lambda item: item.request.front == front and item.request.request == request)
        return taken[0] if taken else None

    def drop_front(self, front: int) -> list[Queued]:
        """Take out everything of a front end that is gone."""
        return self._take(lambda item: item.request.front == front)

    def drop_all(self) -> list[Queued]:
        """Take out everything."""
        return self._take(lambda item: True)

    def expire(self, now: float) -> list[Queued]:
        """Take out every request whose deadline has passed."""
        if now < self._soonest_deadline:
            return []
        expired = self._take(lambda item: item.request.deadline_seconds <= now)
        waiting = (item.request.deadline_seconds for line in self._lines.values() for item in line)
        self._soonest_deadline = min(waiting, default=math.inf)
        return expired

    def next_step(self, now: float) -> list[Queued]:
        """Take the requests of the next step: the line that has waited longest, when it is full or has waited enough.

        Returns: requests of one layer in order of arrival, empty when nothing is due.
        """
        due = [line for line in self._lines.values() if self._is_full(line) or self._due_seconds(line) <= now]
        if not due:
            return []
        line = min(due, key=lambda line: line[0].arrived_seconds)
        step: list[Queued] = []
        tokens = 0
        while line and len(step) < self._limits.max_step_requests:
            tokens += line[0].request.tokens
            if step and tokens > self._limits.max_step_tokens:
                break
            step.append(line.popleft())
            self._count(step[-1].request, -1)
        if not line:
            del self._lines[step[0].request.layer]
        return step

    def wake_seconds(self, idle: bool) -> float:
        """Return when to look again without arrivals: a step falls due (only if `idle`) or a deadline passes."""
        due = min((self._due_seconds(line) for line in self._lines.values()), default=math.inf)
        return min(due, self._soonest_deadline) if idle else self._soonest_deadline

    def _due_seconds(self, line: deque[Queued]) -> float:
        return line[0].arrived_seconds + self._limits.max_wait_seconds

    def _is_full(self, line: deque[Queued]) -> bool:
        tokens = self._tokens[line[0].request.layer]
        return tokens >= self._limits.max_step_tokens or len(line) >= self._limits.max_step_requests

    def _count(self, request: ForwardRequest, sign: int) -> None:
        self.requests += sign
        self.tokens += sign * request.tokens
        self._tokens[request.layer] = self._tokens.get(request.layer, 0) + sign * request.tokens

    def _take(self, unwanted: Callable[[Queued], bool]) -> list[Queued]:
        taken: list[Queued] = []
        for layer, line in list(self._lines.items()):
            kept: deque[Queued] = deque()
            for item in line:
                if unwanted(item):
                    taken.append(item)
                    self._count(item.request, -1)
                else:
                    kept.append(item)
            if kept:
                self._lines[layer] = kept
            else:
                del self._lines[layer]
        return taken
