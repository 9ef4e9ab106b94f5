"""Outlier channels at the experts' input, made without changing what the model computes.

Some channels of the norm before an MoE block are multiplied by a factor, and the columns that read them, of the gate,
the routed and the shared experts, divided by it. The function is the same; with a power of two, every bit of it. What
changes is what quantization sees: a few channels of activations that dwarf the others, read by weights that the others
dwarf.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from model import moe_blocks
from recipe import Recipe
from torch import Tensor


@torch.no_grad()
def with_outliers(model: Any, recipe: Recipe) -> Any:
    """Copy a model and give every MoE block's input its outlier channels."""
    changed = copy.deepcopy(model)
    for layer, block in moe_blocks(changed).items():
        channels = outlier_channels(recipe, layer)
        changed.model.layers[layer].post_attention_layernorm.weight[channels] *= recipe.outlier_factor
        shared = block.shared_experts
        for weight in (block.gate.weight, block.experts.gate_up_proj, shared.gate_proj.weight, shared.up_proj.weight):
            weight[..., channels] /= recipe.outlier_factor
    return changed


def outlier_channels(recipe: Recipe, layer: int) -> Tensor:
    """Draw the channels of a layer: [outlier_channels] int64."""
    generator = torch.Generator().manual_seed(recipe.seed + layer)
    return torch.randperm(recipe.hidden_size, generator=generator)[: recipe.outlier_channels]


def channel_spread(rows: Tensor) -> float:
    """Largest magnitude of the largest channel over that of the median one. rows: [T, H]."""
    largest = rows.float().abs().amax(dim=0)
    return float(largest.max() / largest.median())
