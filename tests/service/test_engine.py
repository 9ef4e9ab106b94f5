"""Engine and link over real sockets: requests become steps, and each is answered once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import socket
import time
from typing import TYPE_CHECKING

import pytest

from moe_forward.batcher import BatchLimits
from moe_forward.channel import connect
from moe_forward.datagrams import pack
from moe_forward.errors import ErrorCode
from moe_forward.messages import Announce, Cancel, DetachSlab, FrontHello, Message, Released
from moe_forward.slab import Slab
from moe_forward.types import PHASES, Step, StepResult

if TYPE_CHECKING:
    from tests.service.conftest import FakeRank, Gate, Pool


async def test_a_request_is_computed_by_all_ranks_and_answered(pool: Pool) -> None:
    front = await pool.start(None, None)
    request = front.request(tokens=5)
    result = await front.forward(request)
    assert (result.request, result.code, result.held) == (request.request, None, False)
    assert (result.batch_tokens, result.batch_requests) == (5, 1)
    assert result.queue_seconds >= 0
    assert result.step_seconds > 0
    assert front.is_doubled(request)
    assert front.link.inflight == 0
    front.free_when_done(request)
    assert front.slab.taken_bytes == 0


async def test_a_finished_step_is_reported_with_the_words_of_all_ranks(pool: Pool) -> None:
    front = await pool.start(None, None, None)
    await front.forward(front.request(tokens=4, layer=9))
    await front.until(lambda: bool(front.reports))
    (report,) = front.reports
    assert (report.layer, report.tokens, report.requests, report.queue_requests, report.queue_tokens) == (9, 4, 1, 0, 0)
    assert [result.rank for result in report.results] == [0, 1, 2]
    assert all(len(result.phase_seconds) == len(PHASES) and result.routed_rows == 7 for result in report.results)


async def test_requests_of_a_layer_share_a_step_and_layers_do_not_mix(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    first = front.send(front.request())
    await front.until(lambda: gate.entered == 1)
    requests = [front.request(tokens=1 + index % 3, layer=3 + index % 2) for index in range(6)]
    tasks = [front.send(request) for request in requests]
    await front.until(lambda: front.link.inflight == 7)
    gate.open()
    results = await asyncio.gather(first, *tasks)
    assert all(result.code is None for result in results)
    assert all(front.is_doubled(request) for request in requests)
    steps = [[item.request for item in step.requests] for step in pool.ranks[0].steps[1:]]
    assert steps == [[request.request for request in requests[start::2]] for start in (0, 1)]
    assert [step.step for step in pool.ranks[0].steps] == [0, 1, 2]
    assert {(result.batch_requests, result.batch_tokens) for result in results[1:]} == {(3, 6)}


async def test_before_the_engine_is_there_requests_are_refused_at_once(pool: Pool) -> None:
    pool.start_engine()
    front = await pool.add_front()
    await pool.stop_engine()
    await front.until(lambda: front.link.status.lost)
    request = front.request()
    result = await front.forward(request)
    assert (result.code, result.message, result.held) == (ErrorCode.NOT_READY, "the engine is not connected", False)
    assert result.retry_after_seconds
    front.free_when_done(request)
    assert front.slab.taken_bytes == 0


async def test_until_every_rank_is_ready_requests_are_refused_with_the_reason(pool: Pool) -> None:
    pool.start_engine()
    front = await pool.add_front()
    result = await front.forward(front.request())
    assert (result.code, result.message) == (ErrorCode.NOT_READY, "no rank group was announced yet")
    await pool.announce(front, Announce(1, 2, 0))
    pool.add_rank(1, 2)
    await front.until(lambda: front.link.status.reason == "waiting for 1 of 2 ranks")
    assert [info.state for info in front.link.status.ranks] == ["starting", "ready"]
    result = await front.forward(front.request())
    assert (result.code, result.message) == (ErrorCode.NOT_READY, "waiting for 1 of 2 ranks")
    pool.add_rank(0, 2)
    await front.until_ready(1)
    status = front.link.status
    assert (status.reason, status.backend, status.kernel, status.lost) == ("", "fake exchange", "fake experts", False)
    assert (await front.forward(front.request())).code is None


async def test_a_full_queue_refuses_with_a_time_to_try_again(pool: Pool, gate: Gate) -> None:
    pool.limits = BatchLimits(64, 16, 0.0, max_queue_requests=3, max_queue_tokens=1000)
    front = await pool.start(gate)
    running = front.send(front.request())
    await front.until(lambda: gate.entered == 1)
    waiting = [front.send(front.request()) for _ in range(3)]
    await front.until(lambda: front.link.inflight == 4)
    request = front.request()
    refused = await front.forward(request)
    assert refused.code == ErrorCode.QUEUE_FULL
    assert refused.message == "the queue is full: 3 requests with 6 tokens are waiting"
    assert refused.retry_after_seconds is not None
    assert refused.retry_after_seconds > 0
    before = front.slab.taken_bytes
    front.free_when_done(request)
    assert front.slab.taken_bytes < before
    gate.open()
    assert [result.code for result in await asyncio.gather(running, *waiting)] == [None] * 4


async def test_who_would_not_be_answered_in_time_is_told_at_once_and_when_to_come_back(pool: Pool, gate: Gate) -> None:
    pool.limits = BatchLimits(64, 1, 0.0, 8, 1000, max_steps_in_flight=1)

    def slow(rank: FakeRank, step: Step) -> StepResult:
        time.sleep(0.1)
        return gate(rank, step)

    gate.open()
    front = await pool.start(slow)
    assert (await front.forward(front.request())).code is None
    gate.shut()
    waiting = [front.send(front.request(tokens=2)) for _ in range(3)]
    await front.until(lambda: gate.entered == 2 and front.link.inflight == 3)
    refused = await front.forward(front.request(timeout_seconds=0.3))
    assert refused.code == ErrorCode.QUEUE_FULL
    assert re.match(
        r"an answer would take up to 0\.\d+ s, more than the 0\.(3|2\d*) s left: 2 requests", refused.message
    )
    assert refused.retry_after_seconds == 1.0
    patient = front.send(front.request(timeout_seconds=20.0))
    await front.until(lambda: front.link.inflight == 4)
    gate.open()
    assert [result.code for result in await asyncio.gather(*waiting, patient)] == [None] * 4


async def test_a_deadline_passes_in_the_queue_while_a_step_runs(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    running = front.send(front.request())
    await front.until(lambda: gate.entered == 1)
    patient = front.send(front.request())
    result = await front.forward(front.request(timeout_seconds=0.05))
    assert result.code == ErrorCode.DEADLINE_EXCEEDED
    assert "the deadline passed after 0." in result.message
    assert not running.done()
    gate.open()
    assert [item.code for item in await asyncio.gather(running, patient)] == [None, None]
    assert sum(len(step.requests) for step in pool.ranks[0].steps) == 2


async def test_a_step_waits_for_company_no_longer_than_allowed(pool: Pool) -> None:
    pool.limits = BatchLimits(64, 16, 0.05, 8, 1000)
    front = await pool.start(None)
    results = await asyncio.gather(*(front.forward(front.request(tokens=1)) for _ in range(3)))
    assert {(result.code, result.batch_requests) for result in results} == {(None, 3)}
    assert min(result.queue_seconds for result in results) >= 0.04


async def test_a_cancelled_request_in_the_queue_frees_its_bytes_and_never_runs(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    running = front.send(front.request())
    await front.until(lambda: gate.entered == 1)
    request = front.request()
    before = front.slab.taken_bytes
    task = front.send(request)
    await front.until(lambda: front.link.inflight == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    front.free_when_done(request)
    await front.until(lambda: front.slab.taken_bytes < before)
    assert not running.done()
    gate.open()
    await running
    assert len(pool.ranks[0].steps) == 1


async def test_a_cancelled_request_in_a_step_keeps_its_bytes_until_the_step_ends(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    request = front.request()
    task = front.send(request)
    await front.until(lambda: gate.entered == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    released_doubled: list[bool] = []
    front.link.release_when_done(request.request, lambda: released_doubled.append(front.is_doubled(request)))
    refused = await front.forward(front.request(timeout_seconds=-1.0))  # a round trip after the Cancel
    assert refused.code == ErrorCode.DEADLINE_EXCEEDED
    assert released_doubled == []
    gate.open()
    await front.until(lambda: bool(released_doubled))
    assert released_doubled == [True]
    assert front.link.inflight == 0


async def test_callbacks_run_in_order_and_at_once_when_nothing_is_pending(pool: Pool, gate: Gate) -> None:
    front = await pool.start(gate)
    request = front.request()
    task = front.send(request)
    await front.until(lambda: gate.entered == 1)
    calls: list[int] = []
    for number in range(3):
        front.link.release_when_done(request.request, functools.partial(calls.append, number))
    assert calls == []
    gate.open()
    await task
    assert calls == [0, 1, 2]
    front.link.release_when_done(request.request, lambda: calls.append(3))
    assert calls == [0, 1, 2, 3]


async def test_only_the_request_with_nan_is_refused(pool: Pool, gate: Gate) -> None:
    def finds_nan(rank: FakeRank, step: Step) -> StepResult:
        gate(rank, step)
        flagged = (1,) if len(step.requests) == 3 else ()
        return rank.result(step, non_finite=flagged if rank.rank == 1 else ())

    front = await pool.start(finds_nan, finds_nan)
    first = front.send(front.request())
    await front.until(lambda: gate.entered == 2)
    tasks = [front.send(front.request()) for _ in range(3)]
    await front.until(lambda: front.link.inflight == 4)
    gate.open()
    results = await asyncio.gather(first, *tasks)
    assert [result.code for result in results] == [None, None, ErrorCode.NON_FINITE, None]
    assert "NaN or Inf" in results[2].message
    assert results[2].retry_after_seconds is None


async def test_two_front_ends_share_the_ranks_and_one_dies_with_requests_queued_and_running(
    pool: Pool, gate: Gate
) -> None:
    dying = await pool.start(gate, gate)
    staying = await pool.add_front()
    assert staying.link.front != dying.link.front
    await staying.until_ready(1)
    lost = [dying.send(dying.request())]
    await dying.until(lambda: gate.entered == 2)
    kept = [staying.send(staying.request(tokens=3)) for _ in range(2)]
    lost += [dying.send(dying.request()) for _ in range(2)]
    await dying.until(lambda: dying.link.inflight == 3)
    await dying.link.close()
    results = await asyncio.gather(*lost)
    assert [result.code for result in results] == [ErrorCode.RANK_LOST] * 3
    gate.open()
    assert [result.code for result in await asyncio.gather(*kept)] == [None, None]
    await staying.until(lambda: all(rank.detached == [dying.link.front] for rank in pool.ranks))
    assert [set(rank.slabs) for rank in pool.ranks] == [{staying.link.front}] * 2
    fronts = [item.front for step in pool.ranks[0].steps for item in step.requests]
    assert fronts == [dying.link.front, staying.link.front, staying.link.front]
    await staying.until(lambda: bool(staying.reports))  # it is the first front end now: the metrics go on
    assert dying.reports == []


async def test_only_one_front_end_gets_the_report_of_a_step(pool: Pool) -> None:
    first = await pool.start(None)
    second = await pool.add_front()
    await second.until_ready(1)
    for front in (first, second):
        assert (await front.forward(front.request())).code is None
    await first.until(lambda: len(first.reports) == 2)
    assert second.reports == []


async def test_a_front_end_cannot_speak_for_another(pool: Pool) -> None:
    front = await pool.start(None)
    other = await pool.add_front()
    request = front.request()
    forged = request._replace(front=other.link.front)
    assert (await front.forward(forged)).code is None
    assert front.is_doubled(request)


@pytest.mark.parametrize("message", [Cancel(1), Released((1,)), DetachSlab(0), Announce(9, 1, 0)])
async def test_a_stranger_that_says_the_wrong_thing_is_hung_up_on(pool: Pool, message: Message) -> None:
    front = await pool.start(None)
    with connect(pool.path) as sock:
        sock.send(pack(message))
        assert await asyncio.to_thread(sock.recv, 1024) == b""
    assert front.link.status.generation == 1
    assert (await front.forward(front.request())).code is None


async def test_a_front_end_that_announces_more_memory_than_it_has_is_hung_up_on_and_harms_no_rank(pool: Pool) -> None:
    front = await pool.start(None)
    small = Slab(1 << 16)
    inode = os.fstat(small.fd).st_ino
    before = open_files(inode)
    with connect(pool.path) as sock:
        socket.send_fds(sock, [pack(FrontHello(small.nbytes + 1))], [small.fd])
        assert await asyncio.to_thread(sock.recv, 1024) == b""
    await front.until(lambda: open_files(inode) == before)
    small.close()
    assert (await front.forward(front.request())).code is None
    assert list(pool.ranks[0].slabs) == [0]


async def test_the_engine_lets_go_of_a_gone_front_ends_memory(pool: Pool) -> None:
    front = await pool.start(None)
    passing = await pool.add_front()
    inode = os.fstat(passing.slab.fd).st_ino
    await front.until(lambda: len(pool.ranks[0].slabs) == 2)
    held = open_files(inode)
    assert held >= 3, "the front end's, the engine's and the rank's"
    await passing.link.close()
    await front.until(lambda: len(pool.ranks[0].slabs) == 1)
    await front.until(lambda: open_files(inode) == held - 2)


def open_files(inode: int) -> int:
    count = 0
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            count += os.fstat(fd).st_ino == inode
    return count
