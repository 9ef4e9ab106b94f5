"""Random traffic over a changing pool: every request is answered exactly once, right, and every byte comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import uvloop

from moe_forward.batcher import BatchLimits
from moe_forward.errors import ErrorCode
from moe_forward.messages import StepAnswers, StepSummary
from moe_forward.peers import Fronts
from moe_forward.types import ForwardResult, Step, StepResult

if TYPE_CHECKING:
    from tests.service.conftest import FakeRank, Front, Pool

CLIENTS = 12  # of each of two front ends
REQUESTS_OF_A_CLIENT = 90
GENERATIONS = 8
STEPS_OF_A_GENERATION = 60


class Traffic:
    """Clients of one front end, and what became of their requests."""

    def __init__(self, front: Front, seed: int) -> None:
        self.front = front
        self.sent = 0
        self.ends: Counter[str] = Counter()
        self.wrong: list[int] = []
        self._seed = seed

    async def run(self) -> None:
        await asyncio.gather(*(self._client(random.Random(self._seed * 1000 + number)) for number in range(CLIENTS)))

    async def _client(self, rng: random.Random) -> None:
        for _ in range(REQUESTS_OF_A_CLIENT):
            await self._one(rng)
            if rng.random() < 0.1:
                await asyncio.sleep(rng.random() * 0.004)

    async def _one(self, rng: random.Random) -> None:
        timeout = rng.choice([30.0, 30.0, 30.0, 0.002])
        request = self.front.request(rng.randint(1, 9), rng.randrange(3), timeout)
        self.sent += 1
        task = self.front.send(request)
        if rng.random() < 0.15:
            await asyncio.sleep(rng.random() * 0.003)
            task.cancel()
        try:
            result = await task
        except asyncio.CancelledError:
            self.ends["cancelled by the client"] += 1
        else:
            assert result.request == request.request
            self.ends["done" if result.code is None else ErrorCode(result.code).slug] += 1
            if result.code is None and not self.front.is_doubled(request):
                self.wrong.append(request.request)
            if result.code in (ErrorCode.NOT_READY, ErrorCode.RANK_LOST):
                await asyncio.sleep(0.005)
        self.front.free_when_done(request)


def breaks_after(steps: int) -> Callable[[FakeRank, Step], StepResult | None]:
    def on_step(rank: FakeRank, step: Step) -> StepResult | None:
        result = rank.work(step)
        if len(rank.steps) < steps:
            return result
        rank.kill()
        return None

    return on_step


async def keep_restarting(pool: Pool, front: Front) -> None:
    """Do the supervisor's work: a new group whenever one is lost; the last one lives."""
    group = pool.ranks[:]
    for generation in range(2, GENERATIONS + 1):
        await front.until(lambda: front.link.status.lost)
        for rank in group:
            rank.kill()
        last = generation == GENERATIONS
        group = await pool.add_group(front, generation, None, None if last else breaks_after(STEPS_OF_A_GENERATION))


async def all_free(front: Front) -> None:
    await front.until(lambda: front.slab.taken_bytes == 0)


async def storm(pool: Pool) -> None:
    pool.limits = BatchLimits(24, 5, 0.0002, 10, 60, max_steps_in_flight=3)
    front = await pool.start(None, breaks_after(STEPS_OF_A_GENERATION))
    fronts = [front, await pool.add_front()]
    traffic = [Traffic(item, seed) for seed, item in enumerate(fronts)]
    restarts = asyncio.create_task(keep_restarting(pool, front))
    await asyncio.gather(*(item.run() for item in traffic))
    restarts.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await restarts
    for rank in pool.ranks[:-2]:
        rank.kill()
    for item in traffic:
        await all_free(item.front)
        assert item.front.link.inflight == 0
        assert item.wrong == []
        assert sum(item.ends.values()) == item.sent == CLIENTS * REQUESTS_OF_A_CLIENT
    ends = sum((item.ends for item in traffic), Counter[str]())
    assert ends["done"] > sum(ends.values()) / 5, ends
    for how in ("cancelled by the client", "deadline_exceeded", "queue_full", "rank_lost"):
        assert ends[how] > 0, ends
    assert set(ends) <= {
        "done",
        "cancelled by the client",
        "deadline_exceeded",
        "queue_full",
        "rank_lost",
        "not_ready",
        "cancelled",
    }
    for step in (step for rank in pool.ranks for step in rank.steps):
        assert step.tokens <= 24
        assert len(step.requests) <= 5
        assert len({request.layer for request in step.requests}) == 1


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_every_request_is_answered_once_whatever_happens(
    make_pool: Callable[[], Pool], run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Counter[tuple[int, int]] = Counter()
    answer, finish = Fronts.answer, Fronts.finish

    def counted(fronts: Fronts, result: ForwardResult) -> None:
        answers[result.front, result.request] += 1
        answer(fronts, result)

    def all_counted(fronts: Fronts, told: dict[int, StepAnswers], report: StepSummary) -> None:
        answers.update((front, request) for front, mine in told.items() for request in mine.requests)
        finish(fronts, told, report)

    monkeypatch.setattr(Fronts, "answer", counted)
    monkeypatch.setattr(Fronts, "finish", all_counted)

    async def main() -> None:
        pool = make_pool()
        try:
            await storm(pool)
        finally:
            await pool.close()

    run(main())
    assert set(answers.values()) == {1}
    assert len(answers) > 1000
