"""A model that is small and untrained, for the tests of the scripts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from model import make_model, moe_blocks
from recipe import PRESETS

RECIPE = replace(PRESETS["micro"], layers=3, moe_intermediate_size=128, window_tokens=32)


def tiny_model() -> Any:
    """Make it in bf16, with gates that tell tokens apart and norms that are not all ones."""
    model = make_model(RECIPE).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer, block in moe_blocks(model).items():
            block.gate.weight.normal_(std=0.08, generator=generator)
            block.gate.e_score_correction_bias.normal_(std=0.05, generator=generator)
            model.model.layers[layer].post_attention_layernorm.weight.uniform_(0.5, 1.5, generator=generator)
    return model


def tiny_windows(windows: int = 2) -> torch.Tensor:
    """Draw windows of bytes."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (windows, RECIPE.window_tokens + 1), generator=generator)
