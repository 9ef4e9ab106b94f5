"""Requests for steps on GPUs, the steps they make, and what their outputs must be; small enough to try on a CPU too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from moe_forward import gates
from moe_forward.checkpoint import LayerWeights
from moe_forward.types import DType, ForwardRequest, GateSpec, ModelSpec, Routing, Step
from w4afp8 import (
    ExpertWeights,
    Fp8BlockWeight,
    Int4Weight,
    SharedExpert,
    dequantize_tokens,
    portable,
    quantize_fp8_block,
    quantize_int4,
    quantize_tokens,
    reference,
)

from .desk import TORCH, Desk

LAYER = 3


@dataclass(frozen=True)
class Shape:
    """H, I, E, K of a small model; tokens per rank of the steps whose numbers are checked."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    sizes: tuple[int, ...]
    repetitions: int

    @property
    def spec(self) -> ModelSpec:
        gate = GateSpec("deepseek_v3", 4, 2, True, 2.5)
        return ModelSpec(
            "gpu", self.hidden, self.intermediate, self.experts, self.top_k, self.intermediate, (LAYER, 5), 128, gate
        )


ON_GPU = Shape(1024, 512, 16, 4, sizes=(1, 3, 16, 100, 128, 513, 4096), repetitions=200)
ON_CPU = Shape(256, 128, 16, 4, sizes=(1, 3, 20), repetitions=3)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def make_layers(shape: Shape) -> dict[int, LayerWeights]:
    """Make random weights with all experts."""

    def matrix(rows: int, columns: int, seed: int) -> Tensor:
        return random(rows, columns, seed=seed) * columns**-0.5

    def layer(number: int) -> LayerWeights:
        inner, hidden, seed = shape.intermediate, shape.hidden, 10_000 * number
        sizes = [(inner, hidden), (inner, hidden), (hidden, inner)]
        routed = tuple(
            ExpertWeights(*(quantize_int4(matrix(*size, seed + 3 * expert + part)) for part, size in enumerate(sizes)))
            for expert in range(shape.experts)
        )
        shared = SharedExpert(
            *(quantize_fp8_block(matrix(*size, seed + 9000 + part)) for part, size in enumerate(sizes))
        )
        router = random(shape.experts, hidden, seed=seed + 1) * hidden**-0.5
        return LayerWeights(routed, shared, router, random(shape.experts, seed=seed + 2) * 0.1)

    return {number: layer(number) for number in shape.spec.layers}


@dataclass
class Sent:
    """A request and what it was made of: hidden as sent (dequantized where it was fp8), its routes' ids and weights."""

    request: ForwardRequest
    hidden: Tensor
    ids: Tensor
    weights: Tensor


@dataclass
class Traffic:
    """Steps over a slab. ranks: that will do them."""

    shape: Shape
    ranks: int
    desk: Desk
    steps: list[Step] = field(default_factory=list)

    def send(
        self,
        tokens: int,
        seed: int,
        dtype: DType = DType.BF16,
        routing: Routing = Routing.TOPK,
        shared: bool = True,
        ids: Tensor | None = None,
        scales: str = "token",
        spoil: bool = False,
    ) -> Sent:
        """Lay a request down. ids: [T, K], default at random. spoil: put a NaN into the last token."""
        spec, desk = self.shape.spec, self.desk
        hidden = random(tokens, spec.hidden_size, seed=seed)
        if spoil:
            hidden[-1, 7] = torch.nan
        hidden_scales, as_sent = None, hidden.to(TORCH[dtype])
        if dtype == DType.F8_E4M3:
            quantized = quantize_tokens(hidden, "token" if scales == "token" else "token_group")[0]
            hidden, as_sent = dequantize_tokens(quantized), quantized.values
            hidden_scales = desk.put(quantized.scales, DType.F32)
        else:
            hidden = as_sent.float()
        logits = portable.linear(hidden.nan_to_num(), make_layers(self.shape)[LAYER].gate_weight)
        chosen, weighted = None, None
        if routing == Routing.TOPK:
            if ids is None:
                generator = torch.Generator().manual_seed(seed)
                ids = torch.rand(tokens, spec.num_experts, generator=generator).topk(spec.top_k, dim=1).indices
            weights = random(tokens, spec.top_k, seed=seed + 1).abs() + 0.1
            chosen, weighted = desk.put(ids, DType.I32 if seed % 2 else DType.I64), desk.put(weights, DType.F32)
        else:
            ids, weights = gates.choose(spec.gate, spec.top_k, logits, make_layers(self.shape)[LAYER].gate_bias)
            if routing == Routing.LOGITS:
                chosen = desk.put(logits, DType.F32)
        output = desk.reserve(tokens, spec.hidden_size, DType.BF16 if dtype == DType.F8_E4M3 else dtype)
        sent = desk.put(as_sent, dtype)
        request = ForwardRequest(
            0, seed, LAYER, tokens, 1e9, shared, sent, hidden_scales, routing, chosen, weighted, output
        )
        return Sent(request, hidden, ids, weights)

    def again(self, sent: Sent) -> Sent:
        """The same request with another place for its output."""
        output = self.desk.reserve(sent.request.tokens, self.shape.hidden, sent.request.output.dtype)
        return replace(sent, request=sent.request._replace(output=output))

    def step(self, *sent: Sent) -> int:
        """Add a step of these requests; returns its number."""
        number = len(self.steps)
        self.steps.append(Step(number, 1, LAYER, tuple(item.request for item in sent)))
        return number

    def output(self, sent: Sent) -> Tensor:
        return self.desk.get(sent.request.output, sent.request.tokens)

    def same_bits(self, left: Sent, right: Sent) -> bool:
        one, other = self.output(left), self.output(right)
        return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    def error(self, sent: Sent, device: torch.device) -> float:
        """Return the relative error of a finished request against the specification in float64."""
        layer = layers_on(self.shape, device)[LAYER]
        hidden, ids, weights = (tensor.to(device) for tensor in (sent.hidden, sent.ids, sent.weights))
        shared = layer.shared if sent.request.shared_experts else None
        exact = reference.moe_layer(hidden, ids, weights, layer.experts, shared, "token", torch.float64)
        return float((self.output(sent).to(device).double() - exact).norm() / exact.norm())


@cache
def layers_on(shape: Shape, device: torch.device) -> dict[int, LayerWeights]:
    """Return the weights on a device."""

    def int4(weight: Int4Weight) -> Int4Weight:
        return Int4Weight(*(tensor.to(device) for tensor in weight))

    def fp8(weight: Fp8BlockWeight) -> Fp8BlockWeight:
        return Fp8BlockWeight(*(tensor.to(device) for tensor in weight))

    moved = {}
    for number, layer in make_layers(shape).items():
        assert layer.shared is not None
        routed = tuple(ExpertWeights(*(int4(matrix) for matrix in expert)) for expert in layer.experts)
        shared = SharedExpert(*(fp8(matrix) for matrix in layer.shared))
        moved[number] = replace(layer, experts=routed, shared=shared)
    return moved
