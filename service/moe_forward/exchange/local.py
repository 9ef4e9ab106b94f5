"""One rank that holds every expert: nothing moves. The oracle of the other exchanges."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_forward.exchange.base import Dispatched, expected_rows
from moe_forward.exchange.rows import add_slots, expert_order, local_ids, take_bytes
from w4afp8 import Quantized


class _Handle(NamedTuple):
    order: Tensor  # [R] rows as flat positions in [T, K]
    nowhere: Tensor  # [T, K] bool, slots of no expert


class LocalExchange:
    """An `Exchange` of one rank.

    num_experts: E. pads: leave R at T * K, as it must be on CUDA, where the device alone knows the exact number.
    """

    name = "local"

    def __init__(self, num_experts: int, pads: bool = False) -> None:
        self.pads = pads
        self._num_experts = num_experts

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Repeat each token for each of its experts, grouped by expert. See `Exchange.dispatch`."""
        count, slots = topk_ids.shape
        order, offsets = expert_order(local_ids(topk_ids, 0), self._num_experts)
        if not self.pads:
            order = order[: int(offsets[-1])]
        source = order // slots
        rows = Quantized(take_bytes(tokens.values, source), tokens.scales[source])
        hint = expected_rows(1, count, slots, self._num_experts)
        return Dispatched(rows, offsets, topk_weights.flatten()[order], hint, _Handle(order, topk_ids < 0))

    def combine(self, rows: Tensor, handle: _Handle) -> Tensor:
        """Add each token's rows. See `Exchange.combine`."""
        contributions = rows.new_empty(*handle.nowhere.shape, rows.shape[1])
        contributions.flatten(0, 1)[handle.order] = rows
        return add_slots(contributions.masked_fill_(handle.nowhere[:, :, None], 0))

    def count_bytes(self, rows: Tensor, handle: _Handle, out: Tensor) -> None:
        """Nothing moves. See `Exchange.count_bytes`."""
        out.zero_()

    def close(self) -> None:
        """Nothing to leave."""
