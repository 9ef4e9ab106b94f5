"""Small requests before large ones, and clients that take turns: nobody waits for another's queue."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_forward.batcher import Ahead, Batcher, BatchLimits, Queued

from .step_simulation import Cost, Simulation, make_request, thinking

LIMITS = BatchLimits(800, 16, 200e-6, 10_000, 10_000_000)
COST = Cost(1e-3, 5e-6)  # a full step of 800 tokens takes 5 ms
FLOOD, LIGHT = 1, 2


def clients(step: list[Queued]) -> list[int]:
    return [item.request.client for item in step]


def flood(batcher: Batcher, requests: int, tokens: int = 50, layers: int = 1) -> None:
    for number in range(requests):
        assert batcher.add(make_request(tokens, 3 + number % layers, FLOOD), 0.0)


@pytest.mark.parametrize("layer", [3, 9], ids=["same layer", "another layer"])
def test_a_single_request_waits_for_no_more_than_a_round_of_a_client_with_a_thousand(layer: int) -> None:
    batcher = Batcher(LIMITS)
    flood(batcher, 1000)
    assert clients(batcher.next_step(1.0)) == [FLOOD] * 16
    batcher.add(make_request(1, layer, LIGHT), 1.0)
    steps = [clients(batcher.next_step(2.0)) for _ in range(2)]
    assert LIGHT in steps[0] + steps[1]
    assert layer != 3 or LIGHT in steps[0]


def test_clients_with_backlogs_get_the_same_tokens_whatever_the_size_of_their_requests() -> None:
    batcher = Batcher(LIMITS)
    sizes = {10: 100, 20: 50, 30: 75}
    for client, tokens in sizes.items():
        for _ in range(200):
            batcher.add(make_request(tokens, client=client), 0.0)
    served = dict.fromkeys(sizes, 0)
    for _ in range(30):
        for item in batcher.next_step(1.0):
            served[item.request.client] += item.request.tokens
    assert max(served.values()) - min(served.values()) <= 100


def test_requests_of_one_token_are_charged_for_the_places_they_take() -> None:
    batcher = Batcher(LIMITS)
    for number in range(400):
        batcher.add(make_request(1, client=FLOOD if number < 300 else LIGHT), 0.0)
    served = [client for _ in range(4) for client in clients(batcher.next_step(1.0))]
    assert served.count(LIGHT) == served.count(FLOOD) == 32


def test_rest_is_not_saved_up_and_a_client_alone_owes_nothing_for_it() -> None:
    batcher = Batcher(LIMITS)
    flood(batcher, 160)
    while batcher.requests:
        batcher.next_step(1.0)
    for number in range(64):
        batcher.add(make_request(50, client=FLOOD if number % 2 else LIGHT), 2.0)
    served = clients(batcher.next_step(3.0))
    assert (served.count(FLOOD), served.count(LIGHT)) == (8, 8)


def test_cancelled_requests_are_not_charged() -> None:
    batcher = Batcher(LIMITS)
    cancelled = [make_request(100, client=LIGHT) for _ in range(50)]
    for request in cancelled:
        batcher.add(request, 0.0)
    for request in cancelled:
        assert batcher.cancel(request.front, request.request)
    flood(batcher, 32)
    batcher.add(make_request(50, client=LIGHT), 1.0)
    assert LIGHT in clients(batcher.next_step(2.0))


def test_a_full_queue_admits_a_client_with_little_there_and_refuses_the_one_that_filled_it() -> None:
    batcher = Batcher(BatchLimits(800, 16, 0.0, 100, 100_000))
    flood(batcher, 100)
    assert not batcher.add(make_request(1, client=FLOOD), 0.0)
    admitted = [batcher.add(make_request(1, client=LIGHT), 0.0) for _ in range(30)]
    assert admitted == [True] * 25 + [False] * 5, "a quarter is kept"
    batcher = Batcher(BatchLimits(800, 16, 0.0, 100, 100_000))
    flood(batcher, 100)
    assert all(batcher.add(make_request(1, client=client), 0.0) for client in range(10, 20))
    greedy = [batcher.add(make_request(1, client=10), 0.0) for _ in range(10)]
    assert greedy == [True] * 8 + [False] * 2, "not more than a hundred over eleven clients"


def test_tokens_are_shared_like_requests() -> None:
    batcher = Batcher(BatchLimits(800, 16, 0.0, 100, 1000))
    flood(batcher, 10, tokens=100)
    assert not batcher.add(make_request(1, client=FLOOD), 0.0)
    assert batcher.add(make_request(200, client=LIGHT), 0.0)
    assert not batcher.add(make_request(51, client=3), 0.0), "the reserve of 250 is nearly gone"
    assert batcher.add(make_request(50, client=3), 0.0)


def test_a_client_is_told_to_come_back_when_its_own_requests_are_done() -> None:
    batcher = Batcher(LIMITS)
    flood(batcher, 100, tokens=50)
    assert batcher.add(make_request(50, client=LIGHT), 0.0)
    assert batcher.drain_seconds(LIGHT) is None, "nobody knows before a step has finished"
    batcher.finished(3, 500, 0.0, 0.5, 0.5)
    assert batcher.drain_seconds(FLOOD) == pytest.approx(5.05)
    assert batcher.drain_seconds(LIGHT) == pytest.approx(0.1), "its own and as much of the other's"


def test_small_requests_go_before_large_ones_that_came_earlier() -> None:
    batcher = Batcher(LIMITS)
    batcher.finished(3, 800, 0.0, 5e-3, 0.0)
    for layer in (3, 4):
        batcher.add(make_request(500, layer), 1.0)
    batcher.add(make_request(100, 3), 1.001)
    batcher.add(make_request(1, 4), 1.002)
    steps = [[item.request.tokens for item in batcher.next_step(1.003)] for _ in range(4)]
    assert steps == [[100], [1], [500], [500]]


def test_a_large_request_that_has_waited_goes_first_and_small_ones_of_its_layer_come_along() -> None:
    batcher = Batcher(LIMITS)
    batcher.finished(3, 800, 0.0, 5e-3, 0.0)
    for tokens in (500, 400):
        batcher.add(make_request(tokens, 3), 1.0)
    for layer in (3, 4):
        batcher.add(make_request(2, layer), 1.019)
    assert [item.request.tokens for item in batcher.next_step(1.0201)] == [500, 2]
    assert [item.request.tokens for item in batcher.next_step(1.0202)] == [2]
    assert [item.request.tokens for item in batcher.next_step(1.0203)] == [400]


def test_half_its_time_to_the_deadline_brings_a_large_request_forward() -> None:
    batcher = Batcher(LIMITS)
    batcher.finished(3, 800, 0.0, 1.0, 0.0)
    batcher.add(make_request(500, 3, deadline_seconds=1.01), 1.0)
    batcher.add(make_request(2, 4), 1.004)
    batcher.add(make_request(2, 5), 1.004)
    assert [item.request.tokens for item in batcher.next_step(1.0049)] == [2]
    assert [item.request.tokens for item in batcher.next_step(1.0051)] == [500]


def test_a_full_large_step_is_sent_ahead_of_small_ones_steps_but_late_behind_large_ones() -> None:
    batcher = Batcher(LIMITS)
    for _ in range(4):
        batcher.add(make_request(400), 1.0)
    behind_small, behind_large = Ahead(1.050, 0.050, False), Ahead(1.050, 0.050, True)
    assert len(batcher.next_step(1.001, behind_small)) == 2
    assert batcher.next_step(1.0489, behind_large) == []
    assert batcher.wake_seconds(1.001, behind_large) == pytest.approx(1.049)
    batcher.add(make_request(1), 1.0489)
    assert batcher.next_step(1.0495, behind_large) == [], "a small one waits: nothing large as long as possible"
    assert [item.request.tokens for item in batcher.next_step(1.04995, behind_large)] == [1]


@pytest.mark.parametrize("depth", [1, 2])
def test_decoding_beside_a_flood_of_prefill_waits_for_one_large_step_at_most(depth: int) -> None:
    limits = BatchLimits(800, 16, 200e-6, 10_000, 10_000_000, depth)
    simulation = Simulation(limits, COST)
    for number in range(40):
        simulation.closed_loop(lambda: make_request(800, client=FLOOD), thinking(1e-4, number))
    for number in range(4):
        simulation.closed_loop(lambda: make_request(1, client=LIGHT), thinking(4e-3, 100 + number))
    simulation.run(1.0)
    waits, large = simulation.waits(LIGHT, 0.1), COST.step_seconds(800)
    # One large step with half a millisecond of its successor's lead, then steps of its own kind.
    assert waits[-1] < 1e-3 + large + 3 * COST.step_seconds(4) + 4 * COST.way_seconds
    assert len(simulation.waits(FLOOD)) > 0.5 / large, "and prefill goes on"


def test_a_large_request_is_served_though_small_ones_never_end() -> None:
    simulation = Simulation(LIMITS, COST)
    for number in range(64):
        simulation.closed_loop(lambda: make_request(60, client=FLOOD), thinking(1e-4, number))
    for number in range(3):
        simulation.closed_loop(lambda: make_request(700, client=LIGHT), thinking(1e-3, 100 + number))
    simulation.run(1.0)
    waits = simulation.waits(LIGHT)
    assert len(waits) > 25
    assert waits[-1] < 3 * 6 * COST.step_seconds(800)


def served(simulation: Simulation) -> int:
    return sum(done.queued.request.client != 9 for done in simulation.done)


requests = st.tuples(
    st.sampled_from([1, 3, 100, 101, 400, 800]),
    st.integers(3, 5),
    st.integers(0, 3),
    st.floats(0, 0.02),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(requests, min_size=1, max_size=40), st.integers(1, 4))
def test_everything_is_served_whatever_comes_and_the_clock_is_never_stuck(
    arrivals: list[tuple[int, int, int, float]], depth: int
) -> None:
    simulation = Simulation(BatchLimits(800, 16, 200e-6, 10_000, 10_000_000, depth), COST)
    for tokens, layer, client, seconds in arrivals:
        request = make_request(tokens, layer, client)
        simulation.at(seconds, lambda request=request: simulation.send(request) and None)  # type: ignore[misc]
    rng = random.Random(len(arrivals))
    for number in range(4):  # small ones that would keep large ones waiting for ever
        simulation.closed_loop(lambda: make_request(1, rng.randint(3, 5), 9), thinking(1e-4, number))
    enough_seconds = 0.02 + 6 * 6e-3 * len(arrivals) + 0.1
    while simulation.now < enough_seconds and served(simulation) < len(arrivals):
        simulation.run(simulation.now + 0.02)
    assert served(simulation) == len(arrivals)
    assert all(len({item.request.layer for item in step}) == 1 for _, step in simulation.steps)
    assert all(sum(item.request.tokens for item in step) <= 800 for _, step in simulation.steps)
    assert simulation.batcher.wake_seconds(simulation.now, room=False) == math.inf
