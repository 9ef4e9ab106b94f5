"""The engine with several steps at the ranks: order, times, loss, and bytes that nobody may touch yet."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from typing import TYPE_CHECKING

import pytest

from moe_forward.batcher import BatchLimits
from moe_forward.errors import ErrorCode
from moe_forward.types import ForwardResult, Step, StepResult

if TYPE_CHECKING:
    from tests.service.conftest import FakeRank, Front, Gate, Pool

EVERY_REQUEST_FILLS_A_STEP = BatchLimits(64, 1, 0.0, 8, 1000, max_steps_in_flight=2)


@pytest.fixture(autouse=True)
def _steps_of_one_request(pool: Pool) -> None:
    pool.limits = EVERY_REQUEST_FILLS_A_STEP


async def fill(front: Front, gate: Gate, requests: int, ranks: int = 1) -> list[asyncio.Task[ForwardResult]]:
    """Send requests, and wait until ranks are held in the first and the engine has taken in all."""
    tasks = [front.send(front.request(layer=3))]
    await front.until(lambda: gate.entered == ranks)
    tasks += [front.send(front.request(layer=3 + number)) for number in range(1, requests)]
    await front.until(lambda: front.link.inflight == requests)
    refused = await front.forward(front.request(timeout_seconds=-1.0))  # a round trip after them
    assert refused.code is not None
    return tasks


def releases(front: Front, tasks: int) -> list[int]:
    """Note which of the first requests, by number, are free."""
    freed: list[int] = []
    for number in range(1, tasks + 1):
        front.link.release_when_done(number, functools.partial(freed.append, number))
    return freed


async def test_the_next_step_is_sent_while_one_runs_and_the_one_after_it_is_not(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    tasks = await fill(front, gate, requests=3)
    assert pool.ranks[0].has_more()
    held_seconds = 0.05
    await asyncio.sleep(held_seconds)
    gate.open()
    results = await asyncio.gather(*tasks)
    assert [(result.code, result.step) for result in results] == [(None, 0), (None, 1), (None, 2)]
    assert [step.layer for step in pool.ranks[0].steps] == [3, 4, 5]
    assert results[0].step_seconds > held_seconds
    assert results[1].queue_seconds > held_seconds, "it waited behind the first, at the ranks"
    assert results[1].step_seconds < results[0].step_seconds


async def test_one_in_flight_sends_nothing_ahead(pool: Pool, gate: Gate) -> None:
    pool.limits = BatchLimits(64, 1, 0.0, 8, 1000, max_steps_in_flight=1)
    front = await pool.start(gate)
    tasks = await fill(front, gate, requests=2)
    assert not pool.ranks[0].has_more()
    gate.open()
    assert [result.code for result in await asyncio.gather(*tasks)] == [None, None]


async def test_when_a_rank_dies_all_steps_in_flight_are_lost_and_held_until_the_others_are_gone(
    pool: Pool, gate: Gate
) -> None:
    front = await pool.start(gate, gate)
    tasks = await fill(front, gate, requests=3, ranks=2)
    freed = releases(front, 3)
    pool.ranks[0].kill()
    results = await asyncio.gather(*tasks)
    assert [result.code for result in results] == [ErrorCode.RANK_LOST] * 3
    assert [result.held for result in results] == [True, True, False], "two were at the ranks, one in the queue"
    assert freed == [3]
    gate.open()  # rank 1 does both steps and answers them; nobody waits for its words any more
    rank = pool.ranks[1]
    await front.until(lambda: len(rank.steps) == 2)
    await asyncio.sleep(0.02)
    assert freed == [3]
    rank.kill()
    await front.until(lambda: freed == [3, 1, 2])
    assert front.link.status.reason == "rank 0 is gone"


async def test_late_words_of_lost_steps_do_not_answer_those_of_the_next_group(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate, gate)
    tasks = await fill(front, gate, requests=2, ranks=2)
    pool.ranks[0].kill()
    await asyncio.gather(*tasks)
    old = pool.ranks[1]
    second = threading.Event()
    await pool.add_group(front, 2, lambda rank, step: rank.work(step) if second.wait(10) else None)
    running = front.send(front.request())
    await front.until(lambda: len(pool.ranks[2].steps) == 1)
    gate.open()
    await front.until(lambda: len(old.steps) == 2)
    await asyncio.sleep(0.02)
    assert not running.done()
    second.set()
    assert (await running).code is None


async def test_a_step_behind_another_is_not_late_by_waiting(pool: Pool) -> None:
    def slow(rank: FakeRank, step: Step) -> StepResult:
        time.sleep(0.15)
        return rank.work(step)

    pool.step_timeout_seconds = 0.25
    pool.limits = BatchLimits(64, 1, 0.0, 8, 1000, max_steps_in_flight=4)
    front = await pool.start(slow)
    results = await asyncio.gather(*(front.forward(front.request()) for _ in range(4)))
    assert [result.code for result in results] == [None] * 4
    assert max(result.step_seconds for result in results) < 0.25 < max(result.queue_seconds for result in results)


async def test_a_step_that_hangs_behind_a_good_one_loses_the_group_by_name(pool: Pool) -> None:
    def hangs_second(rank: FakeRank, step: Step) -> StepResult | None:
        return rank.work(step) if step.step == 0 else None

    pool.step_timeout_seconds = 0.1
    front = await pool.start(None, hangs_second)
    results = await asyncio.gather(*(front.forward(front.request()) for _ in range(3)))
    assert [result.code for result in results] == [None, ErrorCode.RANK_LOST, ErrorCode.RANK_LOST]
    assert results[1].message == "step 1 took longer than 0.1 s; no word from ranks [1]"
    assert [result.held for result in results] == [False, True, True]


async def test_a_rank_that_fails_in_the_step_behind_loses_both(pool: Pool) -> None:
    def fails_second(rank: FakeRank, step: Step) -> StepResult | None:
        return rank.result(step, error="RuntimeError: broken") if step.step == 1 else None

    front = await pool.start(fails_second)
    results = await asyncio.gather(*(front.forward(front.request()) for _ in range(2)))
    assert [result.message for result in results] == ["rank 0 failed: RuntimeError: broken"] * 2
    assert [result.held for result in results] == [True, True]


async def test_a_request_cancelled_in_a_step_behind_keeps_its_bytes_until_that_step_ends(
    pool: Pool, gate: Gate
) -> None:
    front = await pool.start(gate)
    tasks = await fill(front, gate, requests=2)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    freed = releases(front, 2)
    await front.forward(front.request(timeout_seconds=-1.0))  # a round trip after the Cancel
    assert freed == []
    gate.open()
    await front.until(lambda: freed == [1, 2])
    assert len(pool.ranks[0].steps) == 2


async def test_a_client_with_little_waiting_is_let_in_when_another_has_filled_the_queue(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    tasks = await fill(front, gate, requests=10)  # two in flight, eight wait
    full = await front.forward(front.request())
    assert full.code == ErrorCode.QUEUE_FULL
    light = front.send(front.request(client=7))
    await front.until(lambda: front.link.inflight == 11)
    gate.open()
    assert [result.code for result in await asyncio.gather(light, *tasks)] == [None] * 11
    served = [step.requests[0].client for step in pool.ranks[0].steps]
    assert served.index(7) <= 4, "after those in flight, in turn with the other client"
