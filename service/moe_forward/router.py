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


class Router:
    """Routes tokens of every served layer; the bits of a token's route depend on nothing beside it.

    layers: whose gate weights are copied to `device`. spec: its gate, K and E.
    """

    def __init__(self, spec: ModelSpec, layers: Mapping[int, LayerWeights], device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._weights = {
            layer: RouterWeights(
                slice_weight(held.gate_weight.to(device)),
                None if held.gate_bias is None else held.gate_bias.to(device),
            )
            for layer, held in layers.items()
        }

    def weights(self, layer: int) -> RouterWeights:
        """Return a layer's weights."""
        return self._weights[layer]

    def by_hidden(self, layer: int, hidden: Tensor) -> Routes:
        """Route by hidden states [T, H] in any float type."""
        return route_hidden(self.spec, self._weights[layer], hidden.float())

    def by_logits(self, layer: int, logits: Tensor) -> Routes:
        """Route by the client's own router logits [T, E] in any float type."""
        return route_logits(self.spec, self._weights[layer], logits.float())

    def warm_up(self) -> None:
        """Route a few tokens, so that the first request pays for no first call."""
        self.by_hidden(self.spec.layers[0], torch.zeros(2, self.spec.hidden_size, device=self.device))


def route_hidden(spec: ModelSpec, weights: RouterWeights, hidden: Tensor) -> Routes:
    """Choose experts by hidden states [T, H] float32 and a router."""
    return route_logits(spec, weights, linear(hidden, weights.projection))


def route_logits(spec: ModelSpec, weights: RouterWeights, logits: Tensor) -> Routes:
    """Choose experts by router logits [T, E] float32 and the layer's bias."""
    ids, chosen = gates.choose(spec.gate, spec.top_k, logits, weights.bias)
    return Routes(ids, chosen, ~torch.isfinite(logits).all(1))
