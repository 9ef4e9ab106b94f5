"""The batcher with a clock of its own: what becomes a step, when, and that nothing is lost or counted twice."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from moe_forward.batcher import Batcher, BatchLimits, Queued
from moe_forward.messages import Ticket

WAIT_SECONDS = 0.5
LIMITS = BatchLimits(
    max_step_tokens=100, max_step_requests=4, max_wait_seconds=WAIT_SECONDS, max_queue_requests=10, max_queue_tokens=300
)


def request(
    number: int, tokens: int = 1, layer: int = 3, front: int = 0, deadline_seconds: float = math.inf, client: int = 0
) -> Ticket:
    return Ticket(front, number, layer, tokens, deadline_seconds, client)


def is_of(item: Queued, client: int, large: bool) -> bool:
    return item.request.client == client and (item.request.tokens > 12) == large


def numbers(items: list[Queued]) -> list[int]:
    return [item.request.request for item in items]


@pytest.fixture
def batcher() -> Batcher:
    return Batcher(LIMITS)


def test_an_empty_queue_gives_no_step_and_nothing_to_wait_for(batcher: Batcher) -> None:
    assert batcher.next_step(0.0) == []
    assert batcher.expire(1e9) == []
    assert batcher.wake_seconds(0.0) == math.inf


def test_a_lonely_request_waits_for_company_then_goes(batcher: Batcher) -> None:
    assert batcher.add(request(1), 10.0)
    assert batcher.next_step(10.0 + WAIT_SECONDS / 2) == []
    assert batcher.wake_seconds(0.0) == 10.0 + WAIT_SECONDS
    (item,) = batcher.next_step(10.0 + WAIT_SECONDS)
    assert (item.request, item.arrived_seconds) == (request(1), 10.0)
    assert (batcher.requests, batcher.tokens) == (0, 0)


def test_without_patience_a_request_goes_at_once() -> None:
    batcher = Batcher(BatchLimits(100, 4, 0.0, 10, 300))
    batcher.add(request(1), 10.0)
    assert numbers(batcher.next_step(10.0)) == [1]


def test_requests_of_a_layer_go_together_in_order_of_arrival(batcher: Batcher) -> None:
    for number in (5, 2, 9):
        batcher.add(request(number), 0.0)
    assert numbers(batcher.next_step(1.0)) == [5, 2, 9]


def test_layers_are_never_mixed_and_the_one_that_waited_longest_goes_first(batcher: Batcher) -> None:
    for time, (number, layer) in enumerate([(1, 7), (2, 3), (3, 7), (4, 3), (5, 5)]):
        batcher.add(request(number, layer=layer), time * 0.01)
    steps = [numbers(batcher.next_step(9.0)) for _ in range(4)]
    assert steps == [[1, 3], [2, 4], [5], []]


def test_a_line_is_full_by_requests_without_waiting(batcher: Batcher) -> None:
    for number in range(4):
        assert batcher.next_step(0.0) == []
        batcher.add(request(number), 0.0)
    batcher.add(request(4), 0.0)
    assert numbers(batcher.next_step(0.0)) == [0, 1, 2, 3]
    assert batcher.next_step(0.0) == [], "the rest waits for company again"
    assert batcher.requests == 1


def test_a_line_is_full_by_tokens_without_waiting(batcher: Batcher) -> None:
    batcher.add(request(1, tokens=60), 0.0)
    assert batcher.next_step(0.0) == []
    batcher.add(request(2, tokens=40), 0.0)
    assert numbers(batcher.next_step(0.0)) == [1, 2]


def test_a_step_never_exceeds_its_tokens_and_among_large_ones_nobody_overtakes(batcher: Batcher) -> None:
    for number, tokens in enumerate((60, 50, 20)):
        batcher.add(request(number, tokens=tokens), 0.0)
    assert numbers(batcher.next_step(0.0)) == [0]
    assert numbers(batcher.next_step(1.0)) == [1, 2]


def test_a_request_of_exactly_the_limit_goes_alone_and_at_once(batcher: Batcher) -> None:
    batcher.add(request(1, tokens=100), 0.0)
    batcher.add(request(2, tokens=20), 0.0)
    assert numbers(batcher.next_step(0.0)) == [1]


def test_a_full_queue_refuses_by_requests(batcher: Batcher) -> None:
    assert all(batcher.add(request(number), 0.0) for number in range(10))
    assert not batcher.add(request(10), 0.0)
    assert (batcher.requests, batcher.tokens) == (10, 10)
    batcher.next_step(0.0)
    assert batcher.add(request(10), 0.0)


def test_a_full_queue_refuses_by_tokens_over_all_layers(batcher: Batcher) -> None:
    assert batcher.add(request(1, tokens=100, layer=1), 0.0)
    assert batcher.add(request(2, tokens=100, layer=2), 0.0)
    assert not batcher.add(request(3, tokens=101, layer=3), 0.0)
    assert batcher.add(request(4, tokens=100, layer=3), 0.0)
    assert not batcher.add(request(5), 0.0)


def test_cancel_takes_out_exactly_that_request(batcher: Batcher) -> None:
    for number, front in [(1, 0), (1, 1), (2, 0)]:
        batcher.add(request(number, tokens=5, front=front), 0.0)
    taken = batcher.cancel(1, 1)
    assert taken is not None
    assert (taken.request.front, taken.request.request) == (1, 1)
    assert batcher.cancel(1, 1) is None
    assert batcher.cancel(0, 3) is None
    assert (batcher.requests, batcher.tokens) == (2, 10)
    assert numbers(batcher.next_step(1.0)) == [1, 2]


def test_cancelling_the_last_of_a_layer_leaves_no_line(batcher: Batcher) -> None:
    batcher.add(request(1), 0.0)
    batcher.cancel(0, 1)
    assert batcher.next_step(9.0) == []
    assert batcher.wake_seconds(0.0) == math.inf


def test_a_cancelled_head_passes_its_patience_to_nobody(batcher: Batcher) -> None:
    batcher.add(request(1), 0.0)
    batcher.add(request(2), 0.4)
    batcher.cancel(0, 1)
    assert batcher.next_step(WAIT_SECONDS) == []
    assert numbers(batcher.next_step(0.4 + WAIT_SECONDS)) == [2]


def test_a_gone_front_end_takes_its_requests_along(batcher: Batcher) -> None:
    for number, (front, layer) in enumerate([(0, 3), (1, 3), (1, 4), (0, 4), (1, 5)]):
        batcher.add(request(number, front=front, layer=layer), 0.0)
    assert numbers(batcher.drop_front(1)) == [1, 2, 4]
    assert batcher.requests == 2
    assert [numbers(batcher.next_step(9.0)) for _ in range(3)] == [[0], [3], []]


def test_drop_all_empties_the_queue(batcher: Batcher) -> None:
    for number in range(6):
        batcher.add(request(number, layer=number % 2, tokens=7), 0.0)
    assert sorted(numbers(batcher.drop_all())) == list(range(6))
    assert (batcher.requests, batcher.tokens) == (0, 0)
    assert batcher.drop_all() == []


def test_deadlines_expire_exactly_and_wake_in_time(batcher: Batcher) -> None:
    batcher.add(request(1, deadline_seconds=5.0), 0.0)
    batcher.add(request(2, deadline_seconds=3.0), 0.0)
    batcher.add(request(3), 0.0)
    assert batcher.wake_seconds(0.0, room=False) == 3.0
    assert batcher.wake_seconds(0.0) == WAIT_SECONDS
    assert batcher.expire(2.999) == []
    assert numbers(batcher.expire(3.0)) == [2]
    assert batcher.wake_seconds(0.0, room=False) == 5.0
    assert numbers(batcher.expire(7.0)) == [1]
    assert batcher.wake_seconds(0.0, room=False) == math.inf
    assert numbers(batcher.next_step(7.0)) == [3]


def test_a_deadline_of_a_request_that_left_expires_nothing(batcher: Batcher) -> None:
    batcher.add(request(1, deadline_seconds=1.0), 0.0)
    batcher.add(request(2, deadline_seconds=9.0), 0.0)
    batcher.cancel(0, 1)
    assert batcher.expire(1.0) == []
    assert batcher.wake_seconds(0.0, room=False) == 9.0


def test_a_full_line_under_constant_load_does_not_starve_another_layer() -> None:
    batcher = Batcher(BatchLimits(100, 4, WAIT_SECONDS, 10_000, 10_000))
    now, number = 0.0, 0
    for _ in range(8):  # a backlog of a layer that fills steps faster than they are taken
        batcher.add(request(number := number + 1, layer=1), now)
    batcher.add(request(0, layer=2), now)
    steps: list[list[int]] = []
    while 0 not in itertools.chain(*steps):
        assert len(steps) < 6, "the lonely request waits long after its patience and the backlog before it"
        for _ in range(6):
            batcher.add(request(number := number + 1, layer=1), now)
        steps.append(numbers(batcher.next_step(now)))
        now += WAIT_SECONDS / 4


def test_random_traffic_loses_nothing_and_the_counts_return_to_zero() -> None:
    rng = random.Random(7)
    batcher = Batcher(LIMITS)
    now = 0.0
    waiting: dict[tuple[int, int], Ticket] = {}
    ends: Counter[str] = Counter()

    def leave(items: list[Queued], how: str) -> None:
        for item in items:
            assert waiting.pop((item.request.front, item.request.request)) == item.request
            ends[how] += 1

    for number in range(5000):
        now += rng.random() * 0.1
        event = rng.random()
        if event < 0.62:
            deadline = now + rng.choice([0.3, 2.0, 60.0])
            size = rng.choice([rng.randint(1, 12), rng.randint(1, 100)])
            item = request(number, size, rng.randrange(4), rng.randrange(3), deadline, rng.randrange(4))
            tokens = sum(other.tokens for other in waiting.values())
            fits = len(waiting) < 10 and tokens + item.tokens <= 300
            accepted = batcher.add(item, now)
            assert accepted or not fits
            if accepted:
                waiting[item.front, item.request] = item
                ends["into the reserve"] += not fits
            assert len(waiting) <= 12
            assert tokens + item.tokens <= 375 or not accepted
        elif event < 0.7 and waiting:
            front, chosen = rng.choice(sorted(waiting))
            found = batcher.cancel(front, chosen)
            assert found is not None
            leave([found], "cancelled")
        elif event < 0.71:
            leave(batcher.drop_front(rng.randrange(3)), "dropped")
        elif event < 0.8:
            expired = batcher.expire(now)
            assert all(item.request.deadline_seconds <= now for item in expired)
            leave(expired, "expired")
            assert all(other.deadline_seconds > now for other in waiting.values())
        else:
            step = batcher.next_step(now)
            assert len({item.request.layer for item in step}) <= 1
            assert len(step) <= 4
            assert sum(item.request.tokens for item in step) <= 100
            for client, large in itertools.product(range(4), (False, True)):
                mine = [item.arrived_seconds for item in step if is_of(item, client, large)]
                assert mine == sorted(mine), "a client's requests stay in order"
            leave(step, "stepped")
        assert (batcher.requests, batcher.tokens) == (len(waiting), sum(item.tokens for item in waiting.values()))
    assert min(ends[how] for how in ("cancelled", "dropped", "expired", "stepped", "into the reserve")) > 20
    leave(batcher.drop_all(), "dropped")
    assert (batcher.requests, batcher.tokens, waiting) == (0, 0, {})
