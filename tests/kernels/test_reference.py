"""The specification against dense float64 mathematics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from w4afp8 import (
    ExpertWeights,
    Int4Weight,
    SharedExpert,
    dequantize_fp8_block,
    dequantize_int4,
    quantize_fp8_block,
    quantize_int4,
    quantize_tokens,
)
from w4afp8.activations import quantize_intermediate
from w4afp8.reference import gemm, grouped_gemm, moe_layer, silu_mul
from w4afp8.tensors import Granularity, Quantized

Rows = Callable[[int, int], torch.Tensor]
GRANULARITIES: list[Granularity] = ["token", "token_group"]
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 128, 6, 3


def relative_frobenius(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def expand(q: Quantized) -> torch.Tensor:
    """Dequantize in float64."""
    return q.values.double() * q.scales.double().repeat_interleave(q.values.shape[1] // q.scales.shape[1], 1)


@pytest.fixture
def experts(lognormal: Rows) -> list[ExpertWeights]:
    def make(rows: int, columns: int) -> Int4Weight:
        return quantize_int4(lognormal(rows, columns) * 0.05)

    return [
        ExpertWeights(make(INTERMEDIATE, HIDDEN), make(INTERMEDIATE, HIDDEN), make(HIDDEN, INTERMEDIATE))
        for _ in range(EXPERTS)
    ]


@pytest.fixture
def shared(lognormal: Rows) -> SharedExpert:
    shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    return SharedExpert(*(quantize_fp8_block(lognormal(*shape) * 0.05) for shape in shapes))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("group", [32, 128])
def test_the_float64_gemm_is_the_product_of_the_dequantized(
    group: int, granularity: Granularity, lognormal: Rows
) -> None:
    x, _ = quantize_tokens(lognormal(9, 384), granularity)
    weight = quantize_int4(lognormal(70, 384), group)
    exact = expand(x) @ dequantize_int4(weight, torch.float64).T
    assert relative_frobenius(gemm(x, weight, torch.float64), exact) < 1e-14
    assert relative_frobenius(gemm(x, weight), exact) < 2e-4
    assert relative_frobenius(gemm(x, weight).bfloat16(), exact) < 2.5e-3


@pytest.mark.parametrize("shape", [(200, 256), (130, 384), (64, 100)])
def test_fp8_block_gemms_take_edge_blocks(shape: tuple[int, int], lognormal: Rows) -> None:
    x, _ = quantize_tokens(lognormal(5, shape[1]), "token")
    weight = quantize_fp8_block(lognormal(*shape))
    exact = expand(x) @ dequantize_fp8_block(weight, torch.float64).T
    assert relative_frobenius(gemm(x, weight, torch.float64), exact) < 1e-14


def test_grouped_gemm_is_one_gemm_an_expert_times_the_routing_weight(
    lognormal: Rows, generator: torch.Generator
) -> None:
    x, _ = quantize_tokens(lognormal(10, 128), "token")
    weights = [quantize_int4(lognormal(20, 128)) for _ in range(4)]
    row_weights = torch.rand(10, generator=generator)
    y = grouped_gemm(x, torch.tensor([0, 3, 3, 9, 10]), weights, row_weights)
    for row, expert in enumerate([0, 0, 0, 2, 2, 2, 2, 2, 2, 3]):
        one = gemm(Quantized(x.values[row : row + 1], x.scales[row : row + 1]), weights[expert])
        torch.testing.assert_close(y[row], one[0] * row_weights[row], rtol=1e-5, atol=1e-4)


def test_silu_mul_is_swiglu() -> None:
    gate, up = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(silu_mul(gate, up), torch.tensor([[2.193176, -0.953623]]))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("with_shared", [False, True])
def test_the_layer_adds_up_its_routes(
    granularity: Granularity,
    with_shared: bool,
    experts: list[ExpertWeights],
    shared: SharedExpert,
    lognormal: Rows,
    generator: torch.Generator,
) -> None:
    x = lognormal(7, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(7)])
    weights = torch.rand(7, TOP_K, generator=generator)
    q, _ = quantize_tokens(x, granularity)

    def pass_through(row: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(row @ gate.T) * (row @ up.T)
        return expand(quantize_intermediate(hidden.float()[None], granularity))[0] @ down.T

    exact = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for token in range(7):
        row = expand(q)[token]
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            exact[token] += weight * pass_through(row, *(dequantize_int4(w, torch.float64) for w in experts[expert]))
        if with_shared:
            exact[token] += pass_through(row, *(dequantize_fp8_block(w, torch.float64) for w in shared))
    added = shared if with_shared else None
    oracle = moe_layer(x, ids, weights, experts, added, granularity, torch.float64)
    assert relative_frobenius(oracle, exact) < 1e-9
    assert relative_frobenius(moe_layer(x, ids, weights, experts, added, granularity), exact) < 6e-3


def test_a_zero_token_gives_zero_and_a_nan_token_gives_nan_alone(
    experts: list[ExpertWeights], shared: SharedExpert, lognormal: Rows
) -> None:
    x = lognormal(3, HIDDEN)
    ids, weights = torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    clean = moe_layer(x, ids, weights, experts, shared, "token", torch.float64)
    x[0] = 0
    x[1, 5] = torch.nan
    y = moe_layer(x, ids, weights, experts, shared, "token", torch.float64)
    assert not y[0].any()
    assert bool(y[1].isnan().all())
    torch.testing.assert_close(y[2], clean[2])


def test_routes_that_do_not_fit_are_refused(experts: list[ExpertWeights]) -> None:
    x = torch.ones(2, HIDDEN)
    with pytest.raises(ValueError, match="topk_ids: expected 0 to 5, got 0 to 6"):
        moe_layer(x, torch.tensor([[0], [6]]), torch.ones(2, 1), experts, None, "token")
    with pytest.raises(ValueError, match=r"expected both \[2, K\]"):
        moe_layer(x, torch.tensor([[0]]), torch.ones(1, 1), experts, None, "token")
