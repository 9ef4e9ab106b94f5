"""The engine with a rank group that lacks experts, and the way from such a group to a larger one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_forward.errors import ErrorCode
from moe_forward.messages import Announce
from moe_forward.types import Step, StepResult

if TYPE_CHECKING:
    from tests.service.conftest import FakeRank, Gate, Pool


def lacks(rank: FakeRank, step: Step) -> StepResult:
    """Lose a route more on rank 1 for each request; of a single request, none on rank 0."""
    counts = tuple(index * 10 + rank.rank for index in range(len(step.requests)))
    return rank.work(step)._replace(missing_routes=counts if any(counts) else ())


async def test_what_ranks_lost_is_added_up_for_each_request(pool: Pool, gate: Gate) -> None:
    def waits_then_lacks(rank: FakeRank, step: Step) -> StepResult:
        return gate(rank, step) if step.layer == 3 else lacks(rank, step)

    pool.limits = replace(pool.limits, max_steps_in_flight=1)
    pool.start_engine()
    front = await pool.add_front()
    await pool.announce(front, Announce(1, 2, 0, lacking_ranks=1, missing=(4, 5, 6)))
    for rank in range(2):
        pool.add_rank(rank, 2, 1, waits_then_lacks)
    await front.until_ready(1)
    assert (front.link.status.missing, front.link.status.missing_experts) == ((4, 5, 6), 3)
    assert front.link.status.lacking_ranks == 1
    alone = await front.forward(front.request(layer=4))
    assert (alone.code, alone.missing_routes, alone.missing_experts) == (None, 1, 3)
    first = front.send(front.request(layer=3))
    await front.until(lambda: gate.entered == 2)
    tasks = [front.send(front.request(layer=4)) for _ in range(3)]
    await front.until(lambda: front.link.inflight == 4)
    gate.open()
    assert (await first).missing_routes == 0
    together = await asyncio.gather(*tasks)
    assert {result.batch_requests for result in together} == {3}
    assert [result.missing_routes for result in together] == [1, 21, 41]
    assert sum(sum(result.missing_routes) for result in front.reports[-1].results) == 63


async def test_a_complete_group_loses_nothing(pool: Pool) -> None:
    front = await pool.start(None, None)
    result = await front.forward(front.request())
    assert (result.missing_routes, result.missing_experts, front.link.status.missing) == (0, 0, ())


async def test_a_larger_group_waits_for_the_steps_that_run_and_no_more_are_begun(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate, gate)
    running = [front.request(layer=3)]
    tasks = [front.send(running[0])]
    await front.until(lambda: gate.entered == 2)
    front.link.announce(Announce(2, 3, 1, after_steps=True))
    await front.until(lambda: not front.link.status.ready)
    assert (front.link.status.generation, front.link.status.lost) == (1, False)
    refused = await front.forward(front.request(layer=4))
    assert (refused.code, refused.held) == (ErrorCode.NOT_READY, False)
    assert refused.retry_after_seconds
    steps = [len(rank.steps) for rank in pool.ranks]
    gate.open()
    results = await asyncio.gather(*tasks)
    assert [(result.code, result.generation) for result in results] == [(None, 1)]
    assert front.is_doubled(running[0])
    await front.until(lambda: front.link.status.generation == 2)
    assert [len(rank.steps) for rank in pool.ranks] == steps
    for rank in list(pool.ranks):
        rank.kill()
    for rank in range(3):
        pool.add_rank(rank, 3, 2)
    await front.until_ready(2)
    assert (await front.forward(front.request())).code is None


async def test_a_larger_group_is_expected_at_once_where_nothing_runs(pool: Pool) -> None:
    front = await pool.start(None, None)
    front.link.announce(Announce(2, 3, 1, after_steps=True))
    await front.until(lambda: front.link.status.generation == 2)
    assert front.link.status.reason == "waiting for 3 of 3 ranks"


async def test_a_group_that_is_lost_on_the_way_to_a_larger_one_answers_what_ran(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate, gate)
    running = front.send(front.request())
    await front.until(lambda: gate.entered == 2)
    front.link.announce(Announce(2, 3, 1, after_steps=True))
    await front.until(lambda: not front.link.status.ready)
    pool.ranks[0].kill()
    result = await running
    assert (result.code, result.held) == (ErrorCode.RANK_LOST, True)
    gate.open()
    await front.until(lambda: front.link.status.generation == 2)
