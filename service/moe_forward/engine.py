"""The engine: one queue, a few steps on their way to all ranks; it touches no tensor bytes and knows nothing of HTTP.

Front ends and ranks connect to its socket. It answers every request it was sent exactly once. Everything runs on one
asyncio loop; `_pump` is called after each datagram and timer and is the only place that sends a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from dataclasses import replace

from moe_forward import group_status
from moe_forward.answers import answers_of, report_of
from moe_forward.batcher import IN_TIME_PART, Batcher, BatchLimits, Queued
from moe_forward.channel import AsyncChannel, same_user
from moe_forward.datagrams import ENGINE_DECODERS
from moe_forward.errors import ErrorCode
from moe_forward.heartbeat import SilenceWatch, keep_beating
from moe_forward.messages import (
    Alive,
    Announce,
    Cancel,
    FrontHello,
    Heartbeat,
    Message,
    RankHello,
    RankWord,
    StepOrder,
    Ticket,
)
from moe_forward.packed_messages import of_front
from moe_forward.peers import Fronts, Ranks
from moe_forward.queue_watch import QueueWatch
from moe_forward.steps import Sent, StepsInFlight
from moe_forward.timers import Alarm, Watchdog
from moe_forward.types import EngineStatus, ForwardResult, QueueReport

log = logging.getLogger(__name__)

MAX_RETRY_AFTER_SECONDS = 30.0
LOST_RETRY_AFTER_SECONDS = 2.0


class Engine:
    """Queues requests, forms steps, sends them to the ranks of the current group and answers the front ends.

    limits: of the queue, of a step and of steps in flight. step_timeout_seconds: a step that takes longer, from when it
        could begin, loses the group. silence_seconds: so does a rank that says nothing for so long, and so long the
        engine itself is never silent; None: nobody listens for signs of life.
    """

    def __init__(self, limits: BatchLimits, step_timeout_seconds: float, silence_seconds: float | None = None) -> None:
        self._batcher = Batcher(limits)
        self._steps = StepsInFlight(limits, self._batcher.pace)
        self._alarm = Alarm(self._pump)
        self._watchdog = Watchdog(lambda: self._steps.began_seconds, step_timeout_seconds, self._stalled)
        self._step_timeout_seconds = step_timeout_seconds
        self._silence = SilenceWatch(silence_seconds, self._silent)
        self._channels: set[AsyncChannel] = set()
        self._ranks = Ranks()
        self._fronts = Fronts(self._ranks)
        self._queue_watch = QueueWatch(self._waiting, self._fronts.report)
        self._status = EngineStatus(reason="no rank group was announced yet")
        self._next_group: Announce | None = None  # waits for the steps that run
        self._held: dict[int, list[Ticket]] = {}
        self._next_step = 0
        self._unsettled = False  # something came that may let a step go

    async def serve(self, listener: socket.socket) -> None:
        """Accept front ends and ranks until cancelled, then hang up on all of them."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        beating = None
        if self._silence.silence_seconds is not None:
            beating = loop.create_task(keep_beating(lambda: self._fronts.tell(Alive()), self._silence.silence_seconds))
        try:
            while True:
                sock, _ = await loop.sock_accept(listener)
                if same_user(sock):
                    channel = AsyncChannel(sock, self._on_message, self._on_close, self._settle, ENGINE_DECODERS)
                    self._channels.add(channel)
                else:
                    log.warning("refused a connection from another user")
                    sock.close()
        finally:
            if beating is not None:
                beating.cancel()
            self._hang_up()

    def _hang_up(self) -> None:
        self._alarm.stop()
        self._watchdog.stop()
        self._silence.stop()
        self._queue_watch.close()
        for channel in self._channels:
            channel.close()
        self._fronts.close()

    # Events

    def _on_message(self, channel: AsyncChannel, message: Message, fds: list[int]) -> None:
        if isinstance(message, Ticket) and (front := self._fronts.number(channel)) is not None:
            self._submit(message if message.front == front else of_front(message, front))
            self._unsettled = True
        elif isinstance(message, (RankWord, Heartbeat)) and channel in self._ranks:
            self._hear(message)  # only the end of a step changes anything
        else:
            self._on_rare_message(channel, message, fds)
            self._unsettled = True
        for fd in fds:
            os.close(fd)

    def _on_rare_message(self, channel: AsyncChannel, message: Message, fds: list[int]) -> None:
        front = self._fronts.number(channel)
        if isinstance(message, Cancel) and front is not None:
            self._cancel(front, message.request)
        elif isinstance(message, FrontHello) and len(fds) == 1:
            self._add_front(channel, message, fds)
        elif isinstance(message, RankHello):
            self._add_rank(channel, message)
        elif isinstance(message, Announce) and front is not None:
            self._expect(message)
        else:
            log.warning("unexpected %s: hanging up", type(message).__name__)
            self._hang_up_on(channel)

    def _settle(self) -> bool:
        """Look for a step once after all that came together: requests of one datagram go together.

        Returns: whether requests wait, so that those of a next datagram would go with them if they are read before the
            ranks say that they are free.
        """
        if not self._unsettled:
            return False
        self._unsettled = False
        self._pump()
        return bool(self._batcher.requests)

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
        if not group_status.expects(self._status, hello):
            log.warning("rank %d of generation %d is not expected now: hanging up", rank, hello.generation)
            channel.close()
            self._channels.discard(channel)
            return
        self._ranks.add(channel, hello.generation, rank)
        self._fronts.show_slabs(channel)
        self._tell(group_status.joined(self._status, hello, time.time()))
        if self._status.ready:
            self._silence.watch(range(len(self._status.ranks)))

    def _expect(self, announce: Announce) -> None:
        if announce.failed:
            self._lose(f"failed: {announce.failed}", [])
            return
        if announce.generation == self._status.generation:
            return  # said again after a reconnection; this group's ranks may have come already
        if announce.after_steps and self._steps.oldest is not None:
            self._next_group = announce
            self._tell(replace(self._status, ready=False, reason="a larger rank group is about to be started"))
            return
        # Ray can tell the supervisor of a dead rank before its socket tells us.
        self._give_up("a new rank group is being started")
        self._tell(group_status.announced(announce, time.time()))

    # Requests

    def _submit(self, request: Ticket) -> None:
        now = time.monotonic()
        if not self._status.ready:
            code = ErrorCode.RANK_LOST if self._status.lost else ErrorCode.NOT_READY
            self._refuse(request, code, self._status.reason, LOST_RETRY_AFTER_SECONDS)
        elif (seconds := self._batcher.late_seconds(request, now, self._steps.ahead())) is not None:
            left_seconds = request.deadline_seconds - now
            reason = (
                f"an answer would take up to {seconds / IN_TIME_PART:.3g} s, more than the {left_seconds:.3g} s left"
            )
            self._refuse_full(request, reason, seconds)
        elif not self._batcher.add(request, now):
            self._settle()  # what came with it and can go makes room
            if not self._batcher.add(request, now):
                self._refuse_full(request, "the queue is full", self._batcher.drain_seconds(request.client))

    def _cancel(self, front: int, request: int) -> None:
        queued = self._batcher.cancel(front, request)
        if queued is not None:
            self._refuse(queued.request, ErrorCode.CANCELLED, "the client went away")

    def _refuse(
        self,
        request: Ticket,
        code: ErrorCode,
        message: str,
        retry_after_seconds: float | None = None,
        held: bool = False,
    ) -> None:
        result = ForwardResult(request.front, request.request, code, message, retry_after_seconds, held=held)
        self._fronts.answer(result)

    def _refuse_full(self, request: Ticket, reason: str, drain_seconds: float | None) -> None:
        waiting = f"{self._batcher.requests} requests with {self._batcher.tokens} tokens are waiting"
        retry_after_seconds = LOST_RETRY_AFTER_SECONDS
        if drain_seconds is not None:
            retry_after_seconds = min(MAX_RETRY_AFTER_SECONDS, max(1.0, drain_seconds))
        self._refuse(request, ErrorCode.QUEUE_FULL, f"{reason}: {waiting}", retry_after_seconds)

    # Steps

    def _pump(self) -> None:
        now = time.monotonic()
        batcher, steps = self._batcher, self._steps
        for queued in batcher.expire(now):
            waited = now - queued.arrived_seconds
            self._refuse(
                queued.request, ErrorCode.DEADLINE_EXCEEDED, f"the deadline passed after {waited:.3f} s in the queue"
            )
        if self._next_group is not None and steps.oldest is None:
            announce, self._next_group = self._next_group, None
            self._expect(announce)
        wake = math.inf
        while batcher.requests:
            ahead, room = steps.ahead(), self._status.ready and steps.have_room
            step = batcher.next_step(now, ahead) if room else []
            if not step:
                wake = batcher.wake_seconds(now, ahead, room)
                break
            self._send(step, now)
        if wake != self._alarm.at:  # while ranks work, it mostly is the same for all who come
            self._alarm.set(wake, now)
        self._queue_watch.changed(batcher.requests, batcher.tokens)

    def _waiting(self) -> QueueReport:
        return QueueReport(self._batcher.requests, self._batcher.tokens)

    def _send(self, queued: list[Queued], now: float) -> None:
        tickets = tuple([item.request for item in queued])
        step = StepOrder(self._next_step, self._status.generation, tickets[0].layer, tickets)
        self._next_step += 1
        self._steps.add(step, queued, now)
        self._watchdog.watch()
        self._ranks.send(step, generation=step.generation)

    def _stalled(self) -> None:
        sent = self._steps.oldest
        assert sent is not None, "nothing else is timed"
        late = sorted(set(range(len(self._status.ranks))) - set(sent.results))
        self._lose(
            f"step {sent.step.step} took longer than {self._step_timeout_seconds:g} s; no word from ranks {late}", late
        )
        self._pump()

    def _hear(self, word: RankWord | Heartbeat) -> None:
        """Take note of a rank's sign of life, and of what it says of a step."""
        if word.generation == self._status.generation:
            self._silence.heard(word.rank)
        if isinstance(word, RankWord) and (sent := self._steps.find(word)) is not None:
            self._collect(sent, word)

    def _collect(self, sent: Sent, word: RankWord) -> None:
        if word.error:
            self._lose(f"rank {word.rank} failed: {word.error}", [word.rank])
            self._pump()
            return
        sent.results[word.rank] = word
        ranks = len(self._status.ranks)
        if len(sent.results) < ranks:
            return
        now = time.monotonic()
        while (finished := self._steps.pop_finished(ranks, now)) is not None:
            self._finish(finished, now)

    def _finish(self, sent: Sent, now: float) -> None:
        self._batcher.finished(sent.step.layer, sent.tokens, sent.sent_seconds, now - sent.began_seconds, now)
        answers = answers_of(sent, now, self._status.missing_experts)
        some_wait = bool(self._batcher.requests)
        if some_wait:
            self._pump()  # ranks shall not wait until hundreds of requests are answered
        waiting = self._waiting()
        self._fronts.finish(answers, report_of(sent, waiting))
        self._queue_watch.told(waiting)
        if self._next_group is not None and not some_wait:
            self._pump()  # this may have been the last step of this group

    # Loss of ranks

    def _rank_gone(self, generation: int, rank: int) -> None:
        if generation == self._status.generation and not self._status.lost:
            self._lose(f"rank {rank} is gone", [rank])
        if not self._ranks.alive(generation):
            for request in self._held.pop(generation, []):
                self._fronts.release(request)

    def _silent(self, ranks: list[int]) -> None:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
        self._lose(f"no sign of life from {who} for {self._silence.silence_seconds:g} s", ranks)
        self._pump()

    def _lose(self, reason: str, ranks: list[int]) -> None:
        """Give the whole group up: its collectives cannot finish without the lost rank."""
        log.error("lost rank group %d: %s", self._status.generation, reason)
        self._give_up(reason)
        self._tell(group_status.lost(self._status, reason, ranks, time.time()))

    def _give_up(self, reason: str) -> None:
        """Answer everything that runs or waits as lost; what the current group may still touch is held."""
        generation = self._status.generation
        self._silence.stop()
        alive = self._ranks.alive(generation)
        for sent in self._steps.pop_all():
            for request in sent.step.tickets:
                self._refuse(request, ErrorCode.RANK_LOST, reason, LOST_RETRY_AFTER_SECONDS, held=alive)
            if alive:
                self._held.setdefault(generation, []).extend(sent.step.tickets)
        for queued in self._batcher.drop_all():
            self._refuse(queued.request, ErrorCode.RANK_LOST, reason, LOST_RETRY_AFTER_SECONDS)

    def _tell(self, status: EngineStatus) -> None:
        self._status = status
        self._fronts.tell(status)


async def run_engine(
    listener: socket.socket,
    limits: BatchLimits,
    step_timeout_seconds: float,
    silence_seconds: float | None = None,
) -> None:
    """Serve `listener` until the task is cancelled. See `Engine`."""
    with contextlib.closing(listener):
        await Engine(limits, step_timeout_seconds, silence_seconds).serve(listener)
