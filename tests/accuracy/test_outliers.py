"""Outlier channels change what quantization sees, and nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from measure import block_inputs, predict
from outliers import channel_spread, outlier_channels, with_outliers
from tiny import RECIPE, tiny_model, tiny_windows

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_keeps_its_bits(dtype: torch.dtype) -> None:
    model, windows = tiny_model().to(dtype), tiny_windows()
    changed = with_outliers(model, RECIPE)
    before, after = (predict(each, windows, 2) for each in (model, changed))
    assert torch.equal(before.log_probabilities, after.log_probabilities)
    inputs, outlying = (block_inputs(each, windows) for each in (model, changed))
    for layer, rows in inputs.items():
        channels = outlier_channels(RECIPE, layer)
        assert torch.equal(outlying[layer][:, channels], rows[:, channels] * RECIPE.outlier_factor)
        assert channel_spread(rows) < 5
        assert channel_spread(outlying[layer]) > 50


def test_every_layer_has_channels_of_its_own() -> None:
    first, second = (set(outlier_channels(RECIPE, layer).tolist()) for layer in (1, 2))
    assert len(first) == len(second) == RECIPE.outlier_channels
    assert first != second
