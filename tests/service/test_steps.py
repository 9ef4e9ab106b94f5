"""Steps in flight: their order and their times, and what sending ahead is worth, on ranks of simulated cost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moe_forward.answers import answers_of, report_of, results_in
from moe_forward.batcher import Ahead, Batcher, BatchLimits, Pace, Queued
from moe_forward.errors import ErrorCode
from moe_forward.messages import RankWord, StepOrder
from moe_forward.steps import Sent, StepsInFlight
from moe_forward.types import ForwardResult, QueueReport

from .step_simulation import LIMITS, Cost, Simulation, layers_in_turn, make_request, thinking


def steps_in_flight(pace: Pace | None = None) -> StepsInFlight:
    return StepsInFlight(LIMITS, pace or Pace())


def send(steps: StepsInFlight, number: int, now: float, tokens: int = 1, requests: int = 1) -> list[Queued]:
    queued = [Queued(make_request(tokens), now - 0.001, LIMITS.is_large(tokens)) for _ in range(requests)]
    steps.add(StepOrder(number, 1, 3, tuple(item.request for item in queued)), queued, now)
    return queued


def results_of(sent: Sent, ended_seconds: float, missing_experts: int = 0) -> list[ForwardResult]:
    """Return what the link of front end 0 makes of its answers."""
    return list(results_in(answers_of(sent, ended_seconds, missing_experts)[0], 0))


def answer(steps: StepsInFlight, number: int, rank: int = 0) -> None:
    word = RankWord(number, 1, rank, b"")
    sent = steps.find(word)
    assert sent is not None
    sent.results[rank] = word


def test_the_time_of_a_step_begins_when_the_one_before_it_has_ended() -> None:
    steps = steps_in_flight()
    send(steps, 0, now=1.0)
    queued = send(steps, 1, now=1.5, requests=2)
    assert not steps.have_room
    assert steps.began_seconds == 1.0
    answer(steps, 0)
    first = steps.pop_finished(1, 2.0)
    assert first is not None
    assert (first.sent_seconds, first.began_seconds) == (1.0, 1.0)
    assert steps.began_seconds == 2.0
    answer(steps, 1)
    second = steps.pop_finished(1, 2.7)
    assert second is not None
    assert (second.sent_seconds, second.began_seconds) == (1.5, 2.0)
    assert steps.began_seconds == float("inf")
    results = results_of(second, 2.7)
    assert [(result.request, result.step) for result in results] == [(item.request.request, 1) for item in queued]
    assert all(result.queue_seconds == pytest.approx(0.501) for result in results)
    assert all(result.step_seconds == pytest.approx(0.7) for result in results)


def test_a_step_whose_ranks_have_all_answered_waits_for_the_one_before_it() -> None:
    steps = steps_in_flight()
    send(steps, 0, now=1.0)
    send(steps, 1, now=1.0)
    answer(steps, 1, rank=0)
    answer(steps, 1, rank=1)
    answer(steps, 0, rank=1)
    assert steps.pop_finished(2, 1.1) is None
    answer(steps, 0, rank=0)
    assert [sent.step.step for sent in iter(lambda: steps.pop_finished(2, 1.2), None)] == [0, 1]
    assert steps.oldest is None


def test_words_of_other_generations_and_of_steps_given_up_belong_to_nobody() -> None:
    steps = steps_in_flight()
    send(steps, 5, now=1.0)
    assert steps.find(RankWord(5, 2, 0, b"")) is None
    assert [sent.step.step for sent in steps.pop_all()] == [5]
    assert steps.find(RankWord(5, 1, 0, b"")) is None
    assert steps.have_room


def test_what_ranks_say_reaches_the_request_it_is_about_and_the_report() -> None:
    steps = steps_in_flight()
    send(steps, 0, now=1.0, tokens=3, requests=2)
    sent = steps.oldest
    assert sent is not None
    sent.results = {
        1: RankWord(0, 1, 1, b"", non_finite=(1,), missing_routes=(2, 0)),
        0: RankWord(0, 1, 0, b"", missing_routes=(1, 0)),
    }
    fine, bad = results_of(sent, 2.0, missing_experts=4)
    assert (fine.code, fine.missing_routes, fine.missing_experts, fine.batch_tokens) == (None, 3, 4, 6)
    assert (bad.code, bad.missing_routes) == (ErrorCode.NON_FINITE, 0)
    report = report_of(sent, QueueReport(5, 50))
    assert [result.rank for result in report.results] == [0, 1]
    assert (report.layer, report.tokens, report.requests, report.queue_requests, report.queue_tokens) == (
        3,
        6,
        2,
        5,
        50,
    )


def test_the_end_of_what_is_ahead_is_expected_from_the_pace_of_steps_of_that_size() -> None:
    pace = Pace()
    steps = steps_in_flight(pace)
    assert steps.ahead() is None
    send(steps, 0, now=1.0, tokens=64)
    assert steps.ahead() == Ahead(float("inf"), float("inf"), False), "no step has ever finished"
    pace.finished(64, 0.25)
    pace.finished(2000, 4.0)
    send(steps, 1, now=1.1, tokens=2000)
    assert steps.ahead() == Ahead(5.25, 4.0, True)


def test_overlapping_steps_do_not_make_the_queue_seem_to_drain_faster() -> None:
    simulation = Simulation(cost=Cost(1e-3, 1e-5))
    for client in range(64):
        simulation.closed_loop(lambda: make_request(10), thinking(1e-4, client))
    simulation.run(0.5)
    assert simulation.batcher.pace.tokens_per_second == pytest.approx(simulation.tokens_per_second(), rel=0.1)


def test_a_step_of_another_layer_leaves_while_one_runs_and_late_enough_to_gather() -> None:
    batcher = Batcher(LIMITS)
    batcher.finished(3, 1, 0.0, 10e-3, 0.01)
    batcher.add(make_request(layer=4), 1.0)
    ahead = Ahead(1.010, 10e-3, False)
    assert batcher.next_step(1.0098, ahead) == []
    wake = batcher.wake_seconds(1.0, ahead)
    assert 1.0098 < wake < 1.010
    assert len(batcher.next_step(wake, ahead)) == 1


def test_a_full_step_leaves_at_once_and_none_before_the_pace_is_known() -> None:
    batcher = Batcher(LIMITS)
    unknown = Ahead(float("inf"), float("inf"), False)
    for _ in range(255):
        batcher.add(make_request(), 1.0)
    assert batcher.next_step(2.0, unknown) == []
    batcher.add(make_request(), 1.0)
    assert len(batcher.next_step(1.0, unknown)) == 256


def throughput(depth: int, clients: int, cost: Cost, think_seconds: float, layers: int) -> float:
    simulation = Simulation(replace(LIMITS, max_steps_in_flight=depth), cost)
    for client in range(clients):
        turns = itertools.islice(layers_in_turn(layers), client % layers, None)
        simulation.closed_loop(
            lambda turns=turns, client=client: make_request(1, next(turns), client),  # type: ignore[misc]
            thinking(think_seconds, client),
            1e-5 * client,
        )
    return simulation.run(100 * cost.fixed_seconds).tokens_per_second()


@pytest.mark.parametrize("layers", [1, 8])
@pytest.mark.parametrize("clients", [8, 64])
def test_two_in_flight_are_never_slower_than_one_and_faster_where_the_queue_is_never_empty(
    clients: int, layers: int
) -> None:
    for fixed_seconds in (150e-6, 1e-3):
        cost = Cost(fixed_seconds, 1e-6)
        for think in (0.5, 1.0, 5.0):
            one, two = (throughput(depth, clients, cost, think * fixed_seconds, layers) for depth in (1, 2))
            assert two > one, (cost, think)
            if think < 1:  # the queue is never empty: what ranks waited for is saved
                assert two > 1.06 * one, (cost, think)


def test_a_deeper_flight_changes_nothing_for_steps_longer_than_the_way() -> None:
    cost = Cost(1e-3, 1e-6)
    two, four = (throughput(depth, 8, cost, 5e-4, 1) for depth in (2, 4))
    assert four == pytest.approx(two, rel=0.01)


def test_limits_say_what_a_request_takes_of_a_step() -> None:
    limits = BatchLimits(1000, 10, 0.0, 1, 1000)
    assert (limits.share(500), limits.share(1)) == (0.5, 0.1)
    assert (limits.is_large(125), limits.is_large(126)) == (False, True)
