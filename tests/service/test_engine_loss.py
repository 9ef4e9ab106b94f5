"""Engine and link when ranks fail, hang or die, and when the engine itself goes away and comes back."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from moe_forward.errors import ErrorCode
from moe_forward.messages import Announce
from moe_forward.types import Step, StepResult

if TYPE_CHECKING:
    from tests.service.conftest import FakeRank, Front, Gate, Pool


def fails(rank: FakeRank, step: Step) -> StepResult:
    return rank.result(step, error="RuntimeError: no more memory")


def dies(rank: FakeRank, step: Step) -> None:
    rank.kill()


def hangs(rank: FakeRank, step: Step) -> None:
    return None


async def lose_with_two_in_the_step_and_one_queued(pool: Pool, front: Front, gate: Gate) -> list[int]:
    """Run a first step to hold the ranks, then a step of two requests that goes wrong; return bytes freed by then."""
    tasks = [front.send(front.request(layer=3))]
    await front.until(lambda: gate.entered >= 1)
    requests = [front.request(layer=4), front.request(layer=4), front.request(layer=5)]
    tasks += [front.send(request) for request in requests]
    await front.until(lambda: front.link.inflight == 4)
    freed: list[int] = []
    for request in requests:
        front.link.release_when_done(request.request, functools.partial(freed.append, request.request))
    gate.open()
    results = await asyncio.gather(*tasks)
    assert [result.code for result in results] == [None] + [ErrorCode.RANK_LOST] * 3
    assert [result.held for result in results] == [False, True, True, False]
    assert all(result.retry_after_seconds for result in results[1:])
    assert freed == [requests[2].request], "only the queued request's bytes are free"
    return freed


@pytest.mark.parametrize(
    ("breaks", "reason"), [(fails, "rank 1 failed: RuntimeError: no more memory"), (dies, "rank 1 is gone")]
)
async def test_a_broken_rank_loses_its_group_and_bytes_are_held_until_the_others_are_gone(
    pool: Pool, gate: Gate, breaks: object, reason: str
) -> None:
    def first_good_then_breaks(rank: FakeRank, step: Step) -> StepResult | None:
        if step.layer == 3:
            return gate(rank, step)
        return breaks(rank, step)  # type: ignore[operator,no-any-return]

    def first_good_then_hangs(rank: FakeRank, step: Step) -> StepResult | None:
        return gate(rank, step) if step.layer == 3 else None  # blocked in a collective

    pool.limits = replace(pool.limits, max_steps_in_flight=1)  # so that one request is still queued
    front = await pool.start(first_good_then_hangs, first_good_then_breaks, first_good_then_hangs)
    freed = await lose_with_two_in_the_step_and_one_queued(pool, front, gate)
    status = front.link.status
    assert (status.ready, status.lost, status.reason) == (False, True, reason)
    assert [info.state for info in status.ranks] == ["ready", "lost", "ready"]
    refused = await front.forward(front.request())
    assert (refused.code, refused.message, refused.held) == (ErrorCode.RANK_LOST, reason, False)

    pool.ranks[1].kill()
    pool.ranks[0].kill()
    await asyncio.sleep(0.05)
    assert len(freed) == 1, "rank 2 may still write"
    pool.ranks[2].kill()
    await front.until(lambda: len(freed) == 3)
    assert front.link.status.reason == reason


async def test_when_the_only_rank_dies_nothing_is_held(pool: Pool) -> None:
    front = await pool.start(dies)
    request = front.request()
    result = await front.forward(request)
    assert (result.code, result.held) == (ErrorCode.RANK_LOST, False)
    front.free_when_done(request)
    assert front.slab.taken_bytes == 0


async def test_a_rank_that_dies_between_steps_is_noticed(pool: Pool) -> None:
    front = await pool.start(None, None)
    pool.ranks[0].kill()
    await front.until(lambda: front.link.status.lost)
    assert front.link.status.reason == "rank 0 is gone"
    pool.ranks[1].kill()
    await asyncio.to_thread(pool.ranks[1].hung_up.wait)
    await asyncio.sleep(0.02)
    assert [info.state for info in front.link.status.ranks] == ["lost", "ready"], "the first loss is the reason"


async def test_a_rank_that_dies_before_all_are_ready_is_noticed(pool: Pool) -> None:
    pool.start_engine()
    front = await pool.add_front()
    await pool.announce(front, Announce(1, 2, 0))
    rank = pool.add_rank(0, 2)
    await front.until(lambda: front.link.status.reason == "waiting for 1 of 2 ranks")
    rank.kill()
    await front.until(lambda: front.link.status.lost)
    late = pool.add_rank(1, 2)
    assert await asyncio.to_thread(late.hung_up.wait, 10.0), "a rank of a lost group is sent away"


async def test_a_hung_rank_is_given_up_and_its_late_result_changes_nothing(pool: Pool) -> None:
    pool.step_timeout_seconds = 0.1
    front = await pool.start(None, hangs, hangs)
    old = list(pool.ranks)
    request = front.request()
    result = await front.forward(request)
    assert (result.code, result.held) == (ErrorCode.RANK_LOST, True)
    assert result.message == "step 0 took longer than 0.1 s; no word from ranks [1, 2]"
    assert [info.state for info in front.link.status.ranks] == ["ready", "lost", "lost"]

    released: list[int] = []
    front.link.release_when_done(request.request, lambda: released.append(1))
    await pool.add_group(front, 2, hangs, None)
    pool.step_timeout_seconds = 60.0
    running = front.send(front.request())
    await front.until(lambda: len(pool.ranks[3].steps) == 1)
    (old_step,) = old[1].steps
    (new_step,) = pool.ranks[3].steps
    assert (old_step.generation, new_step.generation) == (1, 2)
    for rank in old[1:]:
        rank.say(rank.result(old_step))
        rank.say(rank.result(Step(new_step.step, 1, new_step.layer, ())))  # the number fits, the generation does not
    await asyncio.sleep(0.03)
    assert not running.done()
    assert released == [], "ranks of the lost group may still write"
    assert [len(rank.steps) for rank in old] == [1, 1, 1], "a step went to a rank of a lost group"
    for rank in old:
        rank.kill()
    await front.until(lambda: released == [1])
    assert front.link.status.generation == 2
    pool.ranks[3].say(pool.ranks[3].work(new_step))
    assert (await running).code is None


async def test_a_rank_that_gives_no_sign_of_life_is_lost_long_before_its_step_is_late(pool: Pool, gate: Gate) -> None:
    pool.silence_seconds = 1.0
    front = await pool.start(gate, gate)
    running = front.send(front.request())
    beaten_seconds = 0.0
    while beaten_seconds < 1.4:  # both are busy in a step for longer than a silence may be
        for rank in pool.ranks:
            rank.beat()
        await asyncio.sleep(0.1)
        beaten_seconds += 0.1
    assert front.link.status.ready
    while not running.done():
        pool.ranks[1].beat()
        await asyncio.sleep(0.05)
    result = await running
    assert (result.code, result.held) == (ErrorCode.RANK_LOST, True)
    assert result.message == "no sign of life from rank 0 for 1 s"
    assert [info.state for info in front.link.status.ranks] == ["lost", "ready"]


async def test_an_engine_that_gives_no_sign_of_life_is_taken_for_gone(pool: Pool, gate: Gate) -> None:
    pool.silence_seconds = None  # so this one gives none
    pool.start_engine()
    front = await pool.add_front(silence_seconds=2.0)
    await pool.add_group(front, 1, gate)
    result = await front.forward(front.request())
    assert (result.code, result.held) == (ErrorCode.RANK_LOST, True)
    gone = [status for status in front.statuses if status.lost]
    assert [status.generation for status in gone] == [0], "as when its process has died"
    gate.open()


async def test_an_engine_at_rest_gives_signs_of_life(pool: Pool) -> None:
    pool.silence_seconds = 1.0
    pool.start_engine()
    front = await pool.add_front(silence_seconds=1.0)
    await asyncio.sleep(2.5)
    assert not any(status.lost for status in front.statuses)


async def test_a_new_generation_serves_again(pool: Pool) -> None:
    front = await pool.start(dies, hangs)
    assert (await front.forward(front.request())).code == ErrorCode.RANK_LOST
    pool.ranks[1].kill()
    await pool.add_group(front, 2, None, None, None)
    assert (front.link.status.restarts, front.link.status.lost) == (1, False)
    request = front.request(tokens=7)
    assert (await front.forward(request)).code is None
    assert front.is_doubled(request)


async def test_a_new_generation_answers_what_runs_when_the_loss_was_not_seen_yet(pool: Pool, gate: Gate) -> None:
    """Ray can tell the supervisor of a dead rank before its socket tells the engine."""
    front = await pool.start(gate, gate)
    running = front.send(front.request(layer=3))
    await front.until(lambda: gate.entered == 2)
    queued = front.send(front.request(layer=4))
    await front.until(lambda: front.link.inflight == 2)
    front.link.announce(Announce(2, 1, 1))
    results = await asyncio.gather(running, queued)
    assert [(result.code, result.held) for result in results] == [
        (ErrorCode.RANK_LOST, True),
        (ErrorCode.RANK_LOST, False),
    ]
    pool.add_rank(0, 1, generation=2)
    await front.until_ready(2)
    assert (await front.forward(front.request())).code is None
    gate.open()
    for rank in pool.ranks[:2]:
        rank.kill()
    assert (await front.forward(front.request())).code is None
    assert front.link.status.ready


@pytest.mark.parametrize(("rank", "generation"), [(0, 2), (2, 1), (0, 0)])
async def test_a_rank_nobody_expects_is_sent_away(pool: Pool, rank: int, generation: int) -> None:
    front = await pool.start(None, None)
    stranger = pool.add_rank(rank, 2, generation)
    assert await asyncio.to_thread(stranger.hung_up.wait, 10.0)
    assert front.link.status.ready
    assert (await front.forward(front.request())).code is None


async def test_giving_up_keeps_its_reason_when_the_ranks_are_gone(pool: Pool) -> None:
    front = await pool.start(None, hangs)
    running = front.send(front.request())
    await front.until(lambda: len(pool.ranks[1].steps) == 1)
    front.link.announce(Announce(1, 2, 3, failed="gave up after 3 restarts: rank 1 is gone"))
    assert (await running).code == ErrorCode.RANK_LOST
    for rank in pool.ranks:
        rank.kill()
    await asyncio.sleep(0.05)
    assert front.link.status.reason == "failed: gave up after 3 restarts: rank 1 is gone"
    assert not front.link.status.ready
    assert (await front.forward(front.request())).code == ErrorCode.RANK_LOST


async def test_an_announcement_said_twice_does_not_forget_the_ranks(pool: Pool) -> None:
    front = await pool.start(None, None)
    front.link.announce(Announce(1, 2, 0))
    request = front.request()
    assert (await front.forward(request)).code is None
    assert front.is_doubled(request)


async def test_an_engine_that_goes_away_and_comes_back_is_found_again(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate, gate)
    request = front.request()
    task = front.send(request)
    await front.until(lambda: gate.entered == 2)
    front.free_when_done(request)
    await pool.stop_engine()
    result = await task
    assert (result.code, result.held) == (ErrorCode.RANK_LOST, True)
    assert front.link.status.lost
    assert front.slab.taken_bytes > 0, "its ranks may still write"
    gate.open()
    for rank in pool.ranks:  # ranks end when their engine hangs up
        assert await asyncio.to_thread(rank.hung_up.wait, 10.0)
    assert front.slab.taken_bytes > 0
    pool.start_engine()
    await front.until(lambda: front.slab.taken_bytes == 0)
    await front.until(lambda: front.link.status.reason == "waiting for 2 of 2 ranks")  # the announcement was repeated
    for number in range(2):
        pool.add_rank(number, 2)
    await front.until_ready(1)
    again = front.request()
    assert (await front.forward(again)).code is None
    assert front.is_doubled(again)


async def test_closing_the_link_answers_what_waits_and_releases_everything(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    request = front.request()
    task = front.send(request)
    await front.until(lambda: gate.entered == 1)
    front.free_when_done(request)
    await front.link.close()
    assert (await task).code == ErrorCode.RANK_LOST
    assert front.slab.taken_bytes == 0
    assert front.link.inflight == 0
