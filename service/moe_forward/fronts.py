"""Several front ends behind one port, each a process of its own: started, started again, told the news, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from dataclasses import replace

from moe_forward.acceptor import Acceptor
from moe_forward.api import Reports
from moe_forward.errors import StartError
from moe_forward.front_child import END_SECONDS, FrontChild, start_child
from moe_forward.front_samples import MergedSamples
from moe_forward.front_task import FrontTask
from moe_forward.link import EngineLink
from moe_forward.messages import (
    Alive,
    ConnectionGone,
    Drain,
    FrontFailed,
    FrontSamples,
    FrontUp,
    InFlight,
    Message,
    RankTokens,
    Stop,
)
from moe_forward.metrics import Metrics
from moe_forward.slab import Slab
from moe_forward.types import StepReport

log = logging.getLogger(__name__)

NO_SLAB_BYTES = 4096
"""Of this process' own slab, in which nothing ever lies: the engine knows peers with a slab only."""
PROGRAM = (sys.executable, "-m", "moe_forward.front_process")
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
CALM_SECONDS = 60.0
"""A front end that served for so long is started again at once when it ends."""
REST_SECONDS = 0.25


class Fronts:
    """Starts front ends, starts them again when they end, and shares connections and news among them.

    task: of each; its number and `draining` are filled in here, its `max_connections` is of all together.
    count: of front ends. listener: where HTTP connections come.
    metrics: told of steps and of the engine's state. merged: shows what front ends count beside them.
    program: the command that a descriptor is added to.
    link: this process' own, for the supervisor; the engine reports over it, and no request goes over it.
    """

    def __init__(
        self,
        task: FrontTask,
        count: int,
        listener: socket.socket,
        metrics: Metrics,
        merged: MergedSamples,
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        share = task.config.max_connections // count
        self._task = replace(task, config=task.config.model_copy(update={"max_connections": share}))
        self._count = count
        self._merged = merged
        self.link = EngineLink(task.socket_path, Slab(NO_SLAB_BYTES), silence_seconds=task.config.silence_seconds)
        self._reports = Reports(self.link, task.spec.name, metrics, self if task.config.trace_endpoint else None)
        self._program = program
        self._children: dict[int, FrontChild] = {}
        self._served: set[int] = set()  # numbers that were up once
        self._all_up = asyncio.Event()
        self._stopping = asyncio.Event()
        self._acceptor = Acceptor(listener, self._takers, share)

    async def serve(self) -> None:
        """Serve until `drain` or `end`.

        Raises: StartError with the reason when a front end ends before it has ever served.
        """
        self.link.start()
        tasks = [asyncio.create_task(self._keep(number)) for number in range(self._count)]
        news = asyncio.create_task(self._tell_news())
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, news):
                task.cancel()
            await asyncio.gather(*tasks, news, return_exceptions=True)
            self._acceptor.close()

    async def up(self) -> None:
        """Wait until every front end has served once."""
        await self._all_up.wait()

    def refuse_new(self) -> None:
        """Have all of them refuse what is new, also those that are started later."""
        self._task = replace(self._task, draining=True)
        for child in self._takers():
            child.inflight = None
        self._send_all(Drain())

    async def drain(self, timeout_seconds: float) -> None:
        """Have all of them answer what is in flight and end; those that take longer are left to `end`."""
        self._stopping.set()
        self._send_all(Stop())
        ended = [asyncio.ensure_future(child.ended.wait()) for child in self._children.values()]
        if ended:
            # once for what is in flight, once for replies that slow clients are still reading
            _, late = await asyncio.wait(ended, timeout=2 * timeout_seconds + END_SECONDS)
            for waiting in late:
                waiting.cancel()

    def end(self) -> None:
        """Kill what is left, and have `serve` return."""
        self._stopping.set()
        for child in self._children.values():
            child.process.kill()

    async def close(self) -> None:
        """Hang up on the engine, after `serve` has returned."""
        await self.link.close()

    def step_finished(self, report: StepReport) -> None:
        """Tell all of them of a step, for their traces."""
        self._send_all(report)

    def _takers(self) -> list[FrontChild]:
        return [child for child in self._children.values() if child.up]

    def _answer_askers(self) -> None:
        """Tell who asked what all the others are serving, when all have said it."""
        known = {child: child.inflight for child in self._children.values()}
        if None in known.values():
            return
        for child in known:
            if child.asks:
                child.asks = False
                child.channel.send(InFlight(sum(known[other] or 0 for other in known if other is not child)))

    def _send_all(self, message: Message) -> None:
        for child in self._children.values():
            child.channel.send(message)

    # Processes

    async def _keep(self, number: int) -> None:
        """Keep a front end running until the service stops."""
        loop = asyncio.get_running_loop()
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            started_seconds = loop.time()
            reason = await self._run(number)
            if self._stopping.is_set():
                return
            if number not in self._served:
                raise StartError(f"front end {number} did not start: {reason}")
            if loop.time() - started_seconds > CALM_SECONDS:
                pause_seconds = FIRST_PAUSE_SECONDS
            log.error("front end %d is gone: %s; it is started again in %g s", number, reason, pause_seconds)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_seconds)
                return
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    async def _run(self, number: int) -> str:
        """Run a front end; returns why it ended, once its process is gone."""
        try:
            child = start_child(self._program, replace(self._task, number=number), self._on_message)
        except OSError as error:
            return f"its process could not be started: {error.strerror}"
        self._children[number] = child
        try:
            await child.ended.wait()
            return await child.why_it_ended()
        finally:
            child.close()
            self._forget(child)

    def _forget(self, child: FrontChild) -> None:
        del self._children[child.number]
        self._merged.front_is_gone(child.number)
        self._answer_askers()
        self._acceptor.resume()

    def _on_message(self, child: FrontChild, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)  # front ends pass none
        if isinstance(message, Alive):
            child.silence.heard(child.number)
        elif isinstance(message, ConnectionGone):
            child.connections -= 1
            self._acceptor.resume()
        elif isinstance(message, FrontSamples):
            self._merged.update(child.number, message)
        elif isinstance(message, FrontUp):
            self._is_up(child)
        elif isinstance(message, FrontFailed):
            child.last_word = message.reason
        elif isinstance(message, Drain):
            log.info("an operator asked to drain: no front end takes more")
            child.asks = True
            self.refuse_new()
        elif isinstance(message, InFlight):
            child.inflight = message.requests
            self._answer_askers()
        else:
            log.warning("front end %d sent a %s, which nobody takes", child.number, type(message).__name__)

    def _is_up(self, child: FrontChild) -> None:
        child.serves()
        self._served.add(child.number)
        log.info("front end %d serves (process %d)", child.number, child.process.pid)
        if len(self._served) == self._count:
            self._all_up.set()
        self._acceptor.resume()

    async def _tell_news(self) -> None:
        """Tell front ends what each rank has computed, whenever it has changed, for ever."""
        told: dict[FrontChild, RankTokens] = {}
        while True:
            await asyncio.sleep(REST_SECONDS)
            now = RankTokens(tuple(sorted(self._reports.rank_tokens.items())))
            told = {child: word for child, word in told.items() if child in self._children.values()}
            for child in self._children.values():
                if told.get(child) != now:
                    child.channel.send(now)
                    told[child] = now
