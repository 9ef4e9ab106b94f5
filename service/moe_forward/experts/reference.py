"""Experts in torch, on any device: `w4afp8.portable`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_forward.experts.base import LayerExperts, PhaseClock, check_granularity, held_layer
from w4afp8 import Granularity, Quantized, portable, quantize_tokens
from w4afp8.activations import quantize_intermediate


class ReferenceExperts:
    """Computes a rank's experts with the portable GEMMs.

    layers: layer id -> this rank's weights, on the device to compute on.
    granularity: of the activation scales, on the way in and between the GEMMs.
    """

    capturable = False  # the rows of an expert are read on the host

    def __init__(self, layers: Mapping[int, LayerExperts], granularity: Granularity) -> None:
        self._layers = layers
        self._granularity = granularity

    def quantize(
        self, x: torch.Tensor, out: tuple[Quantized, torch.Tensor] | None = None
    ) -> tuple[Quantized, torch.Tensor]:
        """See `Experts.quantize`."""
        tokens, non_finite = quantize_tokens(x, self._granularity)
        if out is None:
            return tokens, non_finite
        laid, flags = out
        laid.values.view(torch.uint8).copy_(tokens.values.view(torch.uint8))
        laid.scales.copy_(tokens.scales)
        return laid, flags.copy_(non_finite)

    def pad_routes(
        self, ids: torch.Tensor, weights: torch.Tensor, out_ids: torch.Tensor, out_weights: torch.Tensor
    ) -> None:
        """See `Experts.pad_routes`."""
        out_ids[: len(ids)].copy_(ids)
        out_ids[len(ids) :].fill_(-1)
        out_weights[: len(ids)].copy_(weights)

    def forward(
        self,
        layer: int,
        rows: Quantized,
        offsets: torch.Tensor,
        row_weights: torch.Tensor,
        expected_rows: int,
        clock: PhaseClock,
    ) -> torch.Tensor:
        """See `Experts.forward`."""
        experts = held_layer(self._layers, layer).experts
        check_granularity(rows, self._granularity)
        capacity, used = rows.values.shape[0], int(offsets[-1])
        rows = Quantized(rows.values[:used], rows.scales[:used])
        if experts:
            with clock("gemm1"):
                gate = portable.grouped_gemm(rows, offsets, [expert.gate for expert in experts], None)
                up = portable.grouped_gemm(rows, offsets, [expert.up for expert in experts], None)
            with clock("activation"):
                hidden = quantize_intermediate(portable.silu_mul(gate, up), self._granularity)
            with clock("gemm2"):
                weights = row_weights[:used]
                y = portable.grouped_gemm(hidden, offsets, [expert.down for expert in experts], weights)
        else:  # a rank of more ranks than experts
            y = torch.empty(rows.values.shape, dtype=torch.float32, device=rows.values.device)
        dtype = torch.bfloat16 if y.is_cuda else torch.float32
        if used == capacity:
            return y.to(dtype)
        whole = torch.empty(capacity, y.shape[1], dtype=dtype, device=y.device)
        whole[:used] = y
        return whole

    def shared(self, layer: int, rows: Quantized) -> torch.Tensor:
        """See `Experts.shared`."""
        expert = held_layer(self._layers, layer).shared
        if expert is None:
            raise ValueError(f"layer: {layer} has no shared expert")
        check_granularity(rows, self._granularity)
        activated = portable.silu_mul(portable.gemm(rows, expert.gate), portable.gemm(rows, expert.up))
        return portable.gemm(quantize_intermediate(activated, self._granularity), expert.down)
