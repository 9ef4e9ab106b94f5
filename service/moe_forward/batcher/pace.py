"""How long steps take and how fast tokens leave, learned from the steps that have finished."""

from __future__ import annotations

SMOOTHING = 0.2
RATE_SMOOTHING = 0.1


class Pace:
    """Moving averages. tokens_per_second: while ranks compute; 0 before the first step."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._seconds: dict[int, float] = {}  # bits of the number of tokens -> seconds of a step

    def finished(self, tokens: int, seconds: float) -> None:
        """Learn from a step. seconds: since it could begin, so that steps that overlap are not counted twice."""
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_second += (rate - self.tokens_per_second) * (RATE_SMOOTHING if self.tokens_per_second else 1)
        size = tokens.bit_length()
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + (seconds - before) * SMOOTHING

    def step_seconds(self, tokens: int) -> float | None:
        """Return how long a step of `tokens` takes, by those nearest in size (a factor of two); None before any."""
        if not self._seconds:
            return None
        wanted = tokens.bit_length()
        found = self._seconds.get(wanted)
        return self._seconds[min(self._seconds, key=lambda size: abs(size - wanted))] if found is None else found
