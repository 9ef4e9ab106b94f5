"""DeepSeek-V3's gate against transformers' router, by hand, and bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moe_forward.gates import choose
from moe_forward.types import GateSpec

SPEC = GateSpec("deepseek_v3", num_groups=8, top_groups=4, normalize=True, scaling_factor=2.5)


@pytest.fixture
def bias() -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(8)) * 0.1


def by_expert(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Spread weights [T, K] over [T, E], so that the order of a token's experts does not matter."""
    return torch.zeros(len(ids), experts).scatter_(1, ids, weights)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(8, 4), (4, 1), (1, 1)])
def test_it_agrees_with_the_router_of_transformers(
    normalize: bool, num_groups: int, top_groups: int, logits: torch.Tensor, bias: torch.Tensor
) -> None:
    config = DeepseekV3Config(
        hidden_size=64,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_group=num_groups,
        topk_group=top_groups,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(64))  # logits go through unchanged
        router.e_score_correction_bias.copy_(bias)
        seen, expected_weights, expected_ids = router(logits)
    assert torch.equal(seen, logits)
    spec = dataclasses.replace(SPEC, normalize=normalize, num_groups=num_groups, top_groups=top_groups)
    ids, weights = choose(spec, 8, logits, bias)
    assert ids.dtype == torch.int64
    assert torch.equal(ids.sort(1).values, expected_ids.sort(1).values)
    difference = by_expert(ids, weights, 64) - by_expert(expected_ids, expected_weights, 64)
    assert float(difference.abs().max()) < 1e-6


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0])
    spec = GateSpec("deepseek_v3", normalize=False)
    ids, weights = choose(spec, 2, logits, bias)
    assert ids.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [0, 3]])


def test_a_group_counts_by_its_two_best() -> None:
    # The single best expert is in group 0, the best pair in group 1.
    logits = torch.tensor([[3.0, -5.0, -5.0, 2.0, 2.0, -5.0]])
    spec = GateSpec("deepseek_v3", num_groups=2, top_groups=1)
    assert choose(spec, 2, logits, None)[0].tolist() == [[3, 4]]


def test_normalized_weights_add_up_to_the_scaling_factor(logits: torch.Tensor) -> None:
    weights = choose(SPEC, 8, logits, None)[1]
    torch.testing.assert_close(weights.sum(1), torch.full((67,), 2.5))


def test_ties_go_to_the_lowest_id_in_the_lowest_group() -> None:
    spec = dataclasses.replace(SPEC, num_groups=4, top_groups=2)
    ids, weights = choose(spec, 4, torch.zeros(5, 16), None)
    assert ids.tolist() == [[0, 1, 2, 3]] * 5
    torch.testing.assert_close(weights, torch.full((5, 4), 2.5 / 4))


def test_scores_that_underflow_give_zero_weights_and_no_nan() -> None:
    weights = choose(SPEC, 8, torch.full((2, 64), -1e6), None)[1]
    assert torch.equal(weights, torch.zeros(2, 8))


def test_neither_batch_nor_order_change_bits(logits: torch.Tensor, bias: torch.Tensor) -> None:
    ids, weights = choose(SPEC, 8, logits, bias)
    order = torch.randperm(67, generator=torch.Generator().manual_seed(9))
    moved_ids, moved_weights = choose(SPEC, 8, logits[order], bias)
    assert torch.equal(moved_ids, ids[order])
    assert torch.equal(moved_weights, weights[order])
    for row in range(67):
        one_ids, one_weights = choose(SPEC, 8, logits[row : row + 1], bias)
        assert torch.equal(one_ids[0], ids[row])
        assert torch.equal(one_weights[0], weights[row])


@pytest.mark.parametrize(
    ("num_groups", "top_groups", "message"),
    [
        (7, 4, "num_groups: expected groups of equal size"),
        (64, 4, "num_groups: expected groups of equal size, 2 or more of 64"),
        (8, 9, "top_groups: expected at most 8 groups"),
        (16, 1, "with at least 8 experts together, got 1 groups of 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    num_groups: int, top_groups: int, message: str, logits: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(dataclasses.replace(SPEC, num_groups=num_groups, top_groups=top_groups), 8, logits, None)
