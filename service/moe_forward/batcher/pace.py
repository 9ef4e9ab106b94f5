"""How long steps take and how fast tokens leave, learned from the steps that have finished."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHING = 0.2
RATE_SMOOTHING = 0.1
FEW_STEPS = 3
STALE_SECONDS = 5.0
"""Ranks that rested so long may be slower or faster when they begin again."""
FORGET_SECONDS = 60.0
"""A size that was not seen for so long says nothing more: else a size that was slow once is never tried again."""


@dataclass(slots=True)
class _Measured:
    tokens: float
    seconds: float
    at_seconds: float


class Pace:
    """Moving averages. tokens_per_second: while ranks compute; 0 before the first step.
    finished_seconds: when the last step ended."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self.finished_seconds = -math.inf
        self._steps = 0  # since ranks rested
        self._sizes: dict[int, _Measured] = {}  # by bits of the number of tokens
        self._curve: list[tuple[float, float]] = []  # tokens and seconds of the sizes seen lately, ascending

    def finished(self, tokens: int, seconds: float, now: float = 0.0) -> None:
        """Learn from a step. seconds: since it could begin, so that steps that overlap are not counted twice."""
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_second += (rate - self.tokens_per_second) * (RATE_SMOOTHING if self.tokens_per_second else 1)
        self._steps = 1 if now - seconds - self.finished_seconds > STALE_SECONDS else self._steps + 1
        self.finished_seconds = now
        measured = self._sizes.setdefault(tokens.bit_length(), _Measured(tokens, seconds, now))
        measured.tokens += (tokens - measured.tokens) * SMOOTHING
        measured.seconds += (seconds - measured.seconds) * SMOOTHING
        measured.at_seconds = now
        lately = now - FORGET_SECONDS
        self._curve = sorted((size.tokens, size.seconds) for size in self._sizes.values() if size.at_seconds >= lately)

    def is_known(self, now: float, end_seconds: float = -math.inf) -> bool:
        """Tell whether a few steps were measured, and lately. end_seconds: until when ranks are expected to work."""
        return self._steps >= FEW_STEPS and now - max(self.finished_seconds, end_seconds) <= STALE_SECONDS

    def step_seconds(self, tokens: int) -> float | None:
        """Return how long a step of `tokens` takes, by those nearest in size (a factor of two); None before any."""
        if not self._sizes:
            return None
        wanted = tokens.bit_length()
        found = self._sizes.get(wanted)
        if found is None:
            found = self._sizes[min(self._sizes, key=lambda size: abs(size - wanted))]
        return found.seconds

    def expected_seconds(self, tokens: float) -> float:
        """Return the same more exactly: between the sizes seen lately, and in proportion below and above them all."""
        below = (0.0, 0.0)
        for point in self._curve:
            if point[0] >= tokens:
                return below[1] + (point[1] - below[1]) * (tokens - below[0]) / (point[0] - below[0])
            below = point
        return below[1] * tokens / below[0] if below[0] else 0.0

    def rows_within(self, seconds: float) -> float:
        """Return of how many tokens a step may be to end within `seconds`; infinite before any step.

        In proportion above all sizes seen is careful, since a step's fixed time is not paid twice.
        """
        if not self._curve:
            return math.inf
        above = self._curve[-1]
        if above[1] > seconds:
            for below in self._curve[-2::-1]:
                if below[1] <= seconds:
                    return below[0] + (above[0] - below[0]) * (seconds - below[1]) / (above[1] - below[1])
                above = below
        return above[0] * seconds / max(above[1], 1e-6)
