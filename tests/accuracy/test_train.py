"""The recipe's own few lines: schedule, balance, float32 weights, batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from model import moe_blocks
from recipe import Recipe
from tiny import RECIPE, tiny_model, tiny_windows
from train import Batches, Float32Weights, LoadBalance, choose_experts, learning_rate, mean_loss

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def test_the_learning_rate_rises_and_falls_along_half_a_cosine() -> None:
    recipe = Recipe()
    rates = [learning_rate(recipe, step, 500) for step in range(500)]
    assert rates[0] == pytest.approx(recipe.peak_learning_rate / recipe.warmup_steps)
    assert max(rates) == pytest.approx(recipe.peak_learning_rate)
    assert rates[300] == pytest.approx((recipe.peak_learning_rate + recipe.last_learning_rate) / 2)
    assert rates[-1] == pytest.approx(recipe.last_learning_rate, rel=1e-2)


def test_a_few_steps_learn_and_the_bias_moves_against_the_load() -> None:
    model, windows = tiny_model().train(), tiny_windows(4)
    assert choose_experts(model, windows[:1])["experts"] == "grouped_mm"
    weights, balance = Float32Weights(model, RECIPE), LoadBalance(model, RECIPE.bias_speed)
    gate = moe_blocks(model)[1].gate
    before = gate.e_score_correction_bias.clone()
    counts = torch.zeros(RECIPE.experts)
    gate.register_forward_hook(lambda module, inputs, output: count(output[2], counts))
    losses = []
    for step in range(4):
        loss = mean_loss(model, windows)
        loss.backward()
        weights.step(1e-3)
        balance.step()
        if step == 0:
            moved = torch.sign(counts.mean() - counts) * RECIPE.bias_speed
            torch.testing.assert_close(gate.e_score_correction_bias, before + moved)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert model.model.norm.weight.dtype == torch.bfloat16


def count(ids: torch.Tensor, counts: torch.Tensor) -> None:
    counts += torch.bincount(ids.flatten(), minlength=len(counts))


def test_steps_too_small_for_bf16_add_up() -> None:
    model, windows = tiny_model().train(), tiny_windows(1)
    before = model.model.norm.weight.detach().clone()
    weights = Float32Weights(model, RECIPE)
    for step in range(8):
        mean_loss(model, windows).backward()
        weights.step(1e-3)  # bf16 next to 1 has steps of 4e-3 and 8e-3
        if step == 0:
            assert torch.equal(model.model.norm.weight, before)
    assert not torch.equal(model.model.norm.weight, before)


def test_a_pass_has_every_window_once() -> None:
    recipe = replace(RECIPE, window_tokens=10, batch_windows=3)
    batches = Batches(torch.arange(100, dtype=torch.int16), recipe)
    drawn = torch.cat([batches.draw() for _ in range(3)])
    assert torch.equal(drawn - drawn[:, :1], torch.arange(11).expand(9, -1))
    assert len(set(drawn[:, 0].tolist())) == 9
    with pytest.raises(ValueError, match="more than 20 tokens"):
        Batches(torch.arange(9, dtype=torch.int16), recipe).draw()
