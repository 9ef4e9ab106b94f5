"""A step that is being put together: what still fits, in rows, in requests and before the deadlines of those in it."""

from __future__ import annotations

import enum
import math

from moe_forward.batcher.limits import BatchLimits, Queued
from moe_forward.batcher.pace import Pace

LEFT_PART = 0.7
"""A step takes at most this part of the time that is left to the earliest deadline in it: a pace is no promise."""
GIVEN_PART = 0.125
"""But steps are not cut below this part of the time which that request was given when it came. Smaller ones have more
fixed time a token: they would save the one that is nearly late, and make all behind it late."""


class Fit(enum.Enum):
    """What became of a request that was held against a step."""

    TAKEN = enum.auto()
    NO_ROOM = enum.auto()
    LATE = enum.auto()


class Forming:
    """A step. limits, pace: what bounds it. begin_seconds: when it is expected to begin."""

    def __init__(self, limits: BatchLimits, pace: Pace, begin_seconds: float) -> None:
        self.items: list[Queued] = []
        self._most_requests = limits.max_step_requests
        self._pace = pace
        self._begin_seconds = begin_seconds
        self._tokens = 0
        self._most_seconds = math.inf
        self._most_tokens: float = limits.max_step_tokens

    def take(self, item: Queued, waiting_tokens: int) -> Fit:
        """Take a request in if it fits; the first one does, however long its step takes, since it was admitted.

        waiting_tokens: of its line, itself included; 0 where nobody else waits there. LATE is who has so little time
        left that only steps too small for those who wait would still help.
        """
        if len(self.items) >= self._most_requests:
            return Fit.NO_ROOM
        tokens = self._tokens + item.request.tokens
        seconds = LEFT_PART * (item.request.deadline_seconds - self._begin_seconds)
        if seconds < self._most_seconds:
            rows = self._pace.rows_within(seconds)
            least_seconds = GIVEN_PART * (item.request.deadline_seconds - item.arrived_seconds)
            if seconds < least_seconds:
                if seconds < LEFT_PART * least_seconds and waiting_tokens > rows:
                    return Fit.LATE
                seconds, rows = least_seconds, self._pace.rows_within(least_seconds)
            most_tokens = min(self._most_tokens, rows)
            if self.items and tokens > most_tokens:
                return Fit.NO_ROOM
            self._most_seconds, self._most_tokens = min(seconds, self._most_seconds), most_tokens
        elif tokens > self._most_tokens and self.items:
            return Fit.NO_ROOM
        self.items.append(item)
        self._tokens = tokens
        return Fit.TAKEN
