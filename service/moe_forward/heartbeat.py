"""Signs of life: ranks send one to the engine now and then, the engine and front ends to the service's process, and who
hears them notices who has gone silent.

A closed socket tells of a dead process at once. Of one that is stopped, swapped out or stuck in a driver call it tells
nothing; without heartbeats a stopped rank would be noticed by the next step's timeout, and its clients would wait for a
stopped front end for ever.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from moe_forward.errors import ChannelClosed

BEATS = 5
"""Signs of life in the time after which silence means that a process is lost."""

JOIN_SECONDS = 1.0
AGAIN_SECONDS = 0.02
"""Between two looks: uvloop calls timers before it reads sockets, so after a pause the first may be too early."""


class Heartbeats:
    """When each of some processes was last heard, by number; all times are of one clock, in seconds.

    silence_seconds: who was not heard for so long is silent.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._heard: dict[int, float] = {}
        self._look_at = math.inf

    @property
    def look_at(self) -> float:
        """When to call `silent` next; infinite while nobody is watched."""
        return self._look_at

    def watch(self, numbers: Iterable[int], now: float) -> None:
        """Watch these instead of any others; they count as heard."""
        self._heard = dict.fromkeys(numbers, now)
        self._look_at = now + self._silence_seconds if self._heard else math.inf

    def heard(self, number: int, now: float) -> None:
        """Take note of a sign of life; of one that is not watched it means nothing."""
        if number in self._heard:
            self._heard[number] = now

    def silent(self, now: float) -> list[int]:
        """Return who is silent, ascending, and settle when to look next.

        Who looks much later than he meant to was away himself (stopped, starved, a machine that was moved), and may not
        have read what was sent meanwhile: he judges nobody, and starts anew.
        """
        if now > self._look_at + self._silence_seconds / BEATS:
            self.watch(self._heard, now)
            return []
        silent = sorted(number for number, heard in self._heard.items() if now - heard >= self._silence_seconds)
        self._look_at = min(self._heard.values(), default=math.inf) + self._silence_seconds
        return silent


class SilenceWatch:
    """`Heartbeats` on the asyncio loop that runs.

    silence_seconds: see there; None: nobody is watched. on_silence: called with who is silent, which ends the
        watch.
    """

    def __init__(self, silence_seconds: float | None, on_silence: Callable[[list[int]], None]) -> None:
        self.silence_seconds = silence_seconds
        self._heartbeats = Heartbeats(math.inf if silence_seconds is None else silence_seconds)
        self._on_silence = on_silence
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, numbers: Iterable[int]) -> None:
        """Watch these instead of any others, on the loop that runs."""
        self._loop = asyncio.get_running_loop()
        self.stop()
        self._heartbeats.watch(numbers, self._loop.time())
        self._set_timer()

    def heard(self, number: int) -> None:
        """Take note of a sign of life."""
        if self._timer is not None:
            self._heartbeats.heard(number, self._loop.time())

    def stop(self) -> None:
        """Watch nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        if self._heartbeats.look_at < math.inf:
            self._timer = self._loop.call_at(self._heartbeats.look_at, self._look)

    def _look(self) -> None:
        self._timer = self._loop.call_later(AGAIN_SECONDS, self._judge)

    def _judge(self) -> None:
        self._timer = None
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


async def keep_beating(send: Callable[[], None], silence_seconds: float) -> None:
    """Call `send` from the loop that runs, `BEATS` times in `silence_seconds`, for ever."""
    while True:
        await asyncio.sleep(silence_seconds / BEATS)
        send()
