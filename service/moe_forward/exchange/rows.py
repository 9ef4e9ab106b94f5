"""Sorting rows by expert and adding them up again: what the exchanges without a kernel of their own share.

No shape here depends on data, so that all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOWHERE = 1 << 30


def local_ids(ids: Tensor, first: int) -> Tensor:
    """Count expert ids from `first` on, the first expert of a rank.

    ids: integers, -1 for no expert. Returns: as `ids`; what is below `first` becomes larger than any expert's number.
    """
    return torch.remainder(ids - first, _NOWHERE)


def expert_order(ids: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """Sort (token, slot) pairs by local expert, stably.

    ids: [N, K] integers as `local_ids` gives them.
    Returns: (order [N * K] int64, flat positions in [N * K] by ascending expert and position;
        offsets [E_local + 1] int64). From offsets[-1] on, `order` has the slots that belong to no local expert.
    """
    experts, order = torch.sort(ids.flatten(), stable=True)
    bounds = torch.arange(num_local_experts + 1, dtype=experts.dtype, device=experts.device)
    return order, torch.searchsorted(experts, bounds)


def add_slots(contributions: Tensor) -> Tensor:
    """Add a token's contributions in slot order, so that the bits depend on nothing but the token.

    contributions: [T, K, H]. Returns: [T, H] float32.
    """
    total = torch.zeros_like(contributions[:, 0], dtype=torch.float32)
    for slot in range(contributions.shape[1]):
        total += contributions[:, slot]
    return total


def take_bytes(values: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` of an fp8 tensor.

    They move as the widest integers that fit: indexing float8 is not implemented everywhere, and goes byte by byte.
    values: [N, H] of a 1-byte type, columns adjacent. index: [R] int64.
    """
    fits = (type_ for type_ in (torch.int64, torch.int32) if _divides(type_.itemsize, values))
    return values.view(next(fits, torch.uint8))[index].view(values.dtype)


def _divides(size: int, values: Tensor) -> bool:
    return all(number % size == 0 for number in (values.shape[1], values.stride(0), values.storage_offset()))
