"""Faults injected into an engine with fake ranks: every request ends once, and the next group answers."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from moe_forward.datagrams import pack
from moe_forward.errors import ErrorCode
from moe_forward.messages import Announce
from moe_forward.types import Step, StepResult

from ..service.conftest import FakeRank, Front, Pool

STEP_TIMEOUT_SECONDS = 0.2
FLIPS = 40


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    with tempfile.TemporaryDirectory(prefix="moe-") as folder:
        made = Pool(Path(folder))
        made.step_timeout_seconds = STEP_TIMEOUT_SECONDS
        yield made
        await made.close()


def says(rank: FakeRank, data: bytes) -> None:
    """Send a datagram that no rank of ours would send; the engine may have hung up after an earlier one."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(rank._channel.fileno())) as same:
        same.send(data)


async def next_group(pool: Pool, front: Front, generation: int, *on_step: object) -> None:
    """Kill what is left of a group and start the next one, as the supervisor does."""
    for rank in pool.ranks:
        rank.kill()
    front.link.announce(Announce(generation, len(on_step), generation - 1))
    await pool.add_group(front, generation, *on_step)  # type: ignore[arg-type]


async def test_a_flipped_bit_in_a_ranks_word_never_leaves_a_request_without_an_end(pool: Pool) -> None:
    choose = random.Random(0)
    ended: dict[str, int] = {}

    def lies(rank: FakeRank, step: Step) -> StepResult | None:
        data = bytearray(pack(rank.work(step)))
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        says(rank, bytes(data))
        return None

    front = await pool.start(None, lies)
    generation = 1
    for _ in range(FLIPS):
        requests = [front.request(layer=3), front.request(layer=3), front.request(layer=4)]
        tasks = [front.send(request) for request in requests]
        for request, task in zip(requests, tasks, strict=True):
            result = await task
            name = "right" if result.code is None else ErrorCode(result.code).slug
            ended[name] = ended.get(name, 0) + 1
            assert result.code is not None or front.is_doubled(request)
            front.free_when_done(request)
        if not front.link.status.ready:
            generation += 1
            await next_group(pool, front, generation, None, lies)
    print(ended)
    assert sum(ended.values()) == 3 * FLIPS
    assert ended.keys() <= {"right", "rank_lost", "non_finite"}
    await next_group(pool, front, generation + 1, None, None)
    request = front.request()
    assert (await front.forward(request)).code is None
    assert front.is_doubled(request)
