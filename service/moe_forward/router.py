"""Which experts the server chooses for tokens that come without: a layer's router, and the gate behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moe_forward import gates
from moe_forward.checkpoint import LayerWeights
from moe_forward.types import ModelSpec
from w4afp8.linear import SlicedWeight, linear, slice_weight
from w4afp8.routing import Chosen, choose_experts_cuda, fits, route_cuda

# The BLAS has another kernel for another size, and loads it when it is first called.
_WARM_UP_TOKENS = (1, 8, 32, 64, 128, 256, 512)


class RouterWeights(NamedTuple):
    """A layer's router on the device.

    projection: [E, H], cut for products whose bits do not depend on the batch. bias: [E] float32 correction, or None.
    """

    projection: SlicedWeight
    bias: Tensor | None


class Routes(NamedTuple):
    """Experts chosen for tokens.

    ids: [T, K] int64. weights: [T, K] float32. non_finite: [T] bool, tokens whose logits are not finite.
    """

    ids: Tensor
    weights: Tensor
    non_finite: Tensor

    def first(self, tokens: int) -> Routes:
        """Return those of the first tokens."""
        return Routes(self.ids[:tokens], self.weights[:tokens], self.non_finite[:tokens])


def no_routes(tokens: int, top_k: int, device: torch.device) -> Routes:
    """Make room for routes."""
    return Routes(
        torch.zeros(tokens, top_k, dtype=torch.int64, device=device),
        torch.zeros(tokens, top_k, device=device),
        torch.zeros(tokens, dtype=torch.bool, device=device),
    )


class Router:
    """Routes tokens of every served layer; the bits of a token's route depend on nothing beside it.

    On a GPU by the kernels of `w4afp8.routing`, with the bits of torch; in torch where the gate has no kernel
    (`gates.KERNELS`), or the layer has more experts, groups or experts a token than the kernel can hold.

    layers: whose gate weights are copied to `device`. spec: its gate, K and E.
    """

    def __init__(self, spec: ModelSpec, layers: Mapping[int, LayerWeights], device: torch.device) -> None:
        self.spec = spec
        self.device = device
        rule = gates.kernel_rule(spec.gate, spec.top_k)
        fused = device.type == "cuda" and rule is not None and fits(rule, spec.num_experts)
        self._kernel = rule if fused else None
        self._weights = {
            layer: RouterWeights(
                slice_weight(held.gate_weight.to(device)),
                None if held.gate_bias is None else held.gate_bias.to(device),
            )
            for layer, held in layers.items()
        }

    def by_hidden(self, layer: int, hidden: Tensor, out: Routes | None = None) -> Routes:
        """Route by hidden states [T, H] in any float type. out: to write into; None: new tensors."""
        weights = self._weights[layer]
        if self._kernel is not None:
            into = None if out is None else Chosen(*out)
            return Routes(*route_cuda(hidden, weights.projection, weights.bias, self._kernel, into))
        routes = route_hidden(self.spec, weights, hidden.float())
        if out is None:
            return routes
        return Routes(*(held.copy_(made) for held, made in zip(out, routes, strict=True)))

    def by_logits(self, layer: int, logits: Tensor) -> Routes:
        """Route by the client's own router logits [T, E] in any float type."""
        weights = self._weights[layer]
        if self._kernel is None:
            return route_logits(self.spec, weights, logits.float())
        return Routes(*choose_experts_cuda(logits, weights.bias, self._kernel))

    def warm_up(self) -> None:
        """Route a few tokens, so that the first request pays for no first call."""
        layer = self.spec.layers[0]
        for tokens in (2,) if self._kernel is None else _WARM_UP_TOKENS:
            self.by_hidden(layer, torch.zeros(tokens, self.spec.hidden_size, device=self.device))
        self.by_logits(layer, torch.zeros(2, self.spec.num_experts, device=self.device))


def route_hidden(spec: ModelSpec, weights: RouterWeights, hidden: Tensor) -> Routes:
    """Choose experts by hidden states [T, H] float32 and a router, in torch."""
    return route_logits(spec, weights, linear(hidden, weights.projection))


def route_logits(spec: ModelSpec, weights: RouterWeights, logits: Tensor) -> Routes:
    """Choose experts by router logits [T, E] float32 and the layer's bias, in torch."""
    ids, chosen = gates.choose(spec.gate, spec.top_k, logits, weights.bias)
    return Routes(ids, chosen, ~torch.isfinite(logits).all(1))
