"""The requests of one layer that wait, small and large ones apart."""

from __future__ import annotations

import math
from collections import OrderedDict

from moe_forward.batcher.fairness import Clients, FairQueue
from moe_forward.batcher.limits import BatchLimits, Queued
from moe_forward.batcher.pace import Pace
from moe_forward.batcher.patience import Company, due_seconds


class Line:
    """One layer. clients, limits, pace: of the whole queue."""

    def __init__(self, clients: Clients, limits: BatchLimits, pace: Pace) -> None:
        self._limits = limits
        self._pace = pace
        self._waiting: OrderedDict[Queued, None] = OrderedDict()  # in order of arrival
        self._last_seconds = 0.0
        self._due: tuple[float, float] | None = None  # of small and large ones, until something comes or goes
        self.company = Company(limits.max_wait_seconds)
        self.small = FairQueue(clients, limits)
        self.large = FairQueue(clients, limits)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether what waits here fills a step."""
        return self.small.is_full or self.large.is_full

    def add(self, item: Queued) -> bool:
        """Queue a request; tells whether its kind fills a step now."""
        self._due = None
        self._last_seconds = item.arrived_seconds
        self.company.arrived(item.arrived_seconds, alone=not self._waiting)
        self._waiting[item] = None
        queue = self._queue_of(item)
        queue.add(item)
        return queue.is_full

    def remove(self, item: Queued) -> None:
        """Take a request out."""
        self._due = None
        del self._waiting[item]
        self._queue_of(item).remove(item)

    def small_due_seconds(self) -> float:
        """Return when the small requests here should go if the ranks are free.

        Returns: minus infinity where they fill a step, infinity where there are none.
        """
        return self._due_seconds()[0]

    def large_due_seconds(self) -> float:
        """Return the same for the large requests."""
        return self._due_seconds()[1]

    def _due_seconds(self) -> tuple[float, float]:
        if self._due is None:
            due = due_seconds(
                next(iter(self._waiting)).arrived_seconds,
                self._last_seconds,
                len(self._waiting),
                self.company.gap_seconds,
                self._limits.max_wait_seconds,
                self._pace.step_seconds(self.small.tokens + self.large.tokens),
            )
            self._due = (_due_of(self.small, due), _due_of(self.large, due))
        return self._due

    def _queue_of(self, item: Queued) -> FairQueue:
        return self.large if item.large else self.small


def _due_of(queue: FairQueue, due: float) -> float:
    if queue.is_full:
        return -math.inf
    return due if queue.requests else math.inf
