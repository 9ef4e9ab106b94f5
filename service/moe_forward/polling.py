"""Looking for the next message for a while before sleeping.

A process that slept is woken some 50 microseconds late, on a core whose caches are cold and whose clock is low; of a
request's way through four processes that is most. Whoever looks again and again instead needs a core of its own.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable


class PollingSelector(selectors.SelectSelector):
    """Of an asyncio loop: sleeps only when nothing has come for `poll_seconds`.

    select(2), since epoll rounds timeouts up to a millisecond; for loops with few sockets.
    """

    def __init__(self, poll_seconds: float) -> None:
        super().__init__()
        self._poll_seconds = poll_seconds
        self._came_seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready within `timeout` seconds, like every selector."""
        started = now = time.perf_counter()
        give_up = self._came_seconds + self._poll_seconds
        if timeout is not None:
            give_up = min(give_up, started + timeout)
        while now < give_up:
            if ready := super().select(0.0):
                self._came_seconds = now
                return ready
            now = time.perf_counter()
        ready = super().select(timeout if timeout is None else max(0.0, started + timeout - now))
        if ready:
            self._came_seconds = time.perf_counter()
        return ready


class Awake:
    """Keeps the running loop, of any kind, from sleeping for `poll_seconds` after each `touch`."""

    def __init__(self, poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._until = 0.0
        self._turning = False

    def touch(self) -> None:
        """Something came, or was asked for."""
        if self._poll_seconds:
            self._until = time.perf_counter() + self._poll_seconds
            if not self._turning:
                self._turning = True
                self._turn(asyncio.get_running_loop())

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if time.perf_counter() < self._until:
            loop.call_soon(self._turn, loop)  # a loop with something to call looks at its sockets without waiting
        else:
            self._turning = False


def poll_until(ready: Callable[[], bool], poll_seconds: float) -> None:
    """Return when `ready` says so, or after `poll_seconds`."""
    give_up = time.perf_counter() + poll_seconds
    while time.perf_counter() < give_up and not ready():
        pass
