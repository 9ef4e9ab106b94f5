"""The softmax gate against transformers' Qwen3-MoE router, and bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_forward.gates import choose
from moe_forward.types import GateSpec

SPEC = GateSpec("softmax")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 8])
def test_it_agrees_with_the_router_of_transformers(normalize: bool, top_k: int, logits: torch.Tensor) -> None:
    config = Qwen3MoeConfig(hidden_size=64, num_experts=64, num_experts_per_tok=top_k, norm_topk_prob=normalize)
    router = Qwen3MoeTopKRouter(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        router.weight.copy_(torch.eye(64))  # logits go through unchanged
        seen, expected_weights, expected_ids = router(logits)
    assert torch.equal(seen, logits)
    ids, weights = choose(dataclasses.replace(SPEC, normalize=normalize), top_k, logits, None)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    assert float((weights - expected_weights).abs().max()) < 1e-6


def test_normalized_weights_add_up_to_the_scaling_factor(logits: torch.Tensor) -> None:
    weights = choose(dataclasses.replace(SPEC, scaling_factor=3.0), 5, logits, None)[1]
    torch.testing.assert_close(weights.sum(1), torch.full((67,), 3.0))


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, 27)
    logits[:, 20] = 1.0
    assert choose(SPEC, 3, logits, None)[0].tolist() == [[20, 0, 1]] * 3


def test_large_logits_and_barred_experts_give_no_nan() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, -torch.inf]])
    ids, weights = choose(SPEC, 2, logits, None)
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("experts", [27, 64])
def test_neither_batch_nor_order_change_bits(experts: int, logits: torch.Tensor) -> None:
    logits = logits[:, :experts].contiguous()
    ids, weights = choose(SPEC, 6, logits, None)
    order = torch.randperm(67, generator=torch.Generator().manual_seed(9))
    moved_ids, moved_weights = choose(SPEC, 6, logits[order], None)
    assert torch.equal(moved_ids, ids[order])
    assert torch.equal(moved_weights, weights[order])
    for row in range(67):
        one_ids, one_weights = choose(SPEC, 6, logits[row : row + 1], None)
        assert torch.equal(one_ids[0], ids[row])
        assert torch.equal(one_weights[0], weights[row])


def test_what_the_gate_does_not_have_is_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no correction bias"):
        choose(SPEC, 2, logits, torch.zeros(64))
    with pytest.raises(ValueError, match="num_groups: expected 1"):
        choose(dataclasses.replace(SPEC, num_groups=8, top_groups=4), 2, logits, None)
