"""A step that is being put together: what still fits, in rows, in requests and before the deadlines of those in it."""

from __future__ import annotations

import math

from moe_forward.batcher.limits import BatchLimits, Queued
from moe_forward.batcher.pace import Pace

LEFT_PART = 0.5
"""A step takes at most this part of the time that is left to the earliest deadline in it: a pace is no promise."""
GIVEN_PART = 0.125
"""But at least this part of the time which that request was given when it came. Smaller steps have more fixed time a
token: they would save the one that is nearly late, and make all behind it late."""


class Forming:
    """A step. limits, pace: what bounds it. begin_seconds: when it is expected to begin."""

    def __init__(self, limits: BatchLimits, pace: Pace, begin_seconds: float) -> None:
        self.items: list[Queued] = []
        self._limits = limits
        self._pace = pace
        self._begin_seconds = begin_seconds
        self._tokens = 0
        self._most_seconds = math.inf
        self._most_tokens: float = limits.max_step_tokens

    def take(self, item: Queued) -> bool:
        """Take a request in if it fits; the first one does, whatever it takes, since it was admitted."""
        deadline = item.request.deadline_seconds
        seconds = max(
            LEFT_PART * (deadline - self._begin_seconds),
            GIVEN_PART * (deadline - item.arrived_seconds),
        )
        tokens = self._tokens + item.request.tokens
        most_seconds, most_tokens = self._most_seconds, self._most_tokens
        if seconds < most_seconds:
            most_seconds, most_tokens = seconds, min(most_tokens, self._pace.rows_within(seconds))
        if self.items and (tokens > most_tokens or len(self.items) >= self._limits.max_step_requests):
            return False
        self.items.append(item)
        self._tokens, self._most_seconds, self._most_tokens = tokens, most_seconds, most_tokens
        return True
