"""What exchanges must deliver, in plain torch: stand-in experts, and the sums of their rows in each promised order."""

from __future__ import annotations

import torch

from moe_forward.exchange import Dispatched
from moe_forward.types import expert_range
from w4afp8 import Quantized, dequantize_tokens


def contributions(
    tokens: Quantized, ids: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What expert `id` makes of a token in each slot: the token times (id + 1) times its weight; 0 for id -1.

    Returns: [T, K, H] `dtype`.
    """
    hidden = dequantize_tokens(tokens)[:, None] * (ids[:, :, None] + 1.0)
    return (hidden * weights[:, :, None]).masked_fill(ids[:, :, None] < 0, 0).to(dtype)


def expert_rows(received: Dispatched, first_expert: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same from a rank's rows: [R, H] `dtype`, NaN in rows of no expert; without a wait for the device."""
    places = torch.arange(len(received.weights), device=received.offsets.device)
    expert = torch.searchsorted(received.offsets[1:].contiguous(), places, right=True) + first_expert
    hidden = dequantize_tokens(received.rows) * (expert[:, None] + 1.0)
    nobody = places >= received.offsets[-1]
    return (hidden * received.weights[:, None]).masked_fill(nobody[:, None], torch.nan).to(dtype)


def in_slot_order(rows: torch.Tensor) -> torch.Tensor:
    """Add [T, K, H] from the first slot to the last in float32: what `local` and `gloo` promise."""
    total = torch.zeros_like(rows[:, 0], dtype=torch.float32)
    for slot in range(rows.shape[1]):
        total = total + rows[:, slot]
    return total


def in_rank_order(rows: torch.Tensor, ids: torch.Tensor, ranks: int, num_experts: int) -> torch.Tensor:
    """Add what each rank's experts made in slot order, round to the rows' type, add the ranks: what `nccl` promises."""
    total = torch.zeros_like(rows[:, 0], dtype=torch.float32)
    for rank in range(ranks):
        mine = expert_range(rank, ranks, num_experts)
        here = (ids >= mine.start) & (ids < mine.stop)
        total = total + in_slot_order(rows.masked_fill(~here[:, :, None], 0)).to(rows.dtype)
    return total
