"""How long a step that is not full waits for company while the ranks are free."""

from __future__ import annotations

import math

MEMORY = 0.8
QUIET_GAPS = 3.0


class Company:
    """How soon another request of a layer follows one that found the line empty: arrivals over the time watched.

    A watch begins with a request that finds the line empty. It ends after `window_seconds`, or with that request's
    answer: a client that sends one request at a time sends its next one then, and must not be taken for company.
    At first company is expected, half a window apart.
    """

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._arrivals = 1.0
        self._watched_seconds = window_seconds / 2
        self._began: float | None = None
        self._came = 0

    @property
    def gap_seconds(self) -> float:
        """Time until the next request comes, on average; infinite where none ever does."""
        return self._watched_seconds / self._arrivals if self._arrivals else math.inf

    def arrived(self, now: float, alone: bool) -> None:
        """Note a request. alone: it found the line empty."""
        if self._began is not None:
            if now > self._began + self._window_seconds:
                self._end(now, self._began)
            else:
                self._came += 1
        if alone:
            if self._began is not None:
                self._end(now, self._began)
            self._began = now

    def answered(self, sent_seconds: float, now: float) -> None:
        """Note that a step, sent at `sent_seconds`, has ended."""
        if self._began is not None and sent_seconds >= self._began:
            self._end(now, self._began)

    def _end(self, now: float, began: float) -> None:
        watched = min(now - began, self._window_seconds)
        self._arrivals = MEMORY * self._arrivals + self._came
        self._watched_seconds = MEMORY * self._watched_seconds + watched
        self._began, self._came = None, 0


def due_seconds(
    first: float, last: float, requests: int, gap_seconds: float, max_wait_seconds: float, step_seconds: float | None
) -> float:
    """Return when requests that wait should go, if nobody joins them.

    first, last: when the oldest and the newest came. gap_seconds: until the next one, on average.
    step_seconds: of such a step, None where it is not known.

    At once where the next one is not expected before `max_wait_seconds` of the oldest are over. At once, too, where
    waiting costs more than it saves: each of the n that wait loses a gap, and the one that comes, which would have
    missed the step, is spared the rest of it; so waiting pays while (n + 1) gaps are less than a step. Else until
    nobody has come for three gaps, which ends a burst soon after its last request (arrivals at random would be cut
    short once in twenty times), and never longer than `max_wait_seconds`.
    """
    end = first + max_wait_seconds
    if last + gap_seconds > end:
        return last
    if step_seconds is not None and (requests + 1) * gap_seconds > step_seconds:
        return last
    return min(end, last + QUIET_GAPS * gap_seconds)
