"""What a rank asks of the code that computes its experts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from w4afp8 import ExpertWeights, Quantized, SharedExpert


class LayerExperts(NamedTuple):
    """One rank's weights of one layer.

    experts: this rank's routed experts, in id order. shared: the layer's shared expert, or None.
    """

    experts: Sequence[ExpertWeights]
    shared: SharedExpert | None


class PhaseClock(Protocol):
    """Times the parts of a step: `with clock("gemm1"): ...`."""

    def __call__(self, phase: str, /) -> AbstractContextManager[None]:
        """Start timing `phase`, one of `moe_forward.types.PHASES`, until the block ends."""
        ...


class Experts(Protocol):
    """The experts of one rank on one device; the same row gives the same bits in any batch."""

    def forward(
        self, layer: int, rows: Quantized, offsets: torch.Tensor, row_weights: torch.Tensor, clock: PhaseClock
    ) -> torch.Tensor:
        """Pass each row through its expert.

        layer: id of an MoE layer this rank holds.
        rows: [rows, H] in the service's granularity, the rows of local expert e at offsets[e] to offsets[e + 1].
        offsets: [E_local+1] int64 on the rows' device, ascending, from 0 to rows.
        row_weights: [rows] float32, routing weights.
        clock: times the phases gemm1, activation and gemm2.
        Returns: [rows, H] float32, times the routing weight; NaN where a row overflowed float32 between the GEMMs.
        Raises: ValueError for a layer this rank does not hold, or arguments that do not fit.
        """
        ...

    def shared(self, layer: int, rows: Quantized) -> torch.Tensor:
        """Pass tokens through the layer's shared expert.

        layer: id of an MoE layer with a shared expert. rows: [T, H] in the service's granularity.
        Returns: [T, H] float32.
        Raises: ValueError for a layer without one, or rows that do not fit.
        """
        ...
