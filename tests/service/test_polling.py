"""Looking for a message for a while before sleeping."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from moe_forward.polling import Awake, PollingSelector, poll_until

LONG_SECONDS = 30.0
"""To look for a message; what is tested comes much earlier, however slow the machine is."""
SHORT_SECONDS = 0.02


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection, of which the first end is read."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.fixture(params=[0.0, SHORT_SECONDS, LONG_SECONDS])
def selector(request: pytest.FixtureRequest, ends: tuple[socket.socket, socket.socket]) -> Iterator[PollingSelector]:
    with PollingSelector(request.param) as selector:
        selector.register(ends[0], selectors.EVENT_READ)
        yield selector


def test_what_is_there_is_returned_at_once(
    selector: PollingSelector, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(b"x")
    for timeout in (None, 0.0, LONG_SECONDS, None):
        assert [key.fileobj for key, _ in selector.select(timeout)] == [ends[0]]


def test_what_comes_while_it_looks_or_sleeps_is_returned(
    selector: PollingSelector, ends: tuple[socket.socket, socket.socket]
) -> None:
    for pause in (0.0, 2.5 * SHORT_SECONDS):
        sender = threading.Timer(pause, ends[1].send, [b"x"])
        sender.start()
        assert len(selector.select(None)) == 1
        assert ends[0].recv(1) == b"x"
        sender.join()


def test_nothing_is_returned_after_the_time_out_and_not_before(
    selector: PollingSelector, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(b"x")
    selector.select(None)  # from now on it looks
    ends[0].recv(1)
    started = time.monotonic()
    assert selector.select(SHORT_SECONDS) == []
    assert time.monotonic() - started >= SHORT_SECONDS
    assert selector.select(0.0) == selector.select(-1.0) == []


def test_a_loop_of_it_calls_timers_and_readers(selector: PollingSelector) -> None:
    async def talk() -> list[str]:
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair()
        heard: list[str] = []
        with one, other:
            one.setblocking(False)
            loop.call_later(SHORT_SECONDS, lambda: (heard.append("timer"), other.send(b"x")))
            await loop.sock_recv(one, 1)
        return [*heard, "read"]

    loop = asyncio.SelectorEventLoop(selector)
    try:
        assert loop.run_until_complete(talk()) == ["timer", "read"]
    finally:
        loop.close()


async def test_a_touched_loop_stays_awake_for_that_long_and_then_sleeps() -> None:
    loop = asyncio.get_running_loop()
    awake = Awake(SHORT_SECONDS)

    async def cpu_seconds_of(seconds: float) -> float:
        before = time.thread_time()
        await asyncio.sleep(seconds)
        return time.thread_time() - before

    asleep = await cpu_seconds_of(10 * SHORT_SECONDS)
    until = loop.time() + 10 * SHORT_SECONDS

    def touch() -> None:
        awake.touch()
        if loop.time() < until:
            loop.call_later(SHORT_SECONDS / 4, touch)

    touch()
    assert await cpu_seconds_of(10 * SHORT_SECONDS) > 4 * asleep
    await asyncio.sleep(2 * SHORT_SECONDS)
    assert await cpu_seconds_of(10 * SHORT_SECONDS) < 10 * SHORT_SECONDS / 2


async def test_no_time_to_stay_awake_means_no_turns() -> None:
    calls = []
    loop = asyncio.get_running_loop()
    call_soon = loop.call_soon
    loop.call_soon = lambda *arguments, **options: (calls.append(1), call_soon(*arguments, **options))[1]  # type: ignore[method-assign,assignment]
    try:
        Awake(0.0).touch()
    finally:
        loop.call_soon = call_soon  # type: ignore[method-assign]
    assert not calls


def test_polling_ends_when_it_is_ready_or_the_time_is_over() -> None:
    asked: list[int] = []

    def ready() -> bool:
        asked.append(1)
        return len(asked) == 3

    poll_until(ready, LONG_SECONDS)
    assert len(asked) == 3
    started = time.monotonic()
    poll_until(lambda: False, SHORT_SECONDS)
    assert time.monotonic() - started >= SHORT_SECONDS
    poll_until(lambda: os.abort() is None, 0.0)  # not even asked
