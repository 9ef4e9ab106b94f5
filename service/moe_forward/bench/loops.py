"""The two ways to put load on a service.

Closed: so many callers, each sending when it has the answer to the last. A service that stalls stops its callers, so
the stall is seen by as many requests as there are callers, however many would have come meanwhile.
Open: requests come when they come. Latency counts from the moment that was meant for sending, whether a connection was
free or not, so a stall is seen by all who would have met it. Source: "coordinated omission", Gil Tene's wrk2
(https://github.com/giltene/wrk2).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_forward.bench.clock import NANOSECONDS, Clock
from moe_forward.bench.sender import Answer, Request
from moe_forward.bench.tally import Tally

PAUSE_SECONDS = 0.05
"""Wait of a closed loop's caller after an error that names no wait, so that a dead service is not hammered."""


class Asks(Protocol):
    """Whoever sends one request at a time."""

    async def ask(self, request: Request) -> Answer:
        """Return what became of it; raise nothing."""


@dataclass(slots=True)
class Window:
    """Which requests belong to a run, by their moment. requests: still to be measured; None for all until the end.

    until_ns: no request after it; None where `requests` says when it is enough.
    """

    start_ns: int
    measured_ns: int
    until_ns: int | None
    requests: int | None

    def admit(self, moment_ns: int) -> bool:
        """Whether a request of this moment is sent; called once for each."""
        if self.until_ns is not None and moment_ns >= self.until_ns:
            return False
        if self.requests is None or moment_ns < self.measured_ns:
            return True
        self.requests -= 1
        return self.requests >= 0


def window(start_ns: int, warmup_seconds: float, seconds: float, requests: int | None) -> Window:
    """Return the window of a run. seconds: after the warm-up; does not bound a run of so many requests."""
    measured_ns = start_ns + round(warmup_seconds * NANOSECONDS)
    until_ns = measured_ns + round(seconds * NANOSECONDS) if requests is None else None
    return Window(start_ns, measured_ns, until_ns, requests)


async def closed_loop(
    requests: Iterator[Request], senders: Sequence[Asks], window: Window, tally: Tally, clock: Clock
) -> None:
    """Have every sender send its next request when it has the answer to the last."""

    async def call(sender: Asks) -> None:
        while window.admit(sent_ns := clock.now_ns()):
            request = next(requests)
            answer = await sender.ask(request)
            if sent_ns >= window.measured_ns:
                tally.record(request, sent_ns, sent_ns, answer)
            if answer.code:
                await asyncio.sleep(_pause_seconds(answer, window))

    await asyncio.gather(*(call(sender) for sender in senders))


async def open_loop(
    moments: Iterator[float],
    requests: Iterator[Request],
    senders: Sequence[Asks],
    window: Window,
    tally: Tally,
    clock: Clock,
) -> None:
    """Send at given moments, in seconds from the start, as far as senders are free; who finds none free waits here.

    Requests that are still waiting when the time is over are not sent, and counted.
    """
    idle = list(senders)
    waiting: deque[tuple[int, Request]] = deque()
    serving: set[asyncio.Task[None]] = set()

    async def serve(sender: Asks) -> None:
        while waiting:
            meant_ns, request = waiting.popleft()
            sent_ns = clock.now_ns()
            answer = await sender.ask(request)
            if meant_ns >= window.measured_ns:
                tally.record(request, meant_ns, sent_ns, answer)
        idle.append(sender)

    for moment in moments:
        meant_ns = window.start_ns + round(moment * NANOSECONDS)
        if not window.admit(meant_ns):
            break
        await clock.sleep_until(meant_ns)
        waiting.append((meant_ns, next(requests)))
        if idle:
            task = asyncio.create_task(serve(idle.pop()))  # the one used last: the others' connections may rest
            serving.add(task)
            task.add_done_callback(serving.discard)
    if window.until_ns is not None:
        await clock.sleep_until(window.until_ns)
        tally.unsent += sum(meant_ns >= window.measured_ns for meant_ns, _ in waiting)
        waiting.clear()
    await asyncio.gather(*serving)


def _pause_seconds(answer: Answer, window: Window) -> float:
    seconds = PAUSE_SECONDS if answer.retry_after_seconds is None else answer.retry_after_seconds
    if window.until_ns is None:
        return seconds
    return max(0.0, min(seconds, (window.until_ns - answer.ended_ns) / NANOSECONDS))
