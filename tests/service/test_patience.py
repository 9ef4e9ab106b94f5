"""How long a step waits for company: not at all for a lone client, as long as it pays for many."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from moe_forward.batcher.patience import Company, due_seconds

from .step_simulation import LIMITS, Cost, Simulation, make_request, thinking

WINDOW = 200e-6


def test_without_company_in_sight_a_request_goes_at_once() -> None:
    assert due_seconds(1.0, 1.0, 1, 250e-6, WINDOW, 1e-3) == 1.0
    assert due_seconds(1.0, 1.0, 1, math.inf, WINDOW, None) == 1.0


def test_while_company_is_expected_it_waits_until_three_gaps_are_quiet_and_never_longer_than_allowed() -> None:
    assert due_seconds(1.0, 1.0, 1, 20e-6, WINDOW, 1e-3) == pytest.approx(1.0 + 60e-6)
    assert due_seconds(1.0, 1.0001, 5, 20e-6, WINDOW, 1e-3) == pytest.approx(1.0001 + 60e-6)
    assert due_seconds(1.0, 1.00017, 8, 20e-6, WINDOW, 1e-3) == 1.0 + WINDOW
    assert due_seconds(1.0, 1.00019, 9, 20e-6, WINDOW, 1e-3) == 1.00019, "no time is left for one more"


def test_it_goes_when_waiting_costs_those_who_wait_more_than_a_step_takes() -> None:
    assert due_seconds(1.0, 1.0, 3, 30e-6, WINDOW, 121e-6) > 1.0
    assert due_seconds(1.0, 1.0, 3, 30e-6, WINDOW, 119e-6) == 1.0


def test_a_client_that_comes_back_after_its_answer_is_no_company() -> None:
    company = Company(WINDOW)
    now = 0.0
    for _ in range(5):  # its answer after 60 us, its next request 20 us later
        company.arrived(now, alone=True)
        company.answered(now, now + 60e-6)
        now += 80e-6
    assert company.gap_seconds > WINDOW


def test_the_gap_is_learned_from_bursts() -> None:
    company = Company(WINDOW)
    for burst in range(20):
        for number in range(8):
            company.arrived(0.01 * burst + 10e-6 * number, alone=number == 0)
        company.answered(0.01 * burst, 0.01 * burst + 1e-3)
    assert company.gap_seconds == pytest.approx(WINDOW / 7, rel=0.05)


def test_who_arrives_while_a_step_of_an_earlier_request_runs_is_company_for_later_ones() -> None:
    company = Company(WINDOW)
    for number in range(30):  # two clients in turn, 50 us apart, each answered 70 us after it came
        company.arrived(number * 50e-6, alone=True)
        company.answered(number * 50e-6 - 50e-6, number * 50e-6 + 20e-6)
    assert company.gap_seconds == pytest.approx(50e-6, rel=0.05)


@pytest.mark.parametrize("step_seconds", [50e-6, 1e-3, 5e-3])
def test_a_lone_client_waits_for_its_step_alone(step_seconds: float) -> None:
    cost = Cost(step_seconds, 0.0)
    simulation = Simulation(LIMITS, cost)
    simulation.closed_loop(make_request, thinking(30e-6, 0))
    simulation.run(0.2)
    waits = simulation.waits(after_seconds=0.01)
    assert statistics.median(waits) == pytest.approx(step_seconds + 2 * cost.way_seconds)
    assert waits[-1] == pytest.approx(waits[0]), "not once in a while either"


def bursts(max_wait_seconds: float) -> Simulation:
    """Eight clients that send within 100 us, again and again: what attention replicas in step with each other do."""
    simulation = Simulation(replace(LIMITS, max_wait_seconds=max_wait_seconds), Cost(1e-3, 1e-6))
    for burst in range(100):
        for client in range(8):
            simulation.at(
                burst * 5e-3 + client * 14e-6,
                lambda client=client: simulation.send(make_request(1, 3, client)) and None,  # type: ignore[misc]
            )
    return simulation.run(1.0)


def test_a_burst_is_one_step_and_does_not_wait_out_the_window() -> None:
    simulation = bursts(WINDOW)
    assert simulation.batch_sizes(0.02) == [8] * 96
    starts = [sent - queued[0].arrived_seconds for sent, queued in simulation.steps[4:]]
    assert max(starts) < 0.95 * WINDOW
    assert set(bursts(0.0).batch_sizes(0.02)) == {1, 7}


@pytest.mark.parametrize("think_seconds", [3e-4, 1e-3])
def test_eight_clients_are_batched_as_well_as_by_waiting_out_the_window(
    think_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Simulation:
        simulation = Simulation(replace(LIMITS, max_steps_in_flight=1), Cost(1e-3, 1e-6))
        for client in range(8):
            simulation.closed_loop(make_request, thinking(think_seconds, client), 1e-5 * client)
        return simulation.run(1.0)

    adaptive = run()
    assert adaptive.batch_sizes(0.1)
    monkeypatch.setattr("moe_forward.batcher.line.due_seconds", lambda first, *rest: first + WINDOW)
    patient = run()
    assert statistics.mean(adaptive.batch_sizes(0.1)) >= 0.97 * statistics.mean(patient.batch_sizes(0.1))
    assert len(adaptive.done) >= 0.99 * len(patient.done)
