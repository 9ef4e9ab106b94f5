"""What is counted some at a time: one by one, between two requests, the code that counts has left the caches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

MOST_WAITING = 32
"""So few that counting them is no pause that a request would notice."""

Thing = TypeVar("Thing")


class CountedTogether(Generic[Thing]):
    """Notes what happened on one thread; counts it when `MOST_WAITING` wait, or when somebody on any thread asks.

    count: called with what waits, in its order, never from two threads at a time.
    """

    def __init__(self, count: Callable[[list[Thing]], None]) -> None:
        self._count = count
        self._waiting: list[Thing] = []
        self._lock = threading.Lock()

    def add(self, thing: Thing) -> None:
        """Note one; nobody may change it afterwards."""
        self._waiting.append(thing)
        if len(self._waiting) >= MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        """Count all that was noted before."""
        with self._lock:
            waiting = self._waiting[:]
            del self._waiting[: len(waiting)]  # what is noted meanwhile stays
            if waiting:
                self._count(waiting)
