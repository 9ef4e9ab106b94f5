"""Sorting rows by expert and adding them up again: what the exchanges without a kernel of their own share."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_order(local_ids: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """Sort (token, slot) pairs by local expert, stably.

    local_ids: [N, K] int64, local expert of each slot, -1 for slots of other ranks.
    Returns: (order [R] int64, flat positions in [N * K] by ascending expert, position; offsets [E_local + 1] int64).
    """
    flat = local_ids.flatten()
    mine = torch.nonzero(flat >= 0).flatten()
    order = mine[torch.argsort(flat[mine], stable=True)]
    counts = torch.bincount(flat[mine], minlength=num_local_experts)
    offsets = torch.zeros(num_local_experts + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return order, offsets


def add_slots(contributions: Tensor) -> Tensor:
    """Add a token's contributions in slot order, so that the bits depend on nothing but the token.

    contributions: [T, K, H] float32. Returns: [T, H] float32.
    """
    total = torch.zeros_like(contributions[:, 0])
    for slot in range(contributions.shape[1]):
        total += contributions[:, slot]
    return total


def take_bytes(values: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` of an fp8 tensor; moved as bytes, since indexing float8 is not implemented everywhere."""
    return values.view(torch.uint8)[index].view(values.dtype)
