"""An alarm whose moment changes, and a watchdog that is called only by what takes too long."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import pytest
import uvloop

from moe_forward.timers import Alarm, Watchdog

LONG_SECONDS = 0.2


class Work:
    """What a watchdog watches: when it began, and how often it was late."""

    def __init__(self, seconds: float) -> None:
        self.began_seconds = math.inf
        self.late: list[float] = []
        self.watchdog = Watchdog(lambda: self.began_seconds, seconds, lambda: self.late.append(time.monotonic()))

    def begin(self) -> None:
        self.began_seconds = time.monotonic()
        self.watchdog.watch()


async def test_an_alarm_rings_once_at_the_moment_that_was_settled_last() -> None:
    rings: list[float] = []
    alarm = Alarm(lambda: rings.append(time.monotonic()))
    now = time.monotonic()
    for seconds in (0.02, 10.0, 0.06):
        alarm.set(now + seconds, now)
        assert alarm.at == now + seconds
    await asyncio.sleep(LONG_SECONDS)
    (rang,) = rings
    assert rang >= now + 0.06
    assert alarm.at == math.inf


async def test_an_alarm_for_a_moment_that_has_passed_rings_in_the_next_turn() -> None:
    rung = asyncio.Event()
    alarm = Alarm(rung.set)
    alarm.set(1.0, 2.0)
    assert not rung.is_set()
    await asyncio.wait_for(rung.wait(), 10.0)


@pytest.mark.parametrize("how", [Alarm.stop, lambda alarm: alarm.set(math.inf, 0.0)], ids=["stopped", "set to never"])
async def test_an_alarm_that_is_not_wanted_any_more_does_not_ring(how: Callable[[Alarm], None]) -> None:
    rings: list[int] = []
    alarm = Alarm(lambda: rings.append(1))
    now = time.monotonic()
    alarm.set(now + 0.02, now)
    how(alarm)
    assert alarm.at == math.inf
    await asyncio.sleep(0.06)
    assert rings == []


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_what_takes_too_long_is_told_once_and_not_before_its_time(run: Callable[..., None]) -> None:
    async def main() -> None:
        work = Work(0.05)
        work.begin()
        await asyncio.sleep(LONG_SECONDS)
        (told,) = work.late
        assert told >= work.began_seconds + 0.05

    run(main())


async def test_each_of_many_has_its_time_from_its_own_beginning() -> None:
    work = Work(0.1)
    for _ in range(8):  # together they take longer than one may
        work.begin()
        await asyncio.sleep(0.03)
    assert work.late == []
    began = work.began_seconds
    await asyncio.sleep(LONG_SECONDS)
    (told,) = work.late
    assert began + 0.1 <= told < began + 0.1 + LONG_SECONDS


async def test_while_nothing_is_under_way_nothing_is_late_and_what_comes_then_is_watched() -> None:
    work = Work(0.02)
    work.begin()
    work.began_seconds = math.inf
    await asyncio.sleep(0.06)
    assert work.late == []
    work.begin()
    await asyncio.sleep(0.06)
    assert len(work.late) == 1


async def test_after_its_end_nothing_is_told() -> None:
    work = Work(0.02)
    work.begin()
    work.watchdog.stop()
    await asyncio.sleep(0.06)
    assert work.late == []
