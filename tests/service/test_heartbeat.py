"""Who is silent, when to look, and that a watcher who was away himself judges nobody."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time

import uvloop

from moe_forward.errors import ChannelClosed
from moe_forward.heartbeat import BEATS, Heartbeats, SilenceWatch, beating, keep_beating

HANG_SECONDS = 20.0


def watched(*ranks: int, now: float = 100.0) -> Heartbeats:
    made = Heartbeats(10.0)
    made.watch(ranks, now)
    return made


def test_a_rank_that_was_not_heard_for_the_whole_time_is_silent() -> None:
    heartbeats = watched(0, 1, 2)
    for now in (102.0, 104.0, 106.0, 108.0):
        heartbeats.heard(0, now)
    heartbeats.heard(2, 103.0)
    assert heartbeats.look_at == 110.0
    assert heartbeats.silent(110.0) == [1]


def test_the_next_look_is_when_the_one_heard_longest_ago_would_be_silent() -> None:
    heartbeats = watched(0, 1)
    heartbeats.heard(0, 109.0)
    heartbeats.heard(1, 104.0)
    assert heartbeats.silent(110.0) == []
    assert heartbeats.look_at == 114.0
    assert heartbeats.silent(113.9) == []
    assert heartbeats.silent(114.0) == [1]


def test_who_looks_too_late_was_away_and_judges_nobody() -> None:
    heartbeats = watched(0, 1)
    assert heartbeats.silent(100.0 + 10.0 + 10.0 / BEATS + 0.1) == []
    assert heartbeats.look_at == 122.1
    assert heartbeats.silent(122.1) == [0, 1], "now they had their time"


def test_a_rank_of_another_group_does_not_count() -> None:
    heartbeats = watched(0, 1)
    heartbeats.watch([0], 105.0)
    heartbeats.heard(1, 106.0)
    assert heartbeats.silent(115.0) == [0]
    heartbeats.watch([], 116.0)
    assert heartbeats.look_at == math.inf


async def test_the_watch_tells_of_silent_ranks_once_and_of_no_others() -> None:
    told: list[list[int]] = []
    watch = SilenceWatch(0.4, told.append)
    watch.watch(range(2))
    ended = time.monotonic() + HANG_SECONDS
    while not told and time.monotonic() < ended:
        watch.heard(0)
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    assert told == [[1]]


async def test_nobody_is_watched_after_the_watch_was_stopped_or_without_a_limit() -> None:
    told: list[list[int]] = []
    stopped, unlimited = SilenceWatch(0.05, told.append), SilenceWatch(None, told.append)
    stopped.watch([0])
    stopped.stop()
    unlimited.watch([0])
    unlimited.heard(0)
    await asyncio.sleep(0.15)
    assert told == []


def test_a_sign_of_life_that_waits_in_a_socket_is_heard_by_a_loop_that_calls_timers_first() -> None:
    told: list[list[int]] = []

    async def pause_while_it_comes() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            watch = SilenceWatch(1.0, told.append)

            def hear() -> None:
                ours.recv(100)
                watch.heard(0)

            loop.add_reader(ours, hear)
            watch.watch([0])
            await asyncio.sleep(0.9)
            theirs.send(b"alive")
            time.sleep(0.2)  # past the moment to look, by less than tells of having been away
            await asyncio.sleep(0.3)
            loop.remove_reader(ours)
            watch.stop()

    uvloop.run(pause_while_it_comes())
    assert told == []


async def test_a_loop_that_turns_beats_and_is_never_silent() -> None:
    told: list[list[int]] = []
    watch = SilenceWatch(0.5, told.append)
    watch.watch([0])
    beating = asyncio.create_task(keep_beating(lambda: watch.heard(0), 0.5))
    await asyncio.sleep(1.2)
    assert told == []
    beating.cancel()
    await asyncio.sleep(0.8)
    assert told == [[0]]


def heartbeat_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "heartbeat"}


def test_a_thread_beats_while_the_block_runs_and_no_longer() -> None:
    beats, others = threading.Semaphore(0), heartbeat_threads()
    with beating(beats.release, 0.02 * BEATS):
        assert all(beats.acquire(timeout=HANG_SECONDS) for _ in range(3))
    while beats.acquire(blocking=False):
        pass
    assert not beats.acquire(timeout=0.1)
    assert heartbeat_threads() <= others


def test_an_engine_that_hung_up_ends_the_beating_quietly() -> None:
    asked, others = threading.Event(), heartbeat_threads()

    def send() -> None:
        asked.set()
        raise ChannelClosed("the engine is gone")

    with beating(send, 0.02 * BEATS):
        assert asked.wait(HANG_SECONDS)
    assert heartbeat_threads() <= others
