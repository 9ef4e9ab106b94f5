"""An MoE block with the numbers of a quantized format, computed by plain float32 matrix products.

Codes times scales and e4m3 values times scales are float32, so that only the order of additions, and the few e4m3
roundings between the GEMMs that this tips over, lie between this and the specification `w4afp8.reference`. The gate is
the service's own: `moe_forward.router`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe_forward.checkpoint import LayerWeights
from moe_forward.router import RouterWeights, Routes, route_hidden
from moe_forward.types import ModelSpec
from w4afp8 import (
    ExpertWeights,
    Fp8BlockWeight,
    Granularity,
    Int4Weight,
    SharedExpert,
    dequantize_fp8_block,
    dequantize_int4,
    dequantize_tokens,
    quantize_fp8_block,
    quantize_tokens,
    reference,
)
from w4afp8.activations import quantize_intermediate
from w4afp8.linear import slice_weight

Weight = TypeVar("Weight", Int4Weight, Fp8BlockWeight)


@dataclass(frozen=True)
class FloatExpert:
    """One expert, routed or shared. gate, up: [I, H] float32. down: [H, I] float32."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """What an MoE block computes with, on one device.

    experts: in id order. shared: the shared expert. router: the gate.
    quantized: experts and shared expert as they are stored; None where they are not quantized.
    """

    spec: ModelSpec
    experts: Sequence[FloatExpert]
    shared: FloatExpert
    router: RouterWeights
    quantized: tuple[Sequence[Any], SharedExpert] | None


def served_weights(spec: ModelSpec, held: LayerWeights, device: torch.device) -> BlockWeights:
    """Take a layer of a quantized checkpoint, as the service loads it."""
    if held.shared is None:
        raise ValueError("layer: expected a shared expert, got none")
    experts = [ExpertWeights(*(_moved(weight, device) for weight in expert)) for expert in held.experts]
    shared = SharedExpert(*(_moved(weight, device) for weight in held.shared))
    bias = None if held.gate_bias is None else held.gate_bias.to(device)
    return BlockWeights(
        spec,
        [FloatExpert(*map(dequantize_int4, expert)) for expert in experts],
        FloatExpert(*map(dequantize_fp8_block, shared)),
        RouterWeights(slice_weight(held.gate_weight.to(device)), bias),
        (experts, shared),
    )


def own_weights(spec: ModelSpec, block: Any, fp8: bool) -> BlockWeights:
    """Take the weights of a block of transformers.

    fp8: quantize all experts to e4m3 in blocks of 128 x 128, else leave them as they are.
    """
    experts = []
    for gate_up, down in zip(block.experts.gate_up_proj.detach(), block.experts.down_proj.detach(), strict=True):
        experts.append(FloatExpert(*(weight.float() for weight in (*gate_up.chunk(2), down))))
    parts = (block.shared_experts.gate_proj, block.shared_experts.up_proj, block.shared_experts.down_proj)
    shared = FloatExpert(*(part.weight.detach().float() for part in parts))
    router = RouterWeights(
        slice_weight(block.gate.weight.detach().float()), block.gate.e_score_correction_bias.detach().float()
    )
    if not fp8:
        return BlockWeights(spec, experts, shared, router, None)
    small = [SharedExpert(*map(quantize_fp8_block, (each.gate, each.up, each.down))) for each in (*experts, shared)]
    floats = [FloatExpert(*map(dequantize_fp8_block, each)) for each in small]
    return BlockWeights(spec, floats[:-1], floats[-1], router, (small[:-1], small[-1]))


class QuantizedBlock(nn.Module):
    """An MoE block. weights: of the layer. activations: granularity of the e4m3 scales; None: not quantized."""

    def __init__(self, weights: BlockWeights, activations: Granularity | None) -> None:
        super().__init__()
        self.weights = weights
        self.activations = activations

    @property
    def has_specification(self) -> bool:
        """Whether `exact` has something to compute: weights and activations are both quantized."""
        return self.weights.quantized is not None and self.activations is not None

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., H]. Returns: the same shape and type."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.output(rows, self.route(rows)).to(hidden_states.dtype).view(hidden_states.shape)

    def route(self, rows: Tensor) -> Routes:
        """Choose experts for tokens [T, H] as the service does."""
        return route_hidden(self.weights.spec, self.weights.router, rows.float())

    def output(self, rows: Tensor, routes: Routes) -> Tensor:
        """Pass routed tokens [T, H] through their experts and the shared one. Returns: [T, H] float32."""
        tokens = rows.float()
        if self.activations is not None:
            tokens = dequantize_tokens(quantize_tokens(rows, self.activations)[0])
        top_k = routes.ids.shape[1]
        order = routes.ids.flatten().argsort(stable=True)
        counts = torch.bincount(routes.ids.flatten(), minlength=len(self.weights.experts)).tolist()
        gathered = tokens[order // top_k].split(counts)
        outputs = [self._expert(part, expert) for part, expert in zip(gathered, self.weights.experts, strict=True)]
        routed = torch.empty(len(order), rows.shape[1], dtype=torch.float32, device=rows.device)
        routed[order] = torch.cat(outputs)
        routed = routed.view(len(rows), top_k, -1) * routes.weights.unsqueeze(2)
        total = torch.zeros_like(tokens)
        for slot in range(top_k):
            total += routed[:, slot]
        return total + self._expert(tokens, self.weights.shared)

    def exact(self, rows: Tensor, routes: Routes) -> Tensor:
        """Compute the specification for routed tokens [T, H] of floats. Returns: [T, H] float64.

        Raises: ValueError for weights or activations that are not quantized: there is no specification of them.
        """
        if self.weights.quantized is None or self.activations is None:
            raise ValueError("format: expected quantized weights and activations")
        experts, shared = self.weights.quantized
        return reference.moe_layer(rows, routes.ids, routes.weights, experts, shared, self.activations, torch.float64)

    def _expert(self, tokens: Tensor, expert: FloatExpert) -> Tensor:
        hidden = reference.silu_mul(tokens @ expert.gate.T, tokens @ expert.up.T)
        if self.activations is not None:
            hidden = dequantize_tokens(quantize_intermediate(hidden, self.activations))
        return hidden @ expert.down.T


def _moved(weight: Weight, device: torch.device) -> Weight:
    return type(weight)(*(tensor.to(device) for tensor in weight))
