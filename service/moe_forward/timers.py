"""Two timers of a loop: for a moment that is settled anew again and again, and for what mostly comes in time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Alarm:
    """Calls `on_ring` at a moment that may change until then. at: CLOCK_MONOTONIC; infinite: not at all."""

    def __init__(self, on_ring: Callable[[], None]) -> None:
        self.at = math.inf
        self._on_ring = on_ring
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at: float, now: float) -> None:
        """Ring at that moment, and at no other."""
        self.stop()
        self.at = at
        if at < math.inf:
            self._timer = self._loop.call_later(max(0.0, at - now), self._ring)

    def stop(self) -> None:
        """Do not ring."""
        self.at = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self.at, self._timer = math.inf, None
        self._on_ring()


class Watchdog:
    """Calls `on_late`, and ends, when something takes longer than `seconds`.

    began_seconds: when that which is under way now began (CLOCK_MONOTONIC); infinite while nothing is.

    A timer set anew for each of them would be work for every one that is in time. This one is left alone, and looks
    again when it goes off.
    """

    def __init__(self, began_seconds: Callable[[], float], seconds: float, on_late: Callable[[], None]) -> None:
        self._began_seconds = began_seconds
        self._seconds = seconds
        self._on_late = on_late
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Begin to watch, unless it does; it ends by itself when nothing is under way."""
        if self._timer is None:
            self._look()

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        left_seconds = self._began_seconds() + self._seconds - time.monotonic()
        if left_seconds <= 0:
            self._on_late()
        elif left_seconds < math.inf:
            self._timer = self._loop.call_later(left_seconds, self._look)
