"""Waiting until a moment to within microseconds, without spinning.

uvloop's and epoll's timeouts are whole milliseconds, longer than many a forward; a Linux timerfd is exact.
Source: timerfd_create(2).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

CLOCK_MONOTONIC = 1
TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
TFD_TIMER_ABSTIME = 1
NANOSECONDS = 1_000_000_000


class Clock(Protocol):
    """Time, and waiting for it."""

    def now_ns(self) -> int:
        """Nanoseconds since some moment that is the same for all processes of this host."""

    async def sleep_until(self, moment_ns: int) -> None:
        """Return at `moment_ns` or right after; let others run even if it is over."""


class _TimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class MonotonicClock:
    """The clock of time.monotonic, to wait on from one task at a time."""

    now_ns: Callable[[], int] = staticmethod(time.monotonic_ns)

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")

    async def sleep_until(self, moment_ns: int) -> None:
        """As `Clock.sleep_until`."""
        if moment_ns <= time.monotonic_ns():
            await asyncio.sleep(0)
            return
        spec = _TimerSpec(0, 0, moment_ns // NANOSECONDS, moment_ns % NANOSECONDS)
        if self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()
        loop.add_reader(self._fd, rung.set)
        try:
            await rung.wait()
        finally:
            loop.remove_reader(self._fd)

    def __enter__(self) -> MonotonicClock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
