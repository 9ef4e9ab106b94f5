"""Which group follows a loss: counted within an hour, blamed on places, down to fewer ranks and up again."""

from __future__ import annotations

import pytest

from moe_forward.ladder import RESTORE_SECONDS, WINDOW_SECONDS, Ladder, Layout

EXPERTS = 10
ALL = (0, 1, 2, 3)
SHARES = ((0, 1), (2, 3, 4), (5, 6), (7, 8, 9))  # of four ranks


def ladder(max_restarts: int = 1, degrade: bool = True, least_ranks: int = 1) -> Ladder:
    """least_ranks: on fewer, all experts do not fit."""
    return Ladder(len(ALL), EXPERTS, max_restarts, degrade, lambda ranks: ranks >= least_ranks)


def test_a_lost_group_is_started_again_as_often_as_the_setting_says_and_then_given_up() -> None:
    fails = ladder(max_restarts=2, degrade=False)
    assert fails.lost([1], 0.0) == Layout(ALL)
    assert fails.lost([1], 10.0) == Layout(ALL)
    assert fails.lost([1], 20.0) is None


def test_losses_of_more_than_an_hour_ago_do_not_count() -> None:
    fails = ladder(max_restarts=1, degrade=False)
    times = [n * (WINDOW_SECONDS + 1) for n in range(20)]
    assert all(fails.lost([1], now) == Layout(ALL) for now in times)
    assert fails.lost([1], times[-1] + WINDOW_SECONDS - 1) is None


def test_no_restart_is_allowed_with_a_setting_of_zero() -> None:
    assert ladder(max_restarts=0, degrade=False).lost([0], 0.0) is None
    assert ladder(max_restarts=0).lost([0], 0.0) == Layout((1, 2, 3))


def test_the_place_that_keeps_losing_its_rank_is_left_out_and_the_others_hold_everything() -> None:
    degrades = ladder()
    assert degrades.lost([2], 0.0) == Layout(ALL)
    assert degrades.lost([1], 1.0) == Layout(ALL), "another place, and its first loss"
    assert degrades.lost([2], 2.0) == Layout((0, 1, 3))
    assert not degrades.complete


@pytest.mark.parametrize("place", ALL)
def test_what_does_not_fit_is_missing(place: int) -> None:
    degrades = ladder(max_restarts=0, least_ranks=4)
    assert degrades.lost([place], 0.0) == Layout(tuple(p for p in ALL if p != place), SHARES[place])


def test_a_second_place_adds_its_experts_to_the_missing_ones() -> None:
    degrades = ladder(max_restarts=0, least_ranks=3)
    assert degrades.lost([3], 0.0) == Layout((0, 1, 2))
    assert degrades.lost([1], 1.0) == Layout((0, 2), SHARES[1] + SHARES[3])


def test_all_experts_that_did_not_fit_after_all_are_not_tried_again_on_as_many_ranks() -> None:
    degrades = ladder(max_restarts=0)
    assert degrades.lost([3], 0.0) == Layout((0, 1, 2))
    assert degrades.refused([1], 1.0) == Layout((0, 1, 2), SHARES[3]), "not rank 1, but its memory is to blame"
    degrades.started()
    assert degrades.lost([1], 2.0) == Layout((0, 2)), "what was learned is of three ranks; the plan says two can"


def test_a_group_that_does_not_start_leaves_out_who_kept_it_from_it() -> None:
    degrades = ladder(max_restarts=3)
    assert degrades.lost([2], 0.0) == Layout(ALL)
    assert degrades.refused([2], 1.0) == Layout((0, 1, 3))


@pytest.mark.parametrize("blamed", [(), ALL])
def test_a_loss_of_nobody_in_particular_leaves_nobody_out(blamed: tuple[int, ...]) -> None:
    degrades = ladder(max_restarts=1)
    assert degrades.lost(blamed, 0.0) == Layout(ALL)
    assert degrades.lost(blamed, 1.0) is None


def test_the_last_rank_is_started_again_and_then_given_up() -> None:
    degrades = ladder(max_restarts=0)
    for place in (0, 1, 2):
        assert degrades.lost([place], 0.0) is not None
    assert degrades.layout.places == (3,)
    assert degrades.lost([3], 0.0) is None


def test_places_that_are_gone_are_done_without_at_once_and_taken_back_when_they_are_there() -> None:
    degrades = ladder(max_restarts=3)
    assert degrades.gone([0, 1, 3], 0.0) == Layout((0, 1, 3))
    degrades.started()
    assert degrades.better([0, 1, 3], 100.0) is None
    assert degrades.better(ALL, 200.0) == Layout(ALL)
    assert degrades.complete


def test_some_places_are_better_than_fewer() -> None:
    degrades = ladder(least_ranks=4)
    assert degrades.gone([0, 2], 0.0) == Layout((0, 2), SHARES[1] + SHARES[3])
    degrades.started()
    assert degrades.better([0, 1, 2], 1.0) == Layout((0, 1, 2), SHARES[3])


@pytest.mark.parametrize("there", [(), ALL])
def test_nothing_is_left_out_where_nothing_or_everything_is_there(there: tuple[int, ...]) -> None:
    assert ladder().gone(there, 0.0) is None


def test_without_the_setting_the_service_waits_for_places() -> None:
    assert ladder(degrade=False).gone([0, 1], 0.0) is None


def test_a_place_that_failed_is_tried_again_after_waits_that_double_up_to_an_hour() -> None:
    degrades = ladder(max_restarts=0)
    now, waits = 0.0, []
    for _ in range(9):
        assert degrades.lost([1], now) == Layout((0, 2, 3))
        degrades.started()
        lost_at = now
        while degrades.better(ALL, now) is None:
            now += RESTORE_SECONDS / 2
        waits.append(now - lost_at)
        degrades.started()
    assert waits == [min(RESTORE_SECONDS * 2**n, WINDOW_SECONDS) for n in range(9)]


def test_the_wait_is_short_again_after_an_hour_without_a_loss() -> None:
    degrades = ladder(max_restarts=0)
    for now in (0.0, 60.0):
        degrades.lost([1], now)
        assert degrades.better(ALL, now + 120.0) == Layout(ALL)
        degrades.started()
    later = 60.0 + 120.0 + WINDOW_SECONDS + 1
    degrades.lost([1], later)
    assert degrades.better(ALL, later + RESTORE_SECONDS) == Layout(ALL)


def test_a_larger_group_that_does_not_start_gives_way_to_the_smaller_one() -> None:
    degrades = ladder(max_restarts=0, least_ranks=4)
    smaller = degrades.lost([1], 0.0)
    degrades.started()
    assert degrades.better(ALL, RESTORE_SECONDS) == Layout(ALL)
    assert degrades.refused([0], RESTORE_SECONDS + 1) == smaller, "whoever complained: it worked without place 1"
    degrades.started()
    assert degrades.better(ALL, RESTORE_SECONDS * 2.5) is None, "the wait has doubled"


def test_a_complete_group_that_came_up_forgets_on_how_few_ranks_it_did_not_fit() -> None:
    degrades = ladder(max_restarts=0)
    degrades.lost([1], 0.0)
    assert degrades.refused([], 1.0) == Layout((0, 2, 3), SHARES[1])
    degrades.started()
    assert degrades.better(ALL, 100.0) == Layout(ALL)
    degrades.started()
    assert degrades.lost([1], 200.0) == Layout((0, 2, 3))
