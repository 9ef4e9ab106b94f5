"""Signs of life: a rank's process sends one now and then, and the engine notices which rank has gone silent.

A closed socket tells of a dead process at once. Of one that is stopped, swapped out or stuck in a driver call it tells
nothing; without heartbeats, only the next step's timeout would.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from moe_forward.errors import ChannelClosed

BEATS = 5
"""Heartbeats of a rank in the time after which its silence means that it is lost."""

JOIN_SECONDS = 1.0


class Heartbeats:
    """When each rank of a group was last heard; all times are of one clock, in seconds.

    silence_seconds: a rank that was not heard for so long is silent.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._heard: dict[int, float] = {}
        self._look_at = math.inf

    @property
    def look_at(self) -> float:
        """When to call `silent` next; infinite while nobody is watched."""
        return self._look_at

    def watch(self, ranks: Iterable[int], now: float) -> None:
        """Watch these ranks instead of any others; they count as heard."""
        self._heard = dict.fromkeys(ranks, now)
        self._look_at = now + self._silence_seconds if self._heard else math.inf

    def heard(self, rank: int, now: float) -> None:
        """Take note of a sign of life; of a rank that is not watched it means nothing."""
        if rank in self._heard:
            self._heard[rank] = now

    def silent(self, now: float) -> list[int]:
        """Return the ranks that are silent, ascending, and settle when to look next.

        Who looks much later than he meant to was away himself (stopped, starved, a machine that was moved), and may not
        have read what the ranks sent meanwhile: he judges nobody, and starts anew.
        """
        if now > self._look_at + self._silence_seconds / BEATS:
            self.watch(self._heard, now)
            return []
        silent = sorted(rank for rank, heard in self._heard.items() if now - heard >= self._silence_seconds)
        self._look_at = min(self._heard.values(), default=math.inf) + self._silence_seconds
        return silent


class SilenceWatch:
    """`Heartbeats` on the asyncio loop that runs.

    silence_seconds: see there; None: nobody is watched. on_silence: called with the ranks that are silent, which ends
        the watch.
    """

    def __init__(self, silence_seconds: float | None, on_silence: Callable[[list[int]], None]) -> None:
        self.silence_seconds = silence_seconds
        self._heartbeats = Heartbeats(math.inf if silence_seconds is None else silence_seconds)
        self._on_silence = on_silence
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, ranks: Iterable[int]) -> None:
        """Watch these ranks instead of any others."""
        self.stop()
        self._heartbeats.watch(ranks, self._loop.time())
        self._set_timer()

    def heard(self, rank: int) -> None:
        """Take note of a sign of life."""
        if self._timer is not None:
            self._heartbeats.heard(rank, self._loop.time())

    def stop(self) -> None:
        """Watch nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        if self._heartbeats.look_at < math.inf:
            self._timer = self._loop.call_at(self._heartbeats.look_at, self._look)

    def _look(self) -> None:
        self._timer = None
        # The loop reads sockets before it calls timers, so what was sent in time has been heard.
        silent = self._heartbeats.silent(self._loop.time())
        if silent:
            self._on_silence(silent)
        else:
            self._set_timer()


@contextmanager
def beating(send: Callable[[], None], silence_seconds: float) -> Iterator[None]:
    """Call `send` from a thread, `BEATS` times in `silence_seconds`, while the block runs.

    A thread, since the rank's own may wait for a GPU or for other ranks in good health; torch lets threads run
    meanwhile. send: may raise ChannelClosed, which ends the thread: the rank's own sees the end of the channel too.
    """
    stop = threading.Event()

    def beat() -> None:
        with suppress(ChannelClosed):
            while not stop.wait(silence_seconds / BEATS):
                send()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(JOIN_SECONDS)  # it may wait to send to an engine that is stopped; the process ends without it
