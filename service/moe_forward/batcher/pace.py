"""How long steps take and how fast tokens leave, learned from the steps that have finished."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

SMOOTHING = 0.2
RATE_SMOOTHING = 0.1


@dataclass(slots=True)
class _Size:
    """Steps of about one size: how many tokens on average, and how long they take."""

    tokens: float
    seconds: float


class Pace:
    """Moving averages. tokens_per_second: while ranks compute; 0 before the first step. steps: that were learned from.

    longest_seconds: what `expected_seconds` says at most. fewest_tokens: what `tokens_within` says at least.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self.steps = 0
        self.longest_seconds = 0.0
        self.fewest_tokens = math.inf
        self._sizes: dict[int, _Size] = {}  # by bits of the number of tokens
        self._ascending: list[_Size] = []
        self._tokens: list[float] = []  # of the ascending sizes, as their seconds: every request is looked up in them
        self._seconds: list[float] = []

    def finished(self, tokens: int, seconds: float) -> None:
        """Learn from a step. seconds: since it could begin, so that steps that overlap are not counted twice.

        Also about other sizes, not tried since ranks became slower or quicker: a larger step takes
        no less, but no more than in proportion, since it could be several of these; a smaller one the other way round.
        """
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_second += (rate - self.tokens_per_second) * (RATE_SMOOTHING if self.tokens_per_second else 1)
        size = self._sizes.get(tokens.bit_length())
        if size is None:
            size = self._sizes[tokens.bit_length()] = _Size(tokens, seconds)
            self._ascending = [self._sizes[bits] for bits in sorted(self._sizes)]
        size.tokens += (tokens - size.tokens) * SMOOTHING
        size.seconds += (seconds - size.seconds) * SMOOTHING
        for other in self._ascending:
            times = other.tokens / size.tokens
            other.seconds = min(max(other.seconds, size.seconds * min(1.0, times)), size.seconds * max(1.0, times))
        self._tokens = [other.tokens for other in self._ascending]
        self._seconds = [other.seconds for other in self._ascending]
        self.steps += 1
        self.longest_seconds = max(self._seconds)
        self.fewest_tokens = self.tokens_within(0.0)

    def step_seconds(self, tokens: int) -> float | None:
        """Return how long a step of `tokens` takes, by those nearest in size (a factor of two); None before any."""
        if not self._sizes:
            return None
        wanted = tokens.bit_length()
        size = self._sizes.get(wanted) or self._sizes[min(self._sizes, key=lambda bits: abs(bits - wanted))]
        return size.seconds

    def expected_seconds(self, tokens: float) -> float | None:
        """Return the same between the sizes that were seen, for steps of any.

        Smaller ones than any take as long as the smallest, since that is mostly what every step takes; larger ones as
        long as the largest: how much longer is seen when there is one, and nobody is refused for a guess.
        """
        sizes = self._ascending
        if not sizes:
            return None
        above = bisect_left(self._tokens, tokens)
        if above in (0, len(sizes)):
            return sizes[max(0, above - 1)].seconds
        low, high = sizes[above - 1 : above + 1]
        return low.seconds + (tokens - low.tokens) * (high.seconds - low.seconds) / (high.tokens - low.tokens)

    def tokens_within(self, seconds: float) -> float:
        """Return how many tokens a step may have that is to take `seconds`, or twice the least that any takes.

        Returns: infinite where no size says how steps grow.
        """
        sizes = self._ascending
        if len(sizes) < 2:
            return math.inf
        seconds = max(seconds, 2 * sizes[0].seconds)
        above = min(bisect_right(self._seconds, seconds), len(sizes) - 1)
        low, high = sizes[above - 1 : above + 1]
        if high.seconds <= low.seconds:
            return math.inf
        return low.tokens + (seconds - low.seconds) * (high.tokens - low.tokens) / (high.seconds - low.seconds)
