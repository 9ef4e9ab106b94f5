"""Tokens between CPU ranks over torch.distributed's gloo backend, fp8 and scales on the wire.

A token travels once to each rank that holds one of its experts: H bytes of e4m3, its scales, and K pairs of (local
expert or -1, routing weight), packed into one row of bytes so that a dispatch is two collectives (counts, rows).
Gloo knows no float8 (it raises "Invalid scalar type"), so everything travels as uint8. Contributions come back one
row a (token, slot) in float32 and are added at home in slot order: the sum does not depend on how many ranks there
are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_forward.exchange.base import Dispatched, Place, expected_rows
from moe_forward.exchange.group import join, leave
from moe_forward.exchange.rows import add_slots, expert_order, local_ids, take_bytes
from moe_forward.types import expert_range
from w4afp8 import Quantized


class _Handle(NamedTuple):
    order: Tensor  # [R] my experts' rows as flat positions in [received tokens, K], by expert
    return_counts: list[int]  # rows I owe each rank
    home_slots: Tensor  # [returned] flat positions in [T, K] of the rows that come back, in their order
    home_counts: list[int]  # rows each rank owes me
    tokens: int
    slots: int
    dispatch_bytes: int  # that came from other ranks


class GlooExchange:
    """An `Exchange` over the process's default group. place: this rank's; its shapes are taken from what is sent."""

    name = "gloo"
    pads = False

    def __init__(self, place: Place) -> None:
        join(place)
        rank, ranks, num_experts = place.rank, place.ranks, place.num_experts
        self._rank = rank
        self._ranks = ranks
        self._num_experts = num_experts
        self._local_experts = len(expert_range(rank, ranks, num_experts))
        firsts = [expert_range(other, ranks, num_experts).start for other in range(ranks)]
        self._firsts = torch.tensor(firsts)
        self._boundaries = self._firsts[1:].contiguous()

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Send tokens to the ranks of their experts. See `Exchange.dispatch`."""
        slots = topk_ids.shape[1]
        found = torch.bucketize(topk_ids.contiguous(), self._boundaries, right=True)
        owner = torch.where(topk_ids < 0, self._ranks, found)  # [T, K] rank of each slot's expert, `ranks` for none
        goes = torch.zeros(len(topk_ids), self._ranks + 1, dtype=torch.bool).scatter_(1, owner, True)
        target, token = torch.nonzero(goes[:, :-1].T, as_tuple=True)  # copies to send, by rank, then token
        there = owner[token] == target[:, None]  # [copies, K] slots that the receiver computes
        sought = torch.where(there, topk_ids[token] - self._firsts[target][:, None], -1).int()

        outgoing = torch.bincount(target, minlength=self._ranks)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing)
        parts = (take_bytes(tokens.values, token), tokens.scales[token], sought, topk_weights[token])
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        received = torch.empty(int(incoming.sum()), packed.shape[1], dtype=torch.uint8)
        dist.all_to_all_single(received, packed, incoming.tolist(), outgoing.tolist())

        widths = [part.shape[1] * part.element_size() for part in parts]
        pieces = torch.split(received, widths, 1)
        values, scales, ids, weights = (
            piece.contiguous().view(part.dtype) for piece, part in zip(pieces, parts, strict=True)
        )
        order, offsets = expert_order(local_ids(ids, 0), self._local_experts)
        order = order[: int(offsets[-1])]
        copy = order // slots
        handle = _Handle(
            order=order,
            return_counts=_sum_blocks((ids >= 0).sum(1), incoming),
            home_slots=(token[:, None] * slots + torch.arange(slots))[there],
            home_counts=_sum_blocks(there.sum(1), outgoing),
            tokens=len(topk_ids),
            slots=slots,
            dispatch_bytes=(len(received) - int(incoming[self._rank])) * packed.shape[1],
        )
        rows = Quantized(take_bytes(values, copy), scales[copy])
        hint = expected_rows(self._ranks, len(topk_ids), slots, self._num_experts)
        return Dispatched(rows, offsets, weights.flatten()[order], hint, handle)

    def combine(self, rows: Tensor, handle: _Handle) -> Tensor:
        """Return rows to the ranks of their tokens and add them there. See `Exchange.combine`."""
        by_position = rows[torch.argsort(handle.order)]  # by source rank, then token and slot
        returned = torch.empty(sum(handle.home_counts), rows.shape[1])
        dist.all_to_all_single(returned, by_position, handle.home_counts, handle.return_counts)
        contributions = torch.zeros(handle.tokens * handle.slots, rows.shape[1])
        contributions[handle.home_slots] = returned
        return add_slots(contributions.view(handle.tokens, handle.slots, rows.shape[1]))

    def count_bytes(self, rows: Tensor, handle: _Handle, out: Tensor) -> None:
        """A token came once, and a row goes back for each of its slots. See `Exchange.count_bytes`."""
        returned = sum(handle.return_counts) - handle.return_counts[self._rank]
        out[0], out[1] = handle.dispatch_bytes, returned * rows.shape[1] * rows.element_size()

    def close(self) -> None:
        """Leave the process group."""
        leave()


def _sum_blocks(values: Tensor, sizes: Tensor) -> list[int]:
    """Sum consecutive blocks of `values` of the given sizes."""
    ends = torch.cumsum(sizes, 0)
    total = torch.cat([values.new_zeros(1), torch.cumsum(values, 0)])
    sums: list[int] = (total[ends] - total[ends - sizes]).tolist()
    return sums
