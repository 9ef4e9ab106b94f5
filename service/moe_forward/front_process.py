"""The process of one front end among several: `python -m moe_forward.front_process DESCRIPTOR`, its task on stdin.

The service's own process accepts connections and hands them over; this one serves them until it is told to stop, and
ends at once when the service's process is gone. Neither Ray nor torch is imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections import Counter

import uvloop
from prometheus_client import CollectorRegistry, disable_created_metrics

from moe_forward import logs
from moe_forward.api import Reports
from moe_forward.channel import AsyncChannel
from moe_forward.datagrams import pack
from moe_forward.errors import ErrorCode, ForwardError, MoEForwardError
from moe_forward.front import Front, load_tls
from moe_forward.front_samples import read_samples
from moe_forward.front_task import FrontTask
from moe_forward.heartbeat import keep_beating
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
    TakeConnection,
)
from moe_forward.metrics import Metrics
from moe_forward.slab import Slab
from moe_forward.types import StepReport

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 0.25
"""How old what this front end counted can be on the metrics page."""

DRAIN_ANSWER_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve; returns the exit status. What keeps it from serving is told to the service and is one line of the log."""
    # Should this process hang just when the service is killed, it could not see that the channel is closed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sock = socket.socket(fileno=int(sys.argv[1]))
    task = FrontTask.from_json(sys.stdin.buffer.read())
    logs.configure(task.config.log_level, task.config.log_format, fields={"front": task.number})
    try:
        uvloop.run(serve(task, sock))
    except (MoEForwardError, OSError) as error:
        log.error("front end %d cannot serve: %s", task.number, error)
        with contextlib.suppress(OSError):
            sock.send(pack(FrontFailed(str(error))), socket.MSG_NOSIGNAL)
        return 1
    return 0


async def serve(task: FrontTask, sock: socket.socket) -> None:
    """Serve what comes over `sock` until told to stop. sock: to the service's process; stays open."""
    # the gauges beside every counter and histogram, which nobody reads
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    metrics = Metrics(registry, tracing=task.config.trace_endpoint is not None)
    slab = Slab(task.config.slab_bytes)
    link = EngineLink(task.socket_path, slab, wants_reports=False, poll_seconds=task.poll_seconds)
    # Steps and the engine's state are counted once, by the service's process.
    reports = Reports(link, task.spec.name, None)
    front = Front(
        task.config,
        task.spec,
        link,
        metrics,
        task.admin_token,
        load_tls(task.config),
        [],
        reports,
        lambda: control.drain_others(),
    )
    if task.draining:
        front.refuse_new()
    control = Control(sock.dup(), front, reports, registry)
    http = asyncio.create_task(front.serve())
    up = asyncio.create_task(front.up())
    await asyncio.wait([http, up], return_when=asyncio.FIRST_COMPLETED)
    if http.done():
        await http  # raises what kept it from serving
    control.send(FrontUp())
    beating = asyncio.create_task(keep_beating(lambda: control.send(Alive()), task.config.silence_seconds))
    samples = asyncio.create_task(control.send_samples())
    stopped = asyncio.create_task(control.stopped.wait())
    await asyncio.wait([http, stopped], return_when=asyncio.FIRST_COMPLETED)
    await front.drain(task.config.drain_timeout_seconds)
    front.end()
    await http
    await front.close()
    beating.cancel()
    samples.cancel()
    control.close()


class Control:
    """This process' end of the channel to the service's.

    sock: the channel. reports: its `rank_tokens` come from there. registry: what is counted here.
    stopped: set when the service wants this front end to end.
    """

    def __init__(self, sock: socket.socket, front: Front, reports: Reports, registry: CollectorRegistry) -> None:
        self.stopped = asyncio.Event()
        self._front = front
        self._reports = reports
        self._registry = registry
        self._sent = FrontSamples(())
        self._askers: list[asyncio.Future[int]] = []
        self._taking: set[asyncio.Task[None]] = set()
        self._channel = AsyncChannel(sock, self._on_message, self._on_close)

    def send(self, message: Message) -> None:
        """Tell the service."""
        self._channel.send(message)

    async def drain_others(self) -> int:
        """Have every front end refuse what is new; returns how many forwards the others are serving.

        Raises: ForwardError NOT_READY when one of them does not answer.
        """
        asked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._askers.append(asked)
        self.send(Drain())
        try:
            return await asyncio.wait_for(asked, DRAIN_ANSWER_SECONDS)
        except asyncio.TimeoutError as error:
            sentence = "new forwards are refused, but a front end does not say how many it is serving; ask again"
            raise ForwardError(ErrorCode.NOT_READY, sentence) from error

    def _tell_askers(self, inflight: int) -> None:
        for asked in self._askers:
            if not asked.done():
                asked.set_result(inflight)
        self._askers.clear()

    async def send_samples(self) -> None:
        """Tell what was counted whenever it has changed, for ever."""
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self._send_samples()

    def close(self) -> None:
        """Tell what was counted last, and hang up."""
        self._send_samples()
        self._channel.close()

    def _send_samples(self) -> None:
        samples = read_samples(self._registry)
        if samples != self._sent:
            self._sent = samples
            self._channel.send(samples)

    def _on_message(self, channel: AsyncChannel, message: Message, fds: list[int]) -> None:
        if isinstance(message, TakeConnection) and len(fds) == 1:
            taking = asyncio.create_task(self._take(socket.socket(fileno=fds.pop())))
            self._taking.add(taking)
            taking.add_done_callback(self._taking.discard)
        elif isinstance(message, RankTokens):
            self._reports.rank_tokens = Counter(dict(message.tokens))
        elif isinstance(message, StepReport) and self._front.tracer is not None:
            self._front.tracer.step_finished(message)
        elif isinstance(message, Drain):
            self._front.refuse_new()
            channel.send(InFlight(self._front.inflight))
        elif isinstance(message, InFlight):
            self._tell_askers(message.requests)
        elif isinstance(message, Stop):
            self.stopped.set()
        else:
            log.warning("the service sent a %s, which front ends do not take", type(message).__name__)
        for fd in fds:
            os.close(fd)

    async def _take(self, connection: socket.socket) -> None:
        try:
            await self._front.take(connection)
        finally:
            self._channel.send(ConnectionGone())

    def _on_close(self, channel: AsyncChannel) -> None:
        # The service was killed, and the engine with it: nobody could answer, and nobody would end this process.
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
