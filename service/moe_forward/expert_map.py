"""Which expert is where in a group that lacks some: ids as the model numbers them, and as the group does.

A group without some experts numbers those it has from 0, in the model's order, and shares these numbers among its ranks
as any group does. Routers, gates and clients know the model's ids alone; exchange and experts the group's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from moe_forward.types import expert_range


class Placed(NamedTuple):
    """Routes of tokens in a group's numbers.

    ids: [T, K] int64, -1 for a slot of no expert. missing: [T] int64, slots whose expert the group lacks.
    """

    ids: Tensor
    missing: Tensor


def held_experts(num_experts: int, missing: Collection[int]) -> tuple[int, ...]:
    """Return the model's ids of the experts that a group has, by the group's numbers."""
    return tuple(expert for expert in range(num_experts) if expert not in missing)


def shard(rank: int, ranks: int, num_experts: int, missing: Collection[int]) -> tuple[int, ...]:
    """Return the model's ids, ascending, of the experts on `rank` of `ranks`; sizes differ by at most one."""
    held = held_experts(num_experts, missing)
    mine = expert_range(rank, ranks, len(held))
    return held[mine.start : mine.stop]


def hull(experts: tuple[int, ...]) -> tuple[int, int]:
    """Return the smallest [first, last) around ascending ids."""
    return (experts[0], experts[-1] + 1) if experts else (0, 0)


def expert_map(num_experts: int, missing: Collection[int], device: torch.device) -> Tensor:
    """Make the map from the model's ids to the group's numbers.

    Returns: [E + 1] int64, -1 for an expert that is missing; the last is -1, so that indexing with id -1 gives -1.
    """
    numbers = torch.full((num_experts + 1,), -1, dtype=torch.int64)
    held = held_experts(num_experts, missing)
    numbers[list(held)] = torch.arange(len(held))
    return numbers.to(device)


def place_routes(ids: Tensor, numbers: Tensor) -> Placed:
    """Translate expert ids; nothing waits for the host.

    ids: [T, K] int64, the model's, -1 for a slot of no expert. numbers: [E + 1] int64 of `expert_map`.
    """
    placed = numbers[ids]
    return Placed(placed, ((placed < 0) & (ids >= 0)).sum(1))
