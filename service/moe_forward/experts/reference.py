"""Experts in torch, on any device: `w4afp8.portable`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_forward.experts.base import LayerExperts, PhaseClock
from w4afp8 import Granularity, Quantized, portable
from w4afp8.activations import quantize_intermediate, scale_columns


class ReferenceExperts:
    """Computes a rank's experts with the portable GEMMs.

    layers: layer id -> this rank's weights, which stay where they are.
    granularity: of the activation scales, on the way in and between the GEMMs.
    """

    def __init__(self, layers: Mapping[int, LayerExperts], granularity: Granularity) -> None:
        self._layers = layers
        self._granularity = granularity

    def forward(
        self, layer: int, rows: Quantized, offsets: torch.Tensor, row_weights: torch.Tensor, clock: PhaseClock
    ) -> torch.Tensor:
        """See `Experts.forward`."""
        experts = self._layer(layer).experts
        self._check_granularity(rows)
        if not experts and rows.values.shape[0] == 0:  # a rank of more ranks than experts
            return torch.empty(rows.values.shape, dtype=torch.float32, device=rows.values.device)
        with clock("gemm1"):
            gate = portable.grouped_gemm(rows, offsets, [expert.gate for expert in experts], None)
            up = portable.grouped_gemm(rows, offsets, [expert.up for expert in experts], None)
        with clock("activation"):
            hidden = quantize_intermediate(portable.silu_mul(gate, up), self._granularity)
        with clock("gemm2"):
            return portable.grouped_gemm(hidden, offsets, [expert.down for expert in experts], row_weights)

    def shared(self, layer: int, rows: Quantized) -> torch.Tensor:
        """See `Experts.shared`."""
        expert = self._layer(layer).shared
        if expert is None:
            raise ValueError(f"layer: {layer} has no shared expert")
        self._check_granularity(rows)
        activated = portable.silu_mul(portable.gemm(rows, expert.gate), portable.gemm(rows, expert.up))
        return portable.gemm(quantize_intermediate(activated, self._granularity), expert.down)

    def _layer(self, layer: int) -> LayerExperts:
        found = self._layers.get(layer)
        if found is None:
            raise ValueError(f"layer: expected one of {sorted(self._layers)[:70]}, got {layer}")
        return found

    def _check_granularity(self, rows: Quantized) -> None:
        expected = scale_columns(rows.values.shape[1], self._granularity)
        if rows.scales.shape[1] != expected:
            raise ValueError(
                f"rows: expected {expected} scales a token for granularity {self._granularity}, "
                f"got {rows.scales.shape[1]}"
            )
