"""The queue as a front end hears of it: soon, seldom, and always how it is in the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from moe_forward import queue_watch
from moe_forward.queue_watch import QueueWatch
from moe_forward.types import QueueReport

if TYPE_CHECKING:
    from tests.service.conftest import Gate, Pool


class Queue:
    """What waits, and what was told of it."""

    def __init__(self) -> None:
        self.now = QueueReport(0, 0)
        self.told: list[QueueReport] = []
        self.watch = QueueWatch(lambda: self.now, self.told.append)

    def becomes(self, requests: int) -> None:
        self.now = QueueReport(requests, 10 * requests)
        self.watch.changed(*self.now)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_watch, "REST_SECONDS", 0.02)


@pytest.fixture
async def queue() -> Queue:
    return Queue()


async def test_many_changes_are_told_once_as_they_ended(queue: Queue) -> None:
    for requests in (1, 5, 3):
        queue.becomes(requests)
    await asyncio.sleep(0.06)
    assert queue.told == [QueueReport(3, 30)]
    queue.becomes(0)
    await asyncio.sleep(0.06)
    assert queue.told[1:] == [QueueReport(0, 0)]


async def test_a_queue_that_is_again_as_told_is_not_told(queue: Queue) -> None:
    for requests in (2, 0):
        queue.becomes(requests)
    await asyncio.sleep(0.06)
    queue.watch.told(QueueReport(4, 40))  # a step's report said so
    queue.becomes(4)
    await asyncio.sleep(0.06)
    assert queue.told == []


async def test_after_its_end_nothing_is_told(queue: Queue) -> None:
    queue.becomes(1)
    queue.watch.close()
    await asyncio.sleep(0.06)
    assert queue.told == []


async def test_the_engine_tells_what_waits_behind_a_step_that_does_not_end_and_when_it_is_cancelled(
    pool: Pool, gate: Gate
) -> None:
    front = await pool.start(gate)
    heard: list[QueueReport] = []
    front.link.on_queue = heard.append
    running = front.send(front.request())
    await front.until(lambda: gate.entered == 1)
    waiting = [front.send(front.request(tokens=3)) for _ in range(2)]
    await front.until(lambda: heard[-1:] == [QueueReport(2, 6)])
    for task in waiting:
        task.cancel()
    await front.until(lambda: heard[-1:] == [QueueReport(0, 0)])
    gate.open()
    assert (await running).code is None


async def test_the_engine_tells_of_an_expired_request_too(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    heard: list[QueueReport] = []
    front.link.on_queue = heard.append
    running = front.send(front.request())
    await front.until(lambda: gate.entered == 1)
    late = front.request(timeout_seconds=0.3)
    assert (await front.forward(late)).code is not None
    await front.until(lambda: QueueReport(1, 2) in heard and heard[-1] == QueueReport(0, 0))
    gate.open()
    await running
