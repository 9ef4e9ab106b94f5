"""Telling a front end what waits in the queue, without a message for every request that comes and goes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from moe_forward.types import QueueReport

REST_SECONDS = 0.25


class QueueWatch:
    """Tells the last state of the queue soon after it has changed, and never more often than that.

    Step reports also say what waits; but while a step hangs, or when what waited is cancelled, no step ends.

    look: what waits now. tell: called with what waits, after it has been something else.
    """

    def __init__(self, look: Callable[[], QueueReport], tell: Callable[[QueueReport], None]) -> None:
        self._look = look
        self._tell = tell
        self._told = look()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def changed(self, requests: int, tokens: int) -> None:
        """Look at the queue after a while, where what waits now is not as told."""
        if self._timer is None and (requests, tokens) != self._told:
            self._timer = self._loop.call_later(REST_SECONDS, self._rested)

    def told(self, report: QueueReport) -> None:
        """Note what was told on another way."""
        self._told = report

    def close(self) -> None:
        """Say no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _rested(self) -> None:
        self._timer = None
        now = self._look()
        if now != self._told:
            self._told = now
            self._tell(now)
