"""Overload: who would be late is told at once, and steps stay short beside the deadlines of those in them."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest

from moe_forward.batcher import IN_TIME_PART, Ahead, Batcher, BatchLimits, Pace
from moe_forward.batcher.admission import STEP_PART
from moe_forward.messages import Ticket

from .step_simulation import Cost, Simulation, make_request

LIMITS = BatchLimits(8192, 256, 200e-6, 1024, 65536)
COST = Cost(10e-3, 500e-6)  # a full step takes 4 s, twice the deadline
DEADLINE_SECONDS, TOKENS = 2.0, 64
PEAK = 1 / (COST.token_seconds * TOKENS)
"""Requests a second that no steps, however large, exceed."""
WARM_SECONDS = 10.0


def overload(times: float, clients: int = 4, layers: int = 1, end_seconds: float = 30.0, **changes: Any) -> Simulation:
    """Offer `times` the peak, whatever the service says. changes: the cost from half of the time on."""
    simulation, rng = Simulation(LIMITS, COST), random.Random(1)

    def again() -> None:
        deadline = simulation.now + DEADLINE_SECONDS
        simulation.send(make_request(TOKENS, rng.randrange(layers), rng.randrange(clients), deadline))
        simulation.at(simulation.now + rng.expovariate(times * PEAK), again)

    simulation.at(0.0, again)
    if changes:
        simulation.at(end_seconds / 2, lambda: setattr(simulation, "cost", Cost(**changes)))
    return simulation.run(end_seconds)


def goodput(simulation: Simulation, after_seconds: float = WARM_SECONDS) -> float:
    """Return what part of the peak was answered in time."""
    waits = simulation.waits(after_seconds=after_seconds)
    return sum(seconds < DEADLINE_SECONDS for seconds in waits) / (simulation.now - after_seconds) / PEAK


@pytest.mark.parametrize(("clients", "layers"), [(1, 1), (4, 1), (100, 1), (4, 8)])
def test_under_overload_goodput_holds_and_refusals_come_at_once(clients: int, layers: int) -> None:
    simulation = overload(4.0, clients, layers)
    assert goodput(simulation) >= 0.85
    waits = simulation.waits(after_seconds=WARM_SECONDS)
    given_up = sum(item.arrived_seconds > WARM_SECONDS for item in simulation.expired)
    given_up += sum(seconds >= DEADLINE_SECONDS for seconds in waits)
    at_once = sum(refused > WARM_SECONDS for refused, _ in simulation.late)
    assert at_once > 20 * given_up


def test_without_a_look_ahead_every_refusal_comes_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "late_seconds", lambda *arguments: None)
    simulation = overload(4.0)
    waits = simulation.waits(after_seconds=WARM_SECONDS)
    assert waits[len(waits) // 2] > 0.8 * DEADLINE_SECONDS
    assert len(simulation.expired) > len(simulation.done)


@pytest.mark.parametrize("layers", [1, 8])
def test_below_the_peak_nobody_is_refused(layers: int) -> None:
    simulation = overload(0.7, layers=layers)
    assert (simulation.late, simulation.expired, simulation.refused) == ([], [], 0)


def test_a_pool_that_becomes_three_times_slower_is_learned() -> None:
    simulation = overload(4.0, end_seconds=60.0, fixed_seconds=30e-3, token_seconds=1500e-6)
    assert goodput(simulation, 40.0) >= 0.8 / 3


def test_a_pool_that_was_slow_is_found_to_be_quick_again() -> None:
    simulation = overload(4.0, end_seconds=60.0, fixed_seconds=1e-3, token_seconds=50e-6)
    assert goodput(simulation, 40.0) >= 3.9, "all that is offered, a tenth of what could be answered"


def request_in(seconds: float, tokens: int = TOKENS, client: int = 0) -> Ticket:
    return make_request(tokens, 3, client, seconds)


def known(tokens: int, step_seconds: float) -> Batcher:
    """Return a batcher that has seen a step."""
    batcher = Batcher(LIMITS)
    batcher.finished(3, tokens, 0.0, step_seconds, 0.0)
    return batcher


def flood(batcher: Batcher, requests: int, client: int = 1, tokens: int = TOKENS) -> None:
    for _ in range(requests):
        assert batcher.add(make_request(tokens, client=client), 0.0)


def test_who_finds_the_queue_empty_is_let_in_whatever_steps_have_taken() -> None:
    batcher = known(8192, 4.0)
    assert batcher.late_seconds(request_in(0.01), 0.0) is None
    flood(batcher, 1)
    assert batcher.late_seconds(request_in(0.01), 0.0) == pytest.approx(4.0)


def test_who_would_be_late_is_told_when_the_answer_would_come() -> None:
    batcher = known(8192, 0.1)
    flood(batcher, 128 * 5)  # five full steps
    seconds = batcher.late_seconds(request_in(0.5, client=1), 0.0)
    assert seconds == pytest.approx(0.55, rel=0.05), "and half a one"
    assert batcher.late_seconds(request_in(0.6 / IN_TIME_PART, client=1), 0.0) is None


def test_what_is_at_the_ranks_counts() -> None:
    batcher = known(1024, 0.1)
    flood(batcher, 1)
    assert batcher.late_seconds(request_in(1.0), 0.0, Ahead(0.3, 0.3, False)) is None
    assert batcher.late_seconds(request_in(1.0), 0.0, Ahead(1.5, 1.5, False)) == pytest.approx(1.6)
    assert batcher.late_seconds(request_in(1.0), 0.0, Ahead(math.inf, math.inf, False)) is None, "nobody knows"


def test_a_client_with_little_there_is_let_in_where_the_one_with_the_backlog_is_not() -> None:
    batcher = known(8192, 0.5)
    flood(batcher, 128 * 4)
    assert batcher.late_seconds(request_in(2.0, client=1), 0.0) is not None
    assert batcher.late_seconds(request_in(2.0, client=2), 0.0) is None


def test_large_requests_that_wait_do_not_keep_small_ones_out() -> None:
    batcher = known(8192, 0.5)
    flood(batcher, 7, tokens=8192)
    assert batcher.late_seconds(request_in(2.0, tokens=8192, client=1), 0.0) is not None
    assert batcher.late_seconds(request_in(2.0, client=1), 0.0) is None


def any_batcher(rng: random.Random) -> Batcher:
    """Return a batcher that has seen some steps, in a state that it may come to."""
    batcher = Batcher(LIMITS)
    for _ in range(rng.choice([0, 1, 2, 5, 20])):
        batcher.finished(
            3, int(rng.choice([1, 16, 256, 8192]) * (0.5 + rng.random())) + 1, 0.0, rng.expovariate(20), 0.0
        )
    for _ in range(rng.choice([0, 1, 3, 30, 300])):
        tokens = rng.choice([1, 64, 1024, 4096])
        batcher.add(make_request(tokens, rng.randrange(rng.choice([1, 60])), rng.randrange(5)), 0.0)
    return batcher


def test_who_is_let_in_after_a_short_sum_would_have_been_after_the_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for _ in range(3000):
        batcher = any_batcher(rng)
        ahead = rng.choice([None, Ahead(rng.expovariate(2), 0.1, False), Ahead(math.inf, math.inf, False)])
        request = make_request(rng.choice([1, 64, 4096]), rng.randrange(3), rng.randrange(6), 10 ** rng.uniform(-3, 2))
        found = batcher.late_seconds(request, 0.0, ahead)
        short = batcher.in_time_at_worst(request, 0.0, ahead)
        with monkeypatch.context() as patched:
            patched.setattr(Batcher, "in_time_at_worst", lambda *arguments: False)
            assert batcher.late_seconds(request, 0.0, ahead) == found
        outcomes[short, found is None] += 1
    assert outcomes[True, False] == 0
    assert min(outcomes[kind] for kind in [(True, True), (False, True), (False, False)]) > 100, outcomes


def test_a_rate_of_single_tokens_is_not_taken_for_that_of_full_steps() -> None:
    batcher = known(1, 1e-3)  # a thousand tokens a second
    flood(batcher, 100)  # 6400 of them
    assert batcher.late_seconds(request_in(0.1, client=1), 0.0) is None


def test_no_request_without_a_deadline_is_refused_and_one_whose_deadline_has_passed_is_left_to_expire() -> None:
    batcher = known(1024, 10.0)
    flood(batcher, 16 * 20)
    assert batcher.late_seconds(make_request(TOKENS, client=1), 0.0) is None
    assert batcher.late_seconds(request_in(-1.0, client=1), 0.0) is None


@pytest.mark.parametrize(
    ("given_seconds", "rows"),
    [(0.4 / STEP_PART, 4096), (0.2 / STEP_PART, 2048), (0.001, 1024), (math.inf, 6400)],
    ids=["a part of the time given", "half of it", "never less than twice the shortest", "no deadline"],
)
def test_a_step_is_as_large_as_the_time_of_those_in_it_allows(given_seconds: float, rows: int) -> None:
    batcher = known(512, 0.05)
    batcher.finished(3, 1024, 0.0, 0.1, 0.0)
    for _ in range(100):
        batcher.add(request_in(given_seconds), 0.0)
    assert sum(item.request.tokens for item in batcher.next_step(10.0)) == rows


def test_a_request_larger_than_its_time_allows_goes_alone() -> None:
    batcher = known(512, 0.05)
    batcher.finished(3, 1024, 0.0, 0.1, 0.0)
    for _ in range(2):
        batcher.add(request_in(0.5, tokens=8192), 0.0)
    assert [item.request.tokens for item in batcher.next_step(10.0)] == [8192]


def test_expected_seconds_lie_between_the_sizes_that_were_seen_and_come_back_as_tokens() -> None:
    pace = Pace()
    assert pace.expected_seconds(1) is None
    assert pace.tokens_within(1.0) == math.inf
    pace.finished(100, 1.0)
    assert [pace.expected_seconds(tokens) for tokens in (1, 100, 1000)] == [1.0, 1.0, 1.0]
    assert pace.tokens_within(1.0) == math.inf
    for tokens, seconds in [(1000, 3.0), (3000, 6.0)]:
        pace.finished(tokens, seconds)
    for tokens, expected in [(325, 1.5), (550, 2.0), (2000, 4.5), (3000, 6.0)]:
        assert pace.expected_seconds(tokens) == pytest.approx(expected)
        assert pace.tokens_within(expected) == pytest.approx(max(tokens, 550)), "at least twice the shortest"
    assert pace.expected_seconds(5000) == pytest.approx(6.0), "no guess beyond what was seen"
    assert pace.tokens_within(9.0) == pytest.approx(5000)


def test_nobody_is_refused_for_steps_larger_than_any_that_was_seen() -> None:
    batcher = known(1, 0.05)
    batcher.finished(3, 64, 0.0, 1.0, 0.0)  # a slow start; in proportion, 2000 tokens would take half a minute
    for _ in range(133):
        assert batcher.add(request_in(120.0, tokens=45), 0.0)
    assert batcher.late_seconds(request_in(120.0, tokens=45), 0.0) is None


def test_a_step_takes_no_less_than_a_smaller_one_and_no_more_than_several_of_it() -> None:
    pace = Pace()
    pace.finished(8000, 60.0)
    pace.finished(4000, 1.0)
    assert pace.expected_seconds(8000) == 2.0
    for _ in range(50):
        pace.finished(8000, 20.0)
    assert pace.expected_seconds(4000) == pytest.approx(10.0, rel=0.01)
    for _ in range(50):
        pace.finished(8000, 0.5)
    assert pace.expected_seconds(4000) == pytest.approx(0.5, rel=0.01)
