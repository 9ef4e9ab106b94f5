"""A step's rows become what the layer takes: fp8 tokens with their scales, and the experts of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import w4afp8
from moe_forward.expert_map import place_routes
from moe_forward.experts import Experts
from moe_forward.layer_forward import Room, TokenShape
from moe_forward.router import Router
from moe_forward.slab_rows import Run
from moe_forward.stopwatch import Clock
from moe_forward.types import Routing
from w4afp8 import Quantized


class Laid(NamedTuple):
    """What is known of rows that were laid down.

    requantized_tokens: rows that came with the other granularity of scales.
    missing_rows: [T] int64, routes to experts that the group lacks; None: it lacks none.
    """

    requantized_tokens: int
    missing_rows: Tensor | None


class _Routed(NamedTuple):
    """A run's experts. ids: [n, K] int64 or int32. weights: [n, K] float32. non_finite: [n] bool, None: none is."""

    ids: Tensor
    weights: Tensor
    non_finite: Tensor | None


class Intake:
    """Lays rows of any type into the room that a forward has for them.

    router: chooses experts for tokens that come without. experts: whose `quantize` makes tokens fp8. shape: of tokens.
    numbers: [E + 1] of `expert_map` where the group lacks experts, else None.
    """

    def __init__(self, router: Router, experts: Experts, shape: TokenShape, numbers: Tensor | None = None) -> None:
        self.router = router
        self.experts = experts
        self.shape = shape
        self.numbers = numbers

    def lay(self, layer: int, runs: list[Run], room: Room, clock: Clock) -> Laid:
        """Lay a step's runs into `room`, none of whose padding has an expert, and note rows with NaN or Inf."""
        with clock("quantize"):
            requantized_tokens = sum([self._quantize(run, room) for run in runs])
        with clock("route"):
            if not runs:
                room.ids.fill_(-1)
            for run in runs:
                self._route(layer, run, room, last=run is runs[-1])
            missing_rows = None
            if self.numbers is not None:
                placed = place_routes(room.ids, self.numbers)
                room.ids.copy_(placed.ids)
                missing_rows = placed.missing[: len(room.notes.non_finite)]
        return Laid(requantized_tokens, missing_rows)

    def warm_up(self) -> None:
        """Do what a first step would pay for."""
        self.router.warm_up()

    def _quantize(self, run: Run, room: Room) -> int:
        """Lay a run's tokens as fp8. Returns: how many came with the other granularity of scales."""
        rows = slice(run.first, run.first + run.tokens)
        laid, flags = Quantized(room.tokens.values[rows], room.tokens.scales[rows]), room.notes.non_finite[rows]
        if run.hidden_scales is None:
            self.experts.quantize(run.hidden, out=(laid, flags))
            return 0
        received = Quantized(run.hidden, run.hidden_scales)
        flags.copy_(w4afp8.check_quantized(received))
        tokens = w4afp8.zero_rows(received, flags)
        other = run.hidden_scales.shape[1] != self.shape.scale_columns
        if other:
            tokens = self._requantize(tokens)
        laid.values.view(torch.uint8).copy_(tokens.values.view(torch.uint8))
        laid.scales.copy_(tokens.scales)
        return run.tokens if other else 0

    def _requantize(self, tokens: Quantized) -> Quantized:
        """Give fp8 tokens this service's granularity; a token that exceeds float32 gets NaN scales."""
        quantized, overflowed = self.experts.quantize(w4afp8.dequantize_tokens(tokens))
        return Quantized(quantized.values, quantized.scales.masked_fill(overflowed.unsqueeze(1), torch.nan))

    def _route(self, layer: int, run: Run, room: Room, last: bool) -> None:
        """Lay a run's routes. last: the rows behind it are padding."""
        ids, weights, non_finite = self._routes(layer, run)
        behind = run.first + run.tokens
        rows = slice(run.first, None if last else behind)
        self.experts.pad_routes(ids, weights, room.ids[rows], room.weights[rows])
        if non_finite is not None:
            room.notes.non_finite[run.first : behind].logical_or_(non_finite)

    def _routes(self, layer: int, run: Run) -> _Routed:
        if run.routing == Routing.TOPK:
            assert run.chosen is not None
            assert run.weights is not None
            return _Routed(run.chosen, run.weights, None)
        if run.chosen is not None:
            return _Routed(*self.router.by_logits(layer, run.chosen))
        return _Routed(*self.router.by_hidden(layer, _floats(run)))


def _floats(run: Run) -> Tensor:
    """Return the hidden states [n, H] that a run stands for, in a float type that has all of their bits."""
    if run.hidden_scales is None:
        return run.hidden
    return w4afp8.dequantize_tokens(Quantized(run.hidden, run.hidden_scales))
