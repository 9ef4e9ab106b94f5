"""Closed and open loops against a server of their own time: who sees a stall, and what is not sent."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from moe_forward.bench.arrivals import arrivals, constant
from moe_forward.bench.loops import closed_loop, open_loop, window
from moe_forward.bench.sender import Answer, Request
from moe_forward.bench.tally import Tally

SERVICE_SECONDS = 0.005
STALL = (9.995, 11.0)
MS = 1e6


class Server:
    """Serves one request after the other, and stalls once. stall: (from, to) in seconds."""

    def __init__(self, stall: tuple[float, float] = (0.0, 0.0), code: str = "") -> None:
        self.stall = stall
        self.code = code
        self.free_seconds = 0.0
        self.asked = 0

    async def ask(self, request: Request) -> Answer:
        loop = asyncio.get_running_loop()
        self.asked += 1
        begin = max(loop.time(), self.free_seconds)
        if self.stall[0] <= begin < self.stall[1]:
            begin = self.stall[1]
        self.free_seconds = begin + SERVICE_SECONDS
        await asyncio.sleep(self.free_seconds - loop.time())
        return Answer(503 if self.code else 200, self.code, round(loop.time() * 1e9))


def requests() -> Any:
    return itertools.repeat(Request(1, b"", b"body", 0))


async def closed(server: Any, callers: int, clock: Any, **options: Any) -> Tally:
    tally = Tally()
    await closed_loop(requests(), [server] * callers, a_window(**options), tally, clock)
    return tally


async def opened(server: Any, rate: float, senders: int, clock: Any, **options: Any) -> Tally:
    tally = Tally()
    moments = options.pop("moments", None) or constant(rate)
    await open_loop(moments, requests(), [server] * senders, a_window(**options), tally, clock)
    return tally


def a_window(seconds: float = 20.0, warmup_seconds: float = 0.0, requests: int | None = None) -> Any:
    return window(0, warmup_seconds, seconds, requests)


def test_a_stall_is_seen_by_all_who_would_have_met_it_only_in_an_open_loop(virtually: Any, clock: Any) -> None:
    omitting = virtually(closed(Server(STALL), 1, clock)).whole_latency
    honest = virtually(opened(Server(STALL), 100.0, 256, clock)).whole_latency
    # Closed: one request of some 4000 met the stall. Open: those of that second, each 10 ms after the last and
    # served in 5, waited 5 ms less each; so the twentieth of 2000, the 99th percentile, waited 900 ms.
    assert omitting.largest == pytest.approx(1000 * MS, rel=0.01)
    assert omitting.quantile(0.999) == pytest.approx(SERVICE_SECONDS * 1e9, rel=0.01)
    assert honest.quantile(0.99) == pytest.approx(900 * MS, rel=0.01)
    assert honest.quantile(0.95) == pytest.approx(500 * MS, rel=0.02)
    assert honest.quantile(0.5) == pytest.approx(SERVICE_SECONDS * 1e9, rel=0.01)


def test_few_connections_do_not_hide_the_stall(virtually: Any, clock: Any) -> None:
    wide = virtually(opened(Server(STALL), 100.0, 256, clock))
    narrow = virtually(opened(Server(STALL), 100.0, 1, clock))
    assert narrow.whole_latency.quantile(0.99) == pytest.approx(wide.whole_latency.quantile(0.99), rel=0.01)
    assert narrow.answered == wide.answered == 2000
    assert narrow.late == pytest.approx(200, abs=5)  # the stall's hundred, and as many until it had caught up
    assert wide.late == 0
    assert narrow.wait.largest == pytest.approx(995 * MS, rel=0.01)


def test_poisson_arrivals_wait_for_each_other_as_the_theory_says(virtually: Any, clock: Any) -> None:
    moments = arrivals("poisson", 100.0, 3, 0, 1)
    tally = virtually(opened(Server(), 100.0, 256, clock, seconds=60.0, moments=moments))
    # M/D/1 at half its capacity waits half a service time in the mean (Pollaczek-Khinchine).
    assert tally.whole_latency.mean == pytest.approx(1.5 * SERVICE_SECONDS * 1e9, rel=0.04)


def test_what_was_not_sent_in_time_is_counted(virtually: Any, clock: Any) -> None:
    server = Server()
    tally = virtually(opened(server, 400.0, 4, clock, seconds=10.0))  # twice what the server does
    assert tally.answered + tally.unsent == 4000
    assert tally.unsent == pytest.approx(2000, abs=10)
    assert server.asked == tally.answered
    assert tally.whole_latency.quantile(0.99) > 4.9e9


def test_so_many_requests_are_all_sent_however_late(virtually: Any, clock: Any) -> None:
    tally = virtually(opened(Server(), 400.0, 4, clock, requests=1000))
    assert (tally.answered, tally.unsent) == (1000, 0)
    tally = virtually(closed(Server(), 3, clock, requests=100, warmup_seconds=1.0))
    assert tally.answered == 100


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_the_warm_up_is_not_counted(virtually: Any, clock: Any, loop: str) -> None:
    run: Callable[..., Any] = closed if loop == "closed" else opened
    server = Server()
    load = (1,) if loop == "closed" else (100.0, 8)
    tally = virtually(run(server, *load, clock, seconds=1.0, warmup_seconds=1.0))
    assert tally.answered == pytest.approx(server.asked / 2, abs=1)


def test_callers_of_a_closed_loop_pause_after_an_error(virtually: Any, clock: Any) -> None:
    server = Server(code="draining")
    tally = virtually(closed(server, 1, clock, seconds=1.1))
    assert tally.refused == {"draining": 20}
    assert (tally.answered, tally.errors) == (0, {})


def test_an_open_loop_goes_on_at_its_rate_after_errors(virtually: Any, clock: Any) -> None:
    tally = virtually(opened(Server(code="draining"), 100.0, 8, clock, seconds=1.0))
    assert tally.refused == {"draining": 100}


def test_requests_within_the_objective_are_counted(virtually: Any, clock: Any) -> None:
    tally = Tally(slo_ns=round(20 * MS))
    virtually(open_loop(constant(100.0), requests(), [Server(STALL)] * 256, a_window(), tally, clock))
    # It works off the stall at twice the rate of arrivals: all but some 200 are good.
    assert tally.good == pytest.approx(1800, abs=5)
    assert tally.answered == 2000
