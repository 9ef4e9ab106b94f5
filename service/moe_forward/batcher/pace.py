"""How long steps take and how fast tokens leave, learned from the steps that have finished."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

SMOOTHING = 0.2
RATE_SMOOTHING = 0.1


class Pace:
    """Moving averages. tokens_per_second: while ranks compute; 0 before the first step. steps: that were learned from.

    longest_seconds: what `expected_seconds` says at most. fewest_tokens: what `tokens_within` says at least.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self.steps = 0
        self.longest_seconds = 0.0
        self.fewest_tokens = math.inf
        # Steps of about one size: how many tokens on average and how long they take, both ascending.
        self._tokens: list[float] = []
        self._seconds: list[float] = []
        self._places: dict[int, int] = {}  # where in them, by bits of the number of tokens

    def finished(self, tokens: int, seconds: float) -> None:
        """Learn from a step. seconds: since it could begin, so that steps that overlap are not counted twice.

        Also about other sizes, not tried since ranks became slower or quicker: a larger step takes
        no less, but no more than in proportion, since it could be several of these; a smaller one the other way round.
        """
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_second += (rate - self.tokens_per_second) * (RATE_SMOOTHING if self.tokens_per_second else 1)
        bits = tokens.bit_length()
        if bits not in self._places:
            self._insert(bits, tokens, seconds)
        place = self._places[bits]
        mean_tokens = self._tokens[place]
        mean_tokens += (tokens - mean_tokens) * SMOOTHING
        mean_seconds = self._seconds[place]
        mean_seconds += (seconds - mean_seconds) * SMOOTHING
        self._tokens[place], self._seconds[place] = mean_tokens, mean_seconds
        for other, its_tokens in enumerate(self._tokens):
            if other != place:
                times = its_tokens / mean_tokens
                least, most = mean_seconds * min(1.0, times), mean_seconds * max(1.0, times)
                self._seconds[other] = min(max(self._seconds[other], least), most)
        self.steps += 1
        self.longest_seconds = max(self._seconds)
        self.fewest_tokens = self.tokens_within(0.0)

    def step_seconds(self, tokens: int) -> float | None:
        """Return how long a step of `tokens` takes, by those nearest in size (a factor of two); None before any."""
        if not self._places:
            return None
        wanted = tokens.bit_length()
        place = self._places.get(wanted)
        if place is None:
            place = self._places[min(self._places, key=lambda bits: abs(bits - wanted))]
        return self._seconds[place]

    def expected_seconds(self, tokens: float) -> float | None:
        """Return the same between the sizes that were seen, for steps of any.

        Smaller ones than any take as long as the smallest, since that is mostly what every step takes; larger ones as
        long as the largest: how much longer is seen when there is one, and nobody is refused for a guess.
        """
        if not self._tokens:
            return None
        above = bisect_left(self._tokens, tokens)
        if above in (0, len(self._tokens)):
            return self._seconds[max(0, above - 1)]
        low, high = self._tokens[above - 1 : above + 1]
        low_seconds, high_seconds = self._seconds[above - 1 : above + 1]
        return low_seconds + (tokens - low) * (high_seconds - low_seconds) / (high - low)

    def tokens_within(self, seconds: float) -> float:
        """Return how many tokens a step may have that is to take `seconds`, or twice the least that any takes.

        Returns: infinite where no size says how steps grow.
        """
        sizes = len(self._tokens)
        if sizes < 2:
            return math.inf
        seconds = max(seconds, 2 * self._seconds[0])
        above = min(bisect_right(self._seconds, seconds), sizes - 1)
        low, high = self._tokens[above - 1 : above + 1]
        low_seconds, high_seconds = self._seconds[above - 1 : above + 1]
        if high_seconds <= low_seconds:
            return math.inf
        return low + (seconds - low_seconds) * (high - low) / (high_seconds - low_seconds)

    def _insert(self, bits: int, tokens: int, seconds: float) -> None:
        place = sum(other < bits for other in self._places)
        self._tokens.insert(place, tokens)
        self._seconds.insert(place, seconds)
        self._places = {other: at + (other > bits) for other, at in self._places.items()}
        self._places[bits] = place
