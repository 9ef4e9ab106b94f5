"""Tokens between GPU ranks over torch.distributed's NCCL, where DeepEP is not installed.

Every rank gets every token and picks its experts' rows itself: fixed sizes, so that nothing waits for the host and all
of it can be captured in a CUDA graph. Dispatch is one all-gather of one row of bytes a token: H bytes of e4m3, its
scales, its K expert ids (int32) and K routing weights. Back, each rank adds a token's local rows in slot order in
float32 and sends the sum in the rows' type, one all-to-all; the token's home adds the ranks' parts in rank order. So
the bits of a token depend on its ids and on how many ranks there are, on nothing else.

On CPU tensors the same runs over gloo.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_forward.exchange import gpu_checks
from moe_forward.exchange.base import Dispatched, Place, expected_rows, token_bytes
from moe_forward.exchange.group import join, leave
from moe_forward.exchange.rows import add_slots, expert_order, local_ids, take_bytes
from moe_forward.types import expert_range
from w4afp8 import Quantized

log = logging.getLogger(__name__)

ADDED_TOKENS = 4096
"""Tokens whose K rows are added at a time; bounds the memory of `combine`, never its bits."""


class _Handle(NamedTuple):
    positions: Tensor  # [ranks * T, K] row of each (token, slot), any row where it has none here
    elsewhere: Tensor  # [ranks * T, K] bool, slots that have no row here


class NcclExchange:
    """An `Exchange` over the process's default group. place: this rank's."""

    name = "nccl"
    pads = True

    def __init__(self, place: Place) -> None:
        if place.device.type == "cuda":
            _check_gpu(place)
        join(place)
        self._ranks = place.ranks
        self._num_experts = place.num_experts
        self._mine = expert_range(place.rank, place.ranks, place.num_experts)
        self._token_bytes = token_bytes(place.hidden_size, place.scale_columns, place.top_k)

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Send every token to every rank, and keep the rows of this rank's experts. See `Exchange.dispatch`."""
        count, slots = topk_ids.shape
        parts = (tokens.values, tokens.scales, topk_ids.int(), topk_weights)
        values, scales, ids, weights = _split(self._gather(_join(parts)), parts)
        experts = local_ids(ids, self._mine.start)
        order, offsets = expert_order(experts, len(self._mine))
        capacity = self._ranks * count * min(slots, len(self._mine))  # a token's ids are distinct
        source = order[:capacity] // slots
        rows = Quantized(take_bytes(values, source), scales[source])
        handle = _Handle(_inverse(order).view(ids.shape), experts >= len(self._mine))
        hint = expected_rows(self._ranks, count, slots, self._num_experts)
        return Dispatched(rows, offsets, weights.flatten()[order[:capacity]], hint, handle)

    def combine(self, rows: Tensor, handle: _Handle) -> Tensor:
        """Add each token's local rows, send the sums home and add them there. See `Exchange.combine`."""
        sums = _add_rows(rows, handle)
        arrived = torch.empty_like(sums)
        if sums.numel() > 0:  # the same on every rank
            dist.all_to_all_single(arrived.view(torch.uint8), sums.view(torch.uint8))
        by_rank = arrived.view(self._ranks, -1, arrived.shape[1])
        return add_slots(by_rank.transpose(0, 1))

    def count_bytes(self, rows: Tensor, handle: _Handle, out: Tensor) -> None:
        """Every token of every rank comes, padding too, and a sum goes back. See `Exchange.count_bytes`."""
        others = len(handle.positions) // self._ranks * (self._ranks - 1)
        out[0].fill_(others * self._token_bytes)  # known on the host, but a graph cannot copy from there
        out[1].fill_(others * rows.shape[1] * rows.element_size())

    def close(self) -> None:
        """Leave the process group."""
        leave()

    def _gather(self, packed: Tensor) -> Tensor:
        gathered = packed.new_empty(self._ranks * packed.shape[0], packed.shape[1])
        if packed.shape[0] > 0:  # the same on every rank
            dist.all_gather_into_tensor(gathered, packed)
        return gathered


def step_bytes(place: Place) -> int:
    """Return the most memory that one step of this rank takes, without what the experts take."""
    tokens = place.ranks * place.max_tokens
    capacity = tokens * min(place.top_k, len(expert_range(place.rank, place.ranks, place.num_experts)))
    slots = tokens * place.top_k
    row_bytes = place.hidden_size + 4 * place.scale_columns
    dispatched = tokens * (row_bytes + 8 * place.top_k) + capacity * (row_bytes + 4) + 5 * 8 * slots
    added = min(tokens, ADDED_TOKENS) * place.hidden_size * (2 * place.top_k + 4)
    return dispatched + added + 2 * 2 * tokens * place.hidden_size + 4 * place.max_tokens * place.hidden_size


def _check_gpu(place: Place) -> None:
    gpu_checks.use_device(place.device)
    if unreached := gpu_checks.check_peers(place.device, place.ranks):
        log.warning("%s: NCCL copies through the host's memory, several times slower", unreached)
    gpu_checks.warn_without_nvlink(place.device)
    what = f"exchange nccl with {place.max_tokens} tokens a rank"
    gpu_checks.check_memory(step_bytes(place), place.device, what)


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    """Put the rows of several [T, n] tensors side by side as bytes."""
    # Flat in between: the one column of a [T, 1] tensor may have any stride, and a change of type needs 1.
    flat = (part.reshape(-1).view(torch.uint8) for part in parts)
    widths = _row_bytes(parts)
    return torch.cat([part.view(-1, width) for part, width in zip(flat, widths, strict=True)], dim=1)


def _split(packed: Tensor, parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Take apart what `_join` made of rows like `parts`, without copying."""
    pieces = torch.split(packed, _row_bytes(parts), 1)
    return [piece.view(part.dtype) for piece, part in zip(pieces, parts, strict=True)]


def _row_bytes(parts: tuple[Tensor, ...]) -> list[int]:
    return [part.shape[1] * part.element_size() for part in parts]


def _add_rows(rows: Tensor, handle: _Handle) -> Tensor:
    """Add each token's rows on this rank in slot order: [ranks * T, H] of the rows' type."""
    if len(rows) == 0:  # a rank of more ranks than experts
        return rows.new_zeros(len(handle.positions), rows.shape[1])
    sums = rows.new_empty(len(handle.positions), rows.shape[1])
    parts = zip(*(torch.split(tensor, ADDED_TOKENS) for tensor in (sums, *handle)), strict=True)
    for part, positions, elsewhere in parts:
        contributions = rows[positions.clamp(max=len(rows) - 1)]
        part.copy_(add_slots(contributions.masked_fill_(elsewhere[:, :, None], 0)))
    return sums


def _inverse(order: Tensor) -> Tensor:
    """Return where each position of a permutation went."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places
