"""The requests of one layer that wait, small and large ones apart."""

from __future__ import annotations

import math
from collections import OrderedDict

from moe_forward.batcher.fairness import FairQueue
from moe_forward.batcher.limits import BatchLimits, Queued
from moe_forward.batcher.pace import Pace
from moe_forward.batcher.patience import Company, due_seconds


class Line:
    """One layer. limits, pace: of the whole queue. waiting: small and large ones in order of arrival."""

    def __init__(self, limits: BatchLimits, pace: Pace) -> None:
        self._limits = limits
        self._pace = pace
        self._last_seconds = 0.0
        self._due: tuple[float, float] | None = None  # until something comes or goes
        self.waiting: OrderedDict[Queued, None] = OrderedDict()
        self.company = Company(limits.max_wait_seconds)
        self.small = FairQueue(limits)
        self.large = FairQueue(limits)

    @property
    def is_full(self) -> bool:
        """Whether what waits here fills a step."""
        return self.small.is_full or self.large.is_full

    def add(self, item: Queued) -> bool:
        """Queue a request; tells whether its kind fills a step now."""
        self._due = None
        self._last_seconds = item.arrived_seconds
        self.company.arrived(item.arrived_seconds, alone=not self.waiting)
        self.waiting[item] = None
        queue = self.large if item.large else self.small
        queue.add(item)
        return queue.is_full

    def changed(self) -> None:
        """Note that requests have left."""
        self._due = None

    def due_seconds(self) -> tuple[float, float]:
        """Return when the small requests here, and when the large ones should go if the ranks are free.

        Returns: minus infinity where they fill a step, infinity where there are none.
        """
        if self._due is None:
            due = due_seconds(
                next(iter(self.waiting)).arrived_seconds,
                self._last_seconds,
                len(self.waiting),
                self.company.gap_seconds,
                self._limits.max_wait_seconds,
                self._pace.step_seconds(self.small.tokens + self.large.tokens),
            )
            self._due = (_due_of(self.small, due), _due_of(self.large, due))
        return self._due


def _due_of(queue: FairQueue, due: float) -> float:
    if not queue.requests:
        return math.inf
    return -math.inf if queue.is_full else due
