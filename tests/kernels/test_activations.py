"""Fp8 activations: the definition, its edges, and that a bad token stays alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from w4afp8 import Quantized, check_quantized, dequantize_tokens, quantize_tokens, requantize, zero_rows
from w4afp8.activations import quantize_intermediate
from w4afp8.tensors import Granularity

Rows = Callable[[int, int], torch.Tensor]

GRANULARITIES: list[Granularity] = ["token", "token_group"]


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round float64 `x` to e4m3 by looking through all finite codes: nearest, ties to the even code."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F and code != 0x80], dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    distance = (x.reshape(-1, 1) - table).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = nearest & (codes % 2 == 0)
    chosen = torch.where(even.any(1, keepdim=True), even, nearest).int().argmax(1)
    return table[chosen].view(x.shape)


def spread(q: Quantized) -> torch.Tensor:
    return q.scales.repeat_interleave(q.values.shape[1] // q.scales.shape[1], dim=1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantization_agrees_with_its_definition(granularity: Granularity, dtype: torch.dtype, lognormal: Rows) -> None:
    x = lognormal(6, 256).to(dtype)
    q, non_finite = quantize_tokens(x, granularity)
    columns = {"token": 1, "token_group": 2}[granularity]
    scales = x.float().view(6, columns, -1).abs().amax(2) / 448
    assert torch.equal(q.scales, scales)
    assert not non_finite.any()
    ratio = x.float() / spread(q)  # float32, as the contract says
    assert torch.equal(q.values.double(), nearest_e4m3(ratio.double()))


def test_ties_round_to_even_and_the_largest_value_is_448() -> None:
    # Scale 1: 17 lies between 16 and 18, 19 between 18 and 20.
    x = torch.tensor([[448.0, -448.0, 17.0, 19.0, 2**-10, 3 * 2**-10]])
    q, _ = quantize_tokens(x, "token")
    assert q.scales.tolist() == [[1.0]]
    assert q.values.float().tolist() == [[448.0, -448.0, 16.0, 20.0, 0.0, 2**-8]]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30, 3.4e38])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_size_of_a_token_does_not_change_its_relative_error(
    granularity: Granularity, size: float, generator: torch.Generator
) -> None:
    x = torch.rand(4, 256, generator=generator).sub(0.5).mul(2) * size
    q, non_finite = quantize_tokens(x, granularity)
    assert not non_finite.any()
    error = (q.values.double() * spread(q).double() - x.double()).norm() / x.double().norm()
    assert float(error) < 0.04  # uniform over a 4 bit significand: 2^-4 / sqrt(3) at most


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_zero_token_stays_exactly_zero(granularity: Granularity) -> None:
    x = torch.ones(3, 256)
    x[1] = 0
    q, non_finite = quantize_tokens(x, granularity)
    assert not non_finite.any()
    assert bool(q.scales.isfinite().all())
    assert torch.equal(dequantize_tokens(q)[1], torch.zeros(256))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_token_is_flagged_cleared_and_touches_no_other(
    granularity: Granularity, bad: float, lognormal: Rows
) -> None:
    x = lognormal(5, 256)
    clean, _ = quantize_tokens(x, granularity)
    x[2, 77] = bad
    q, non_finite = quantize_tokens(x, granularity)
    assert non_finite.tolist() == [False, False, True, False, False]
    assert not q.values[2].view(torch.uint8).any()
    assert not q.scales[2].any()
    others = [0, 1, 3, 4]
    assert torch.equal(q.values.view(torch.uint8)[others], clean.values.view(torch.uint8)[others])
    assert torch.equal(q.scales[others], clean.scales[others])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_bits_of_a_token_do_not_depend_on_the_batch(granularity: Granularity, lognormal: Rows) -> None:
    x = lognormal(33, 384)
    whole, _ = quantize_tokens(x, granularity)
    for row in (0, 7, 32):
        alone, _ = quantize_tokens(x[row : row + 1], granularity)
        assert torch.equal(alone.values.view(torch.uint8)[0], whole.values.view(torch.uint8)[row])
        assert torch.equal(alone.scales[0], whole.scales[row])


def test_no_tokens_quantize_to_no_tokens() -> None:
    q, non_finite = quantize_tokens(torch.empty(0, 256), "token_group")
    assert list(q.values.shape) == [0, 256]
    assert list(q.scales.shape) == [0, 2]
    assert list(non_finite.shape) == [0]


@pytest.mark.parametrize(
    ("x", "granularity", "message"),
    [
        (torch.ones(2, 100), "token_group", "multiples of 128, got 100"),
        (torch.ones(2, 128), "tensor", "expected token or token_group, got 'tensor'"),
        (torch.ones(128), "token", r"x: expected a shape \[T, K\]"),
        (torch.ones(2, 128, dtype=torch.float64), "token", "x: expected bfloat16, float16 or float32"),
    ],
)
def test_quantization_refuses_what_does_not_fit(x: torch.Tensor, granularity: Granularity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_tokens(x, granularity)


def test_check_finds_nan_values_and_non_finite_scales() -> None:
    values = torch.zeros(5, 128, dtype=torch.uint8)
    values[:, 3] = 0x7E  # 448
    values[1, 0], values[2, 127] = 0x7F, 0xFF  # the two NaN
    scales = torch.ones(5, 1)
    scales[3], scales[4] = torch.inf, torch.nan
    found = check_quantized(Quantized(values.view(torch.float8_e4m3fn), scales))
    assert found.tolist() == [False, True, True, True, True]


def test_zero_rows_clears_only_the_chosen_rows(lognormal: Rows) -> None:
    q, _ = quantize_tokens(lognormal(3, 128), "token")
    cleared = zero_rows(q, torch.tensor([False, True, False]))
    assert torch.equal(dequantize_tokens(cleared)[[0, 2]], dequantize_tokens(q)[[0, 2]])
    assert not dequantize_tokens(cleared)[1].any()


@pytest.mark.parametrize(("source", "target"), list(itertools.product(GRANULARITIES, GRANULARITIES)))
def test_requantizing_gives_the_other_granularity_and_keeps_its_own(
    source: Granularity, target: Granularity, lognormal: Rows
) -> None:
    q, _ = quantize_tokens(lognormal(5, 256), source)
    result = requantize(q, target)
    assert result.scales.shape[1] == {"token": 1, "token_group": 2}[target]
    if source == target:
        assert result is q
    expected, _ = quantize_tokens(dequantize_tokens(q), target)
    assert torch.equal(dequantize_tokens(result), dequantize_tokens(expected))


def test_requantizing_beyond_float32_is_visible_and_alone() -> None:
    values = torch.full((2, 256), 448.0).to(torch.float8_e4m3fn)
    scales = torch.ones(2, 2)
    scales[1, 0] = 1e38
    result = requantize(Quantized(values, scales), "token")
    assert check_quantized(result).tolist() == [False, True]


def test_an_overflow_inside_a_layer_shows_as_nan_in_its_own_row() -> None:
    x = torch.ones(2, 128)
    x[1, 4] = torch.inf
    expanded = dequantize_tokens(quantize_intermediate(x, "token"))
    assert torch.equal(expanded[0], x[0])
    assert bool(expanded[1].isnan().all())


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (torch.zeros(2, 256), torch.ones(2, 1), "values: expected float8_e4m3fn"),
        (torch.zeros(2, 256).to(torch.float8_e4m3fn), torch.ones(2, 1).half(), "scales: expected float32"),
        (torch.zeros(2, 256).to(torch.float8_e4m3fn), torch.ones(2, 3), r"\[2, 1\] or \[2, 2\].*got \[2, 3\]"),
    ],
)
def test_quantized_tokens_of_another_form_are_refused(values: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize_tokens(Quantized(values, scales))
