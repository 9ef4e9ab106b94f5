"""Overload: who would be answered too late is told at once, and no step outlasts the deadlines of those in it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from moe_forward.batcher import Ahead, Batcher, BatchLimits, Pace
from moe_forward.batcher.admission import MARGIN
from moe_forward.batcher.forming import GIVEN_PART, LEFT_PART
from moe_forward.types import ForwardRequest

from .step_simulation import Cost, Simulation, make_request

LIMITS = BatchLimits(8192, 256, 200e-6, 1024, 65536)
COST = Cost(10e-3, 500e-6)  # a full step takes 4 s, twice the deadline
DEADLINE_SECONDS, TOKENS = 2.0, 64
PEAK = 1 / (COST.token_seconds * TOKENS)
"""Requests a second that no steps, however large, exceed."""


class Overload(Simulation):
    """An open loop of several clients at a multiple of the peak, until `end_seconds`."""

    times, clients, layers, end_seconds, until_seconds, given_seconds = 4.0, 4, 1, 20.0, 20.0, DEADLINE_SECONDS

    def start(self) -> Overload:
        rng = random.Random(1)

        def again() -> None:
            deadline = self.now + self.given_seconds
            self.send(make_request(TOKENS, rng.randrange(self.layers), rng.randrange(self.clients), deadline))
            following = self.now + rng.expovariate(self.times * PEAK)
            if following < self.end_seconds:
                self.at(following, again)

        self.at(0.0, again)
        self.run(self.until_seconds)
        return self

    def goodput(self, after_seconds: float = 5.0) -> float:
        """Return what part of the peak was answered in time."""
        good = [
            done for done in self.done if done.answered_seconds > after_seconds and done.seconds < self.given_seconds
        ]
        return len(good) / (self.now - after_seconds) / PEAK


@pytest.mark.parametrize(("clients", "layers"), [(1, 1), (4, 1), (100, 1), (4, 8)])
def test_under_overload_goodput_holds_and_refusals_come_at_once(clients: int, layers: int) -> None:
    simulation = Overload(LIMITS, COST)
    simulation.clients, simulation.layers = clients, layers
    simulation.start()
    assert simulation.goodput() >= 0.9
    waits = simulation.waits(after_seconds=5.0)
    assert waits[int(0.99 * len(waits))] < DEADLINE_SECONDS
    late_answers = sum(seconds >= DEADLINE_SECONDS for seconds in waits)
    given_up = sum(item.arrived_seconds > 5.0 for item in simulation.expired) + late_answers
    at_once = sum(seconds > 5.0 for seconds, _, _ in simulation.late)
    assert at_once > 10 * given_up
    assert at_once > 0.7 * (at_once + given_up + len(waits))


def test_without_a_look_ahead_every_refusal_comes_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "late_seconds", lambda *arguments: None)
    simulation = Overload(LIMITS, COST).start()
    waits = simulation.waits(after_seconds=5.0)
    assert waits[len(waits) // 2] > 0.9 * DEADLINE_SECONDS
    assert len(simulation.expired) > 5 * len(simulation.late)


def test_below_the_peak_nobody_is_refused() -> None:
    simulation = Overload(LIMITS, COST)
    simulation.times = 0.7
    simulation.start()
    assert (simulation.late, simulation.expired, simulation.refused) == ([], [], 0)


def test_a_pool_that_becomes_three_times_slower_is_learned() -> None:
    simulation = Overload(LIMITS, COST)
    simulation.end_seconds = simulation.until_seconds = 60.0
    simulation.at(10.0, lambda: setattr(simulation, "cost", Cost(30e-3, 1500e-6)))
    simulation.start()
    assert simulation.goodput(30.0) >= 0.8 / 3
    waits = simulation.waits(after_seconds=30.0)
    assert waits[int(0.99 * len(waits))] < DEADLINE_SECONDS


def test_a_lone_client_after_an_idle_time_is_never_refused() -> None:
    simulation = Overload(LIMITS, COST)
    simulation.end_seconds, simulation.until_seconds = 5.0, 30.0
    simulation.start()
    assert simulation.late
    assert not simulation.batcher.requests
    simulation.late.clear()
    for number in range(40):  # as many as come at once, though the last measured pace says that some are late
        simulation.at(30.0 + number * 1e-6, lambda: simulation.send(request_in(0.5, simulation.now)) and None)
    simulation.run(60.0)
    assert simulation.late == []


def test_a_client_that_comes_back_after_each_answer_is_never_refused_by_what_a_large_step_took() -> None:
    batcher = known(8192, 4.0)
    assert batcher.late_seconds(request_in(0.01), 0.0) is None


def request_in(
    seconds: float, now: float = 0.0, tokens: int = TOKENS, client: int = 0, layer: int = 3
) -> ForwardRequest:
    return make_request(tokens, layer, client, now + seconds)


def known(tokens: int, step_seconds: float, limits: BatchLimits = LIMITS, steps: int = 3) -> Batcher:
    """Return a batcher that has seen a few steps of one size, the last one just now."""
    batcher = Batcher(limits)
    for _ in range(steps):
        batcher.finished(3, tokens, 0.0, step_seconds, 0.0)
    return batcher


def flood(batcher: Batcher, requests: int, client: int = 1, tokens: int = TOKENS) -> None:
    for _ in range(requests):
        assert batcher.add(make_request(tokens, client=client), 0.0)


def test_who_would_be_late_is_told_when_the_answer_would_come() -> None:
    batcher = known(1024, 0.1)
    flood(batcher, 16 * 10)  # ten such steps: one second
    seconds = batcher.late_seconds(request_in(1.0, client=1), 0.0)
    assert seconds == pytest.approx(1.0, rel=0.1)
    assert batcher.late_seconds(request_in(2.0, client=1), 0.0) is None


def test_what_is_at_the_ranks_counts() -> None:
    batcher = known(1024, 0.1)
    flood(batcher, 1)
    assert batcher.late_seconds(request_in(1.0), 0.0, Ahead(0.5, 0.5, False)) is None
    seconds = batcher.late_seconds(request_in(1.0), 0.0, Ahead(1.5, 1.5, False))
    assert seconds == pytest.approx(1.5, rel=0.05)


def test_a_client_with_little_there_is_let_in_where_the_one_with_the_backlog_is_not() -> None:
    batcher = known(1024, 0.1)
    flood(batcher, 16 * 20)
    assert batcher.late_seconds(request_in(1.0, client=1), 0.0) is not None
    assert batcher.late_seconds(request_in(1.0, client=2), 0.0) is None


def test_large_requests_that_wait_do_not_keep_small_ones_out_of_the_queue() -> None:
    batcher = known(8192, 1.0)
    flood(batcher, 7, client=1, tokens=8192)
    assert batcher.late_seconds(request_in(1.0, client=1, tokens=8192), 0.0) is not None
    assert batcher.late_seconds(request_in(1.0, client=1), 0.0) is None


@pytest.mark.parametrize(
    ("steps", "now", "ahead"),
    [(2, 0.0, None), (3, 5.1, None), (3, 0.0, Ahead(math.inf, math.inf, False))],
    ids=["too few steps", "long ago", "nobody knows when ranks are free"],
)
def test_nobody_is_refused_on_a_pace_that_is_not_known(steps: int, now: float, ahead: Ahead | None) -> None:
    batcher = known(1024, 0.1, steps=steps)
    flood(batcher, 16 * 20)
    assert batcher.late_seconds(request_in(1.0, now, client=1), now, ahead) is None
    assert known_refuses(now=4.9)


def known_refuses(now: float) -> bool:
    batcher = known(1024, 0.1)
    flood(batcher, 16 * 20)
    return batcher.late_seconds(request_in(1.0, now, client=1), now) is not None


def test_ranks_that_work_on_a_long_step_have_not_rested() -> None:
    batcher = known(1024, 0.1)
    flood(batcher, 16 * 20)
    assert batcher.late_seconds(request_in(1.0, 9.0, client=1), 9.0, Ahead(9.5, 9.5, True)) is not None


def test_a_rate_of_single_tokens_is_not_taken_for_that_of_full_steps() -> None:
    batcher = known(1, 1e-3)  # a thousand tokens a second
    batcher.finished(3, 256, 0.0, 1.2e-3, 0.0)
    flood(batcher, 100)  # 6400 tokens, in steps of 8192
    assert batcher.late_seconds(request_in(0.1, client=1), 0.0) is None


def test_no_request_without_a_deadline_is_refused_and_one_that_has_passed_is_left_to_expire() -> None:
    batcher = known(1024, 0.1)
    flood(batcher, 16 * 20)
    assert batcher.late_seconds(make_request(TOKENS, client=1), 0.0) is None
    assert batcher.late_seconds(request_in(-1.0, client=1), 0.0) is None


def rows(batcher: Batcher, now: float, ahead: Ahead | None = None) -> list[int]:
    return [item.request.tokens for item in batcher.next_step(now, ahead)]


def test_a_step_is_as_large_as_the_earliest_deadline_in_it_allows() -> None:
    batcher = known(1024, 0.1)
    for _ in range(64):
        batcher.add(request_in(0.1), 0.0)
    first = rows(batcher, 1e-3)
    assert sum(first) <= LEFT_PART * 1024
    assert sum(first) > LEFT_PART * 1024 - 2 * TOKENS
    batcher = known(1024, 0.1)
    for _ in range(64):
        batcher.add(request_in(10.0), 0.0)
    assert sum(rows(batcher, 1e-3)) == 64 * TOKENS


def test_the_time_until_ranks_are_free_is_not_left_for_the_step() -> None:
    batcher = known(1024, 0.1)
    for _ in range(16):
        batcher.add(request_in(0.2), 0.0)
    step = rows(batcher, 0.09995, Ahead(0.1, 0.1, False))
    assert 0 < sum(step) <= LEFT_PART * 1024


def test_a_request_larger_than_its_deadline_allows_goes_alone() -> None:
    batcher = known(1024, 0.1)
    for _ in range(2):
        batcher.add(request_in(0.5, tokens=8192), 0.0)
    assert rows(batcher, 0.0) == [8192]


def test_one_that_is_nearly_late_does_not_make_the_steps_of_the_others_small() -> None:
    batcher = known(1024, 0.1)
    nearly_late = request_in(1.01, client=1)
    batcher.add(nearly_late, 0.0)
    for _ in range(20):
        batcher.add(request_in(10.0, client=2), 0.5)
    assert rows(batcher, 1.0) == [TOKENS] * 20
    assert [item.request for item in batcher.take_late()] == [nearly_late]
    assert batcher.take_late() == []
    assert (batcher.requests, batcher.tokens) == (0, 0)


def test_one_that_is_nearly_late_is_served_where_a_step_for_all_is_quick_enough_and_where_it_is_alone() -> None:
    batcher = known(1024, 0.1)
    for _ in range(2):
        batcher.add(request_in(1.05), 0.0)
    assert rows(batcher, 1.0) == [TOKENS] * 2
    batcher.add(request_in(1.001, tokens=8192), 0.0)
    assert rows(batcher, 1.0) == [8192]
    assert batcher.take_late() == []


def test_steps_are_not_cut_below_a_part_of_the_time_that_was_given() -> None:
    batcher = known(1024, 0.1)
    for _ in range(100):
        batcher.add(request_in(1.0), 0.0)
    step = rows(batcher, 1.0 - GIVEN_PART)
    assert GIVEN_PART * 10240 - TOKENS < sum(step) <= GIVEN_PART * 10240


def test_the_pace_of_a_size_lies_between_those_measured_and_comes_back_as_rows() -> None:
    pace = Pace()
    assert pace.rows_within(1.0) == math.inf
    for tokens, seconds in [(100, 1.0), (1000, 2.0), (3000, 6.0)]:
        pace.finished(tokens, seconds, 10.0)
    for tokens, seconds in [(50, 0.5), (100, 1.0), (550, 1.5), (2000, 4.0), (6000, 12.0)]:
        assert pace.expected_seconds(tokens) == pytest.approx(seconds)
        assert pace.rows_within(seconds) == pytest.approx(tokens)


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    pace = Pace()
    pace.finished(4096, 60.0, 0.0)
    pace.finished(1024, 1.0, 1.0)
    assert pace.rows_within(4.0) < 1200
    pace.finished(1024, 1.0, 61.0)
    assert pace.rows_within(4.0) == pytest.approx(4096)


def test_the_margin_leaves_room_for_a_pace_that_is_a_quarter_off() -> None:
    batcher = known(1024, 0.1)
    flood(batcher, 16 * 10)
    full = replace(request_in(1.0, client=1), deadline_seconds=1.07 * MARGIN)
    assert batcher.late_seconds(full, 0.0) is None
