"""The front end's end of the channel to the engine: a request goes out, its result comes back, its bytes stay here."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from moe_forward.answers import results_in
from moe_forward.channel import AsyncChannel, connect
from moe_forward.errors import ErrorCode
from moe_forward.heartbeat import SilenceWatch
from moe_forward.messages import Alive, Announce, Cancel, FrontHello, FrontWelcome, Message, Released, StepAnswers
from moe_forward.polling import Awake
from moe_forward.slab import Slab
from moe_forward.types import EngineStatus, ForwardRequest, ForwardResult, QueueReport, StepReport

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.05
LOST_RETRY_AFTER_SECONDS = 2.0
_ENGINE = 0
"""Its number in a watch that has nobody else."""


class EngineLink:
    """Sends requests of one front end to the engine and hands back their results.

    slab: this front end's memory, announced to the engine on every connection.
    wants_reports: False where another front end of the service is told of steps and of the queue.
    poll_seconds: how long the loop does not sleep after a request or a message (`moe_forward.polling`).
    silence_seconds: an engine that gives no sign of life for so long is taken for gone; None: who started it does that.
    status: the engine as it last described itself. on_status, on_report: called with each status and finished step.
    on_queue: called with what waits in the engine, after it has changed.
    """

    def __init__(
        self,
        socket_path: Path,
        slab: Slab,
        wants_reports: bool = True,
        poll_seconds: float = 0.0,
        silence_seconds: float | None = None,
    ) -> None:
        self.slab = slab
        self._silence = SilenceWatch(silence_seconds, self._silent)
        self._awake = Awake(poll_seconds)
        self._wants_reports = wants_reports
        self.front = 0
        self.status = EngineStatus()
        self.on_status: Callable[[EngineStatus], None] = lambda status: None
        self.on_report: Callable[[StepReport], None] = lambda report: None
        self.on_queue: Callable[[QueueReport], None] = lambda report: None
        self._path = socket_path
        self._channel: AsyncChannel | None = None
        self._announced: Announce | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[ForwardResult]] = {}
        self._held: set[int] = set()
        self._on_release: dict[int, list[Callable[[], None]]] = {}
        self._welcomed = False
        self._gone = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def inflight(self) -> int:
        """Requests sent and not yet answered."""
        return len(self._waiting)

    def start(self) -> None:
        """Connect, and connect again whenever the engine goes away, until `close`."""
        self._loop = asyncio.get_running_loop()
        self._keeper = self._loop.create_task(self._keep_connected())

    async def close(self) -> None:
        """Hang up; requests still waiting are answered as lost."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
            self._on_close(self._channel)
        self._release_all()

    def next_request(self) -> int:
        """Return a request number that this front end has not used before."""
        return next(self._numbers)

    def forward(self, request: ForwardRequest) -> asyncio.Future[ForwardResult]:
        """Send `request`; how it ends is the future's result: a refusal is one with a code, never an exception.

        Who waits may end the future otherwise and has to `cancel` the request then; its bytes must stay in place until
        `release_when_done` calls back.
        """
        future: asyncio.Future[ForwardResult] = (self._loop or asyncio.get_running_loop()).create_future()
        if self._channel is None or not self._welcomed:
            future.set_result(self._lost(request.request, held=False))
        else:
            self._waiting[request.request] = future
            self._channel.post(request)
            self._awake.touch()
        return future

    def cancel(self, request: int) -> None:
        """Have the engine drop `request` if it still waits there; nothing happens when it has ended."""
        if request in self._waiting and self._channel is not None:
            self._channel.send(Cancel(request))

    def release_when_done(self, request: int, callback: Callable[[], None]) -> None:
        """Call `callback` once no rank can touch the request's bytes; at once when that is already so."""
        if request in self._waiting or request in self._held:
            self._on_release.setdefault(request, []).append(callback)
        else:
            callback()

    def announce(self, announce: Announce) -> None:
        """Tell the engine, now and after each reconnection, which rank group to expect (the supervisor's call)."""
        self._announced = announce
        if self._channel is not None and self._welcomed:
            self._channel.send(announce)

    async def _keep_connected(self) -> None:
        while True:
            try:
                sock = connect(self._path)
            except OSError:  # not started yet, or being started again
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            self._gone.clear()
            self._channel = AsyncChannel(sock, self._on_message, self._on_close)
            self._channel.send(FrontHello(self.slab.nbytes, self._wants_reports), self.slab.fd)
            await self._gone.wait()
            await asyncio.sleep(RECONNECT_SECONDS)  # an engine that hangs up at once must not keep us busy

    def _on_message(self, channel: AsyncChannel, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)  # the engine passes none
        if isinstance(message, StepAnswers):
            for result in results_in(message, self.front):
                self._finish(result)
            self._awake.touch()
        elif isinstance(message, ForwardResult):
            self._finish(message)
            self._awake.touch()
        elif isinstance(message, StepReport):
            self.on_report(message)
        elif isinstance(message, Alive):
            self._silence.heard(_ENGINE)
        elif isinstance(message, QueueReport):
            self.on_queue(message)
        elif isinstance(message, EngineStatus):
            self._set_status(message)
        elif isinstance(message, Released):
            for request in message.requests:
                self._held.discard(request)
                self._release(request)
        elif isinstance(message, FrontWelcome):
            self.front = message.front
            self._release_all()
            self._welcomed = True
            self._silence.watch((_ENGINE,))
            if self._announced is not None:
                channel.send(self._announced)
        else:
            log.warning("the engine sent a %s, which front ends do not take", type(message).__name__)

    def _silent(self, numbers: list[int]) -> None:
        log.error("no sign of life from the engine for %g s", self._silence.silence_seconds)
        if self._channel is not None:
            channel = self._channel
            channel.close()
            self._on_close(channel)

    def _on_close(self, channel: AsyncChannel) -> None:
        self._silence.stop()
        self._channel = None
        self._welcomed = False
        self._gone.set()
        for request in list(self._waiting):
            self._finish(self._lost(request, held=True))
        self._set_status(EngineStatus(reason="the engine is gone; it is being started again", lost=True))

    def _set_status(self, status: EngineStatus) -> None:
        self.status = status
        self.on_status(status)

    def _lost(self, request: int, held: bool) -> ForwardResult:
        message = "the engine is not connected"
        code = ErrorCode.RANK_LOST if held else ErrorCode.NOT_READY
        return ForwardResult(self.front, request, code, message, LOST_RETRY_AFTER_SECONDS, held=held)

    def _finish(self, result: ForwardResult) -> None:
        future = self._waiting.pop(result.request, None)
        if future is not None and not future.done():
            future.set_result(result)
        if result.held:
            self._held.add(result.request)
        else:
            self._release(result.request)

    def _release(self, request: int) -> None:
        for callback in self._on_release.pop(request, []):
            callback()

    def _release_all(self) -> None:
        """Free what a lost engine's ranks held: they were all killed before the next engine started."""
        self._held.clear()
        for request in [number for number in self._on_release if number not in self._waiting]:
            self._release(request)
