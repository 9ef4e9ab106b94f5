"""What the routing kernels refuse, and how products are cut; the numbers are in test_routing_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w4afp8.linear import linear, slice_weight
from w4afp8.routing import (
    MAX_EXPERTS,
    MAX_GROUPS,
    MAX_TOP_K,
    GateRule,
    choose_experts_cuda,
    fits,
    route_cuda,
    slice_products,
    slice_rows_cuda,
)

WEIGHT = slice_weight(torch.ones(16, 64))
RULE = GateRule("sigmoid", 4, 4, 2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (RULE._replace(scores="tanh"), "scores: expected sigmoid or softmax, got 'tanh'"),  # type: ignore[arg-type]
        (RULE._replace(top_k=0), "top_k: expected 1 to 16 of 16 experts, got 0"),
        (RULE._replace(top_k=17), "top_k: expected 1 to 16 of 16 experts, got 17"),
        (RULE._replace(num_groups=0), "num_groups: expected 1 to 32, got 0"),
        (RULE._replace(num_groups=33), "num_groups: expected 1 to 32, got 33"),
        (RULE._replace(num_groups=5), "num_groups: expected groups of equal size, 2 or more of 16, got 5"),
        (RULE._replace(num_groups=16), "num_groups: expected groups of equal size, 2 or more of 16, got 16"),
        (RULE._replace(top_groups=5), "top_groups: expected at most 4 groups with at least 4 experts"),
        (RULE._replace(top_groups=0), "top_groups: expected at most 4 groups"),
        (RULE._replace(top_k=9), "top_groups: .* at least 9 experts together, got 2 groups of 4"),
        (GateRule("softmax", 2, 4, 2), "num_groups: expected 1, softmax scores have no groups, got 4"),
    ],
)
def test_rules_that_do_not_fit_are_refused_by_logits_and_by_hidden_states(rule: GateRule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_experts_cuda(torch.zeros(2, 16), None, rule)
    with pytest.raises(ValueError, match=message):
        route_cuda(torch.zeros(2, 64), WEIGHT, None, rule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(16)}, r"logits: expected a float type and \[T, E\], got torch\.float32 \[16\]"),
        ({"logits": torch.zeros(2, 16).double()}, "logits: expected a float type"),
        ({"logits": torch.zeros(2, 1040)}, "experts: expected 1 to 1024, got 1040"),
        ({"logits": torch.zeros(2, 64), "rule": GateRule("sigmoid", 33)}, "top_k: expected 1 to 32 of 64 experts"),
        ({"bias": torch.zeros(15)}, r"bias: expected torch\.float32 \[16\]"),
        ({"bias": torch.zeros(16).double()}, r"bias: expected torch\.float32 \[16\]"),
        ({"bias": torch.zeros(16), "rule": GateRule("softmax", 2)}, "bias: expected None"),
        ({}, "logits: expected a CUDA tensor, got one on cpu"),
    ],
)
def test_choose_experts_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 16), "bias": None, "rule": RULE} | change
    with pytest.raises(ValueError, match=message):
        choose_experts_cuda(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(64)}, r"x: expected a shape \[T, H\] with H positive and even, got \[64\]"),
        ({"x": torch.zeros(2, 63)}, r"H positive and even, got \[2, 63\]"),
        ({"x": torch.zeros(2, 0)}, r"H positive and even, got \[2, 0\]"),
        ({"x": torch.zeros(2, 64).double()}, "x: expected bfloat16, float16 or float32, got torch.float64"),
        (
            {"x": torch.zeros(2, 32)},
            r"weight slices: expected torch\.float64 \[32, 32\], got torch\.float64 \[32, 64\]",
        ),
        ({"weight": WEIGHT._replace(units=WEIGHT.units.float())}, "weight units: expected torch.float64"),
        ({"bias": torch.zeros(15)}, r"bias: expected torch\.float32 \[16\]"),
        ({}, "x: expected a CUDA tensor, got one on cpu"),
    ],
)
def test_route_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": WEIGHT, "bias": None, "rule": RULE} | change
    with pytest.raises(ValueError, match=message):
        route_cuda(**arguments)


@pytest.mark.parametrize("bits", [0, 27])
def test_slices_of_other_sizes_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits: expected 1 to 26, got {bits}"):
        slice_rows_cuda(torch.zeros(2, 64), bits)


def test_what_the_kernel_cannot_hold_does_not_fit() -> None:
    assert fits(GateRule("sigmoid", MAX_TOP_K, MAX_GROUPS, 4), MAX_EXPERTS)
    assert not fits(GateRule("sigmoid", 8), MAX_EXPERTS + 1)
    assert not fits(GateRule("sigmoid", MAX_TOP_K + 1), 256)
    assert not fits(GateRule("sigmoid", 8, MAX_GROUPS + 1, 4), 330)


@pytest.mark.parametrize(
    ("rows", "inputs", "parts"),
    [(1, 7168, 16), (64, 7168, 16), (65, 7168, 8), (256, 7168, 4), (257, 7168, 1), (1, 24, 12), (1, 22, 11), (3, 2, 2)],
)
def test_products_of_few_rows_are_cut_into_parts_that_divide_the_depth(rows: int, inputs: int, parts: int) -> None:
    slices = torch.ones(2, rows, inputs, dtype=torch.float64)
    products = slice_products(slices, torch.ones(6, inputs, dtype=torch.float64))
    assert list(products.shape) == [parts, 2 * rows, 6]
    assert bool((products.sum(0) == inputs).all())


@pytest.mark.parametrize("parts", [1, 2, 8, 16])
def test_the_parts_add_up_to_the_products_of_linear_in_any_order(parts: int, generator: torch.Generator) -> None:
    x, weight = torch.randn(3, 256, generator=generator), torch.randn(8, 256, generator=generator)
    sliced_x, sliced = slice_weight(x), slice_weight(weight)
    products = slice_products(sliced_x.slices.view(2, 3, 256), sliced.slices, parts)
    whole = sliced_x.slices @ sliced.slices.T
    for order in (torch.arange(parts), torch.randperm(parts, generator=generator)):
        total = torch.zeros_like(whole)
        for part in order.tolist():
            total += products[part]
        assert torch.equal(total, whole)
    assert torch.equal(linear(x, weight), linear(x, sliced))
