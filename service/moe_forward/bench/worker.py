"""One client process's part of a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import uvloop

from moe_forward.bench.arrivals import Arrivals, arrivals
from moe_forward.bench.clock import MonotonicClock
from moe_forward.bench.histogram import Histogram
from moe_forward.bench.loops import closed_loop, open_loop, window
from moe_forward.bench.mixes import LayerOrder, Mix, draws
from moe_forward.bench.sender import BUFFER_BYTES, Request, Sender
from moe_forward.bench.tally import Progress, Tally
from moe_forward.bench.target import Target

PROBE_NS = 10_000_000
TELL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Job:
    """What one process has to do in one run; it is process `part` of `parts`.

    paths: (layer, tokens) -> path and query of such a request. bodies: by tokens.
    reply_bytes: what the body of a reply has at least, by tokens.
    connections, requests: of this process. rate: of all processes, None in a closed loop.
    """

    target: Target
    mix: Mix
    layers: tuple[int, ...]
    layer_order: LayerOrder
    paths: Mapping[tuple[int, int], str]
    bodies: Mapping[int, tuple[bytes, ...]]
    reply_bytes: Mapping[int, int]
    connections: int
    rate: float | None
    arrivals: Arrivals
    warmup_seconds: float
    seconds: float
    requests: int | None
    timeout_seconds: float
    slo_ns: int | None
    seed: int
    part: int
    parts: int


def work(job: Job, begin: Callable[[], int], tell: Callable[[Progress], None]) -> Tally:
    """Do one process's part.

    begin: called when everything is prepared; returns the moment to start at, on the monotonic clock.
    tell: called a few times a second with what happened since.
    """
    return uvloop.run(_work(job, begin, tell))


async def _work(job: Job, begin: Callable[[], int], tell: Callable[[Progress], None]) -> Tally:
    trust = job.target.trust()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    senders = [Sender(job.target, trust, buffer, job.timeout_seconds) for _ in range(job.connections)]
    requests = _requests(job)
    tally = Tally(job.slo_ns)
    with MonotonicClock() as clock, MonotonicClock() as probe_clock:
        run = window(begin(), job.warmup_seconds, job.seconds, job.requests)
        aside = [
            asyncio.create_task(_probe(tally.lag, probe_clock, run.measured_ns)),
            asyncio.create_task(_tell(tally, tell)),
        ]
        used_seconds = time.process_time()
        await clock.sleep_until(run.start_ns)
        if job.rate is None:
            await closed_loop(requests, senders, run, tally, clock)
        else:
            # A seed of its own for each process, and not the one that sizes are drawn from.
            moments = arrivals(job.arrivals, job.rate, job.seed * job.parts + job.part + 1, job.part, job.parts)
            await open_loop(moments, requests, senders, run, tally, clock)
        tally.cpu_seconds = time.process_time() - used_seconds
        for task in aside:
            task.cancel()
        failed = [error for error in await asyncio.gather(*aside, return_exceptions=True) if error]
    for sender in senders:
        sender.close()
    tell(tally.take_recent())
    for error in failed:
        if not isinstance(error, asyncio.CancelledError):
            raise error
    return tally


def _requests(job: Job) -> Iterator[Request]:
    heads: dict[tuple[int, int, int], bytes] = {}
    for draw in draws(job.mix, job.layers, job.layer_order, job.seed + job.part, job.part):
        bodies = job.bodies[draw.tokens]
        body = bodies[draw.variant // len(job.layers) % len(bodies)]
        key = (draw.layer, draw.tokens, len(body))
        if key not in heads:
            heads[key] = job.target.head(job.paths[draw.layer, draw.tokens], len(body))
        yield Request(draw.tokens, heads[key], body, job.reply_bytes[draw.tokens])


async def _probe(lag: Histogram, clock: MonotonicClock, measured_ns: int) -> None:
    """Sample how late this event loop is: what it adds to latencies that are not the service's."""
    moment_ns = measured_ns
    while True:
        await clock.sleep_until(moment_ns)
        lag.add(clock.now_ns() - moment_ns)
        moment_ns += PROBE_NS  # a long stall counts for every sample that it made late


async def _tell(tally: Tally, tell: Callable[[Progress], None]) -> None:
    while True:
        await asyncio.sleep(TELL_SECONDS)
        tell(tally.take_recent())
