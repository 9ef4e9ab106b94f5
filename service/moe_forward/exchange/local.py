"""One rank that holds every expert: nothing moves. The oracle of the other exchanges."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_forward.exchange.base import Dispatched
from moe_forward.exchange.rows import add_slots, expert_order, take_bytes
from w4afp8 import Quantized


class _Handle(NamedTuple):
    order: Tensor
    tokens: int
    slots: int


class LocalExchange:
    """An `Exchange` of one rank. num_experts: E."""

    name = "local"

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Repeat each token for each of its experts, grouped by expert. See `Exchange.dispatch`."""
        order, offsets = expert_order(topk_ids, self._num_experts)
        slots = topk_ids.shape[1]
        source = order // slots
        rows = Quantized(take_bytes(tokens.values, source), tokens.scales[source])
        handle = _Handle(order, topk_ids.shape[0], slots)
        return Dispatched(rows, offsets, topk_weights.flatten()[order], handle)

    def combine(self, rows: Tensor, handle: _Handle) -> Tensor:
        """Add each token's rows. See `Exchange.combine`."""
        contributions = rows.new_zeros(handle.tokens * handle.slots, rows.shape[1])
        contributions[handle.order] = rows
        return add_slots(contributions.view(handle.tokens, handle.slots, rows.shape[1]))

    def close(self) -> None:
        """Nothing to leave."""
