"""The engine: one queue, one step at a time over all ranks; it touches no tensor bytes and knows nothing of HTTP.

Front ends and ranks connect to its socket. It answers every request it was sent exactly once. Everything runs on one
asyncio loop; `_pump` is called after each event and is the only place that starts a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass, replace

from moe_forward.batcher import Batcher, BatchLimits, Queued
from moe_forward.channel import AsyncChannel, same_user
from moe_forward.errors import ErrorCode
from moe_forward.messages import Announce, Cancel, FrontHello, Message, RankHello
from moe_forward.peers import Fronts, Ranks
from moe_forward.queue_watch import QueueWatch
from moe_forward.types import (
    EngineStatus,
    ForwardRequest,
    ForwardResult,
    QueueReport,
    RankInfo,
    Step,
    StepReport,
    StepResult,
)

log = logging.getLogger(__name__)

RATE_SMOOTHING = 0.1
MAX_RETRY_AFTER_SECONDS = 30.0
LOST_RETRY_AFTER_SECONDS = 2.0


@dataclass(slots=True)
class _Running:
    step: Step
    queued: list[Queued]
    started_seconds: float
    results: dict[int, StepResult]
    watchdog: asyncio.TimerHandle


class Engine:
    """Queues requests, forms steps, sends them to the ranks of the current group and answers the front ends.

    limits: of the queue and of a step. step_timeout_seconds: a step that takes longer loses the group.
    """

    def __init__(self, limits: BatchLimits, step_timeout_seconds: float) -> None:
        self._batcher = Batcher(limits)
        self._step_timeout_seconds = step_timeout_seconds
        self._channels: set[AsyncChannel] = set()
        self._ranks = Ranks()
        self._fronts = Fronts(self._ranks)
        self._queue_watch = QueueWatch(self._waiting, self._fronts.report)
        self._status = EngineStatus(reason="no rank group was announced yet")
        self._running: _Running | None = None
        self._held: dict[int, list[ForwardRequest]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next_step = 0
        self._tokens_per_second = 0.0

    async def serve(self, listener: socket.socket) -> None:
        """Accept front ends and ranks until cancelled, then hang up on all of them."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        try:
            while True:
                sock, _ = await loop.sock_accept(listener)
                if same_user(sock):
                    self._channels.add(AsyncChannel(sock, self._on_message, self._on_close))
                else:
                    log.warning("refused a connection from another user")
                    sock.close()
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        for timer in (self._timer, self._running.watchdog if self._running else None):
            if timer is not None:
                timer.cancel()
        self._queue_watch.close()
        for channel in self._channels:
            channel.close()
        self._fronts.close()

    # Events

    def _on_message(self, channel: AsyncChannel, message: Message, fds: list[int]) -> None:
        if isinstance(message, FrontHello) and len(fds) == 1:
            self._add_front(channel, message, fds)
        elif isinstance(message, RankHello):
            self._add_rank(channel, message)
        elif isinstance(message, ForwardRequest) and channel in self._fronts:
            self._submit(replace(message, front=self._fronts.number(channel)))
        elif isinstance(message, Cancel) and channel in self._fronts:
            self._cancel(self._fronts.number(channel), message.request)
        elif isinstance(message, Announce) and channel in self._fronts:
            self._expect(message)
        elif isinstance(message, StepResult) and channel in self._ranks:
            self._collect(message)
        else:
            log.warning("unexpected %s: hanging up", type(message).__name__)
            self._hang_up_on(channel)
        for fd in fds:
            os.close(fd)
        self._pump()

    def _on_close(self, channel: AsyncChannel) -> None:
        self._channels.discard(channel)
        front = self._fronts.remove(channel)
        if front is not None:
            self._batcher.drop_front(front)
        member = self._ranks.remove(channel)
        if member is not None:
            self._rank_gone(*member)
        self._pump()

    def _hang_up_on(self, channel: AsyncChannel) -> None:
        channel.close()
        self._on_close(channel)

    def _add_front(self, channel: AsyncChannel, hello: FrontHello, fds: list[int]) -> None:
        """Take a front end in, and its slab's descriptor out of `fds`."""
        found, announced = os.fstat(fds[0]).st_size, hello.slab_bytes
        if found < announced:  # a rank that touched what is missing would be killed
            log.warning("a front end announced a slab of %d bytes that has %d: hanging up", announced, found)
            self._hang_up_on(channel)
        else:
            self._fronts.add(channel, hello, fds.pop())
            channel.send(self._status)

    def _add_rank(self, channel: AsyncChannel, hello: RankHello) -> None:
        rank = hello.info.rank
        if hello.generation != self._status.generation or rank >= len(self._status.ranks) or self._status.lost:
            log.warning("rank %d of generation %d is not expected now: hanging up", rank, hello.generation)
            channel.close()
            self._channels.discard(channel)
            return
        self._ranks.add(channel, hello.generation, rank)
        self._fronts.show_slabs(channel)
        infos = _replaced(self._status.ranks, replace(hello.info, state="ready", since=time.time()))
        missing = sum(info.state != "ready" for info in infos)
        reason = f"waiting for {missing} of {len(infos)} ranks" if missing else ""
        self._tell(
            replace(
                self._status,
                ranks=infos,
                reason=reason,
                ready=not missing,
                backend=hello.backend,
                kernel=hello.kernel,
            )
        )

    def _expect(self, announce: Announce) -> None:
        if announce.failed:
            self._lose(f"failed: {announce.failed}", [])
            return
        if announce.generation == self._status.generation:
            return  # said again after a reconnection; this group's ranks may have come already
        # Ray can tell the supervisor of a dead rank before its socket tells us.
        self._give_up("a new rank group is being started")
        starting = tuple(RankInfo(rank, "starting", time.time()) for rank in range(announce.ranks))
        reason = f"waiting for {announce.ranks} of {announce.ranks} ranks"
        self._tell(
            EngineStatus(generation=announce.generation, ranks=starting, restarts=announce.restarts, reason=reason)
        )

    # Requests

    def _submit(self, request: ForwardRequest) -> None:
        now = time.monotonic()
        if not self._status.ready:
            code = ErrorCode.RANK_LOST if self._status.lost else ErrorCode.NOT_READY
            self._refuse(request, code, self._status.reason, LOST_RETRY_AFTER_SECONDS)
        elif not self._batcher.add(request, now):
            waiting = f"{self._batcher.requests} requests with {self._batcher.tokens} tokens are waiting"
            self._refuse(request, ErrorCode.QUEUE_FULL, f"the queue is full: {waiting}", self._drain_seconds())

    def _cancel(self, front: int, request: int) -> None:
        queued = self._batcher.cancel(front, request)
        if queued is not None:
            self._refuse(queued.request, ErrorCode.CANCELLED, "the client went away")

    def _refuse(
        self,
        request: ForwardRequest,
        code: ErrorCode,
        message: str,
        retry_after_seconds: float | None = None,
        held: bool = False,
    ) -> None:
        result = ForwardResult(request.front, request.request, code, message, retry_after_seconds, held=held)
        self._fronts.answer(result)

    def _drain_seconds(self) -> float:
        if self._tokens_per_second <= 0:
            return LOST_RETRY_AFTER_SECONDS
        return min(MAX_RETRY_AFTER_SECONDS, max(1.0, self._batcher.tokens / self._tokens_per_second))

    # Steps

    def _pump(self) -> None:
        now = time.monotonic()
        for queued in self._batcher.expire(now):
            waited = now - queued.arrived_seconds
            self._refuse(
                queued.request, ErrorCode.DEADLINE_EXCEEDED, f"the deadline passed after {waited:.3f} s in the queue"
            )
        if self._running is None and self._status.ready:
            queued_requests = self._batcher.next_step(now)
            if queued_requests:
                self._start(queued_requests, now)
        self._set_timer(now)
        self._queue_watch.changed()

    def _waiting(self) -> QueueReport:
        return QueueReport(self._batcher.requests, self._batcher.tokens)

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake = self._batcher.wake_seconds(idle=self._running is None and self._status.ready)
        if wake < float("inf"):
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wake - now), self._pump)

    def _start(self, queued: list[Queued], now: float) -> None:
        requests = tuple(item.request for item in queued)
        step = Step(self._next_step, self._status.generation, requests[0].layer, requests)
        self._next_step += 1
        loop = asyncio.get_running_loop()
        watchdog = loop.call_later(self._step_timeout_seconds, self._stalled, step.step)
        self._running = _Running(step, queued, now, {}, watchdog)
        self._ranks.send(step, generation=step.generation)

    def _stalled(self, step: int) -> None:
        if self._running is not None and self._running.step.step == step:
            late = sorted(set(range(len(self._status.ranks))) - set(self._running.results))
            self._lose(
                f"step {step} took longer than {self._step_timeout_seconds:g} s; no word from ranks {late}", late
            )
            self._pump()

    def _collect(self, result: StepResult) -> None:
        running = self._running
        if running is None or (result.step, result.generation) != (running.step.step, running.step.generation):
            return  # a late word of a step that was given up
        if result.error:
            self._lose(f"rank {result.rank} failed: {result.error}", [result.rank])
            return
        running.results[result.rank] = result
        if len(running.results) == len(self._status.ranks):
            self._finish(running)

    def _finish(self, running: _Running) -> None:
        now = time.monotonic()
        self._running = None
        running.watchdog.cancel()
        tokens, count = running.step.tokens, len(running.queued)
        seconds = now - running.started_seconds
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_second += (rate - self._tokens_per_second) * (RATE_SMOOTHING if self._tokens_per_second else 1)
        non_finite = {index for result in running.results.values() for index in result.non_finite}
        for index, item in enumerate(running.queued):
            waited = running.started_seconds - item.arrived_seconds
            result = ForwardResult(
                item.request.front,
                item.request.request,
                queue_seconds=waited,
                step_seconds=seconds,
                batch_tokens=tokens,
                batch_requests=count,
                step=running.step.step,
                generation=running.step.generation,
            )
            if index in non_finite:
                message = "hidden_states, hidden_scales or router_logits hold NaN or Inf"
                result = replace(result, code=ErrorCode.NON_FINITE, message=message)
            self._fronts.answer(result)
        results = tuple(running.results[rank] for rank in sorted(running.results))
        waiting = self._waiting()
        report = StepReport(running.step.layer, tokens, count, waiting.requests, waiting.tokens, results)
        self._fronts.report(report)
        self._queue_watch.told(waiting)

    # Loss of ranks

    def _rank_gone(self, generation: int, rank: int) -> None:
        if generation == self._status.generation and not self._status.lost:
            self._lose(f"rank {rank} is gone", [rank])
        if not self._ranks.alive(generation):
            for request in self._held.pop(generation, []):
                self._fronts.release(request)

    def _lose(self, reason: str, ranks: list[int]) -> None:
        """Give the whole group up: its collectives cannot finish without the lost rank."""
        log.error("lost rank group %d: %s", self._status.generation, reason)
        infos = self._status.ranks
        for rank in ranks:
            infos = _replaced(infos, replace(infos[rank], state="lost", since=time.time()))
        self._give_up(reason)
        self._tell(replace(self._status, ready=False, lost=True, ranks=infos, reason=reason))

    def _give_up(self, reason: str) -> None:
        """Answer everything that runs or waits as lost; what the current group may still touch is held."""
        generation = self._status.generation
        if self._running is not None:
            self._running.watchdog.cancel()
            alive = self._ranks.alive(generation)
            for request in self._running.step.requests:
                self._refuse(request, ErrorCode.RANK_LOST, reason, LOST_RETRY_AFTER_SECONDS, held=alive)
            if alive:
                self._held.setdefault(generation, []).extend(self._running.step.requests)
            self._running = None
        for queued in self._batcher.drop_all():
            self._refuse(queued.request, ErrorCode.RANK_LOST, reason, LOST_RETRY_AFTER_SECONDS)

    def _tell(self, status: EngineStatus) -> None:
        self._status = status
        self._fronts.tell(status)


def _replaced(infos: tuple[RankInfo, ...], info: RankInfo) -> tuple[RankInfo, ...]:
    return (*infos[: info.rank], info, *infos[info.rank + 1 :])


async def run_engine(listener: socket.socket, limits: BatchLimits, step_timeout_seconds: float) -> None:
    """Serve `listener` until the task is cancelled."""
    with contextlib.closing(listener):
        await Engine(limits, step_timeout_seconds).serve(listener)
