"""Ids of a model and numbers of a group that lacks some of its experts."""

from __future__ import annotations

import pytest
import torch

from moe_forward.expert_map import expert_map, held_experts, hull, place_routes, shard
from moe_forward.types import expert_range

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("experts", [8, 9, 15, 16, 31, 256])
def test_whoever_is_lost_the_others_hold_every_expert_left_in_nearly_equal_parts(ranks: int, experts: int) -> None:
    for lost in range(ranks + 1):
        missing = tuple(expert_range(lost, ranks + 1, experts)) if ranks < experts else ()
        shards = [shard(rank, ranks, experts, missing) for rank in range(ranks)]
        assert sorted(sum(shards, ())) == sorted(set(range(experts)) - set(missing))
        assert all(list(mine) == sorted(mine) for mine in shards)
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
        numbers = expert_map(experts, missing, CPU)
        for rank, mine in enumerate(shards):
            expected = expert_range(rank, ranks, experts - len(missing))
            assert numbers[list(mine)].tolist() == list(expected)
        assert (numbers[list(missing)] == -1).all()


def test_without_a_missing_expert_ids_are_numbers() -> None:
    assert expert_map(5, (), CPU).tolist() == [0, 1, 2, 3, 4, -1]
    assert held_experts(3, ()) == (0, 1, 2)


def test_routes_to_missing_experts_are_slots_of_no_expert_and_are_counted() -> None:
    numbers = expert_map(6, (1, 2), CPU)
    ids = torch.tensor([[0, 3, 5], [1, 0, 2], [4, -1, 2], [-1, -1, -1]])
    placed = place_routes(ids, numbers)
    assert placed.ids.tolist() == [[0, 1, 3], [-1, 0, -1], [2, -1, -1], [-1, -1, -1]]
    assert placed.missing.tolist() == [0, 2, 1, 0], "a slot that never had an expert lacks none"


def test_no_tokens_have_no_routes() -> None:
    placed = place_routes(torch.empty(0, 3, dtype=torch.int64), expert_map(6, (1,), CPU))
    assert (placed.ids.shape, placed.missing.shape) == ((0, 3), (0,))


def test_the_hull_goes_around_a_hole() -> None:
    assert hull((2, 3, 9)) == (2, 10)
    assert hull(()) == (0, 0)
