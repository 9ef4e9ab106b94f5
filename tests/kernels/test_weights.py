"""Int4 and fp8 block weights: layout, rounding, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import w4afp8.weights
from w4afp8 import (
    Fp8BlockWeight,
    Int4Weight,
    dequantize_fp8_block,
    dequantize_int4,
    pack_int4,
    quantize_fp8_block,
    quantize_int4,
    unpack_int4,
)
from w4afp8.weights import SEARCH_FACTORS, search_int4


def test_every_byte_survives_unpacking_and_packing() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    assert torch.equal(pack_int4(unpack_int4(codes)), codes)


def test_every_pair_of_codes_survives_packing_and_unpacking() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(values, values)
    assert torch.equal(unpack_int4(pack_int4(pairs)), pairs)


def test_the_low_nibble_holds_the_even_index() -> None:
    assert pack_int4(torch.tensor([1, -8], dtype=torch.int8)).tolist() == [1 - 128]


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.zeros(4, dtype=torch.int32), "q: expected int8"),
        (torch.zeros(3, dtype=torch.int8), "even last dimension"),
        (torch.full((2,), 8, dtype=torch.int8), r"\[-8, 7\], got 8"),
        (torch.full((2,), -9, dtype=torch.int8), r"\[-8, 7\], got -9"),
    ],
)
def test_packing_refuses_what_is_no_int4(q: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_int4(q)


def test_unpacking_refuses_another_dtype() -> None:
    with pytest.raises(ValueError, match="codes: expected int8"):
        unpack_int4(torch.zeros(2, dtype=torch.uint8))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_quantization_agrees_with_its_definition(
    group: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = (torch.randn(24, 256, generator=generator) * 0.02).to(dtype)
    quantized = quantize_int4(weight, group)
    groups = weight.float().view(24, -1, group)
    scales = groups.abs().amax(2) / 7
    assert torch.equal(quantized.scales, scales)
    expected = torch.round(groups / scales[..., None])  # torch.round is half to even
    assert torch.equal(unpack_int4(quantized.codes).float(), expected.view(24, 256))
    assert int(unpack_int4(quantized.codes).abs().max()) == 7


def test_int4_error_is_at_most_half_a_step(generator: torch.Generator) -> None:
    weight = torch.randn(16, 256, generator=generator, dtype=torch.float32)
    quantized = quantize_int4(weight)
    error = (dequantize_int4(quantized, torch.float64) - weight.double()).abs().view(16, 2, 128)
    assert bool((error <= 0.500001 * quantized.scales.double()[..., None]).all())


def test_int4_halves_round_to_even() -> None:
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]])
    assert unpack_int4(quantize_int4(weight, 8).codes).tolist() == [[7, 0, 2, 2, 0, -2, -2, 4]]


def test_an_all_zero_group_has_scale_zero_and_codes_zero() -> None:
    weight = torch.cat((torch.zeros(2, 128), torch.ones(2, 128)), dim=1)
    quantized = quantize_int4(weight)
    assert quantized.scales[:, 0].tolist() == [0.0, 0.0]
    assert torch.equal(unpack_int4(quantized.codes)[:, :128], torch.zeros(2, 128, dtype=torch.int8))
    assert torch.allclose(dequantize_int4(quantized), weight)


def test_a_group_of_the_smallest_subnormals_is_a_group_of_zeros() -> None:
    weight = torch.full((1, 32), 1.4e-45)
    quantized = quantize_int4(weight, 32)
    assert not quantized.codes.any()
    assert not quantized.scales.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantize", [quantize_int4, search_int4, quantize_fp8_block])
def test_weights_with_nan_or_inf_are_refused(quantize: Callable[[torch.Tensor], object], bad: float) -> None:
    weight = torch.ones(4, 128)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match="weight: expected finite values"):
        quantize(weight)


@pytest.mark.parametrize(
    ("weight", "group", "message"),
    [
        (torch.ones(4, 100), 128, "group_size: expected an even divisor of K = 100, got 128"),
        (torch.ones(4, 100), 25, "group_size"),
        (torch.ones(4), 2, r"weight: expected a shape \[N, K\]"),
        (torch.ones(4, 128, dtype=torch.int8), 128, "weight: expected floating point"),
    ],
)
def test_int4_quantization_refuses_what_does_not_fit(weight: torch.Tensor, group: int, message: str) -> None:
    for quantize in (quantize_int4, search_int4):
        with pytest.raises(ValueError, match=message):
            quantize(weight, group)


def squared_error(weight: torch.Tensor, quantized: Int4Weight) -> torch.Tensor:
    """Squared error of each group [N, G], float64."""
    rows, groups = quantized.scales.shape
    return (dequantize_int4(quantized, torch.float64) - weight.double()).square().view(rows, groups, -1).sum(2)


KINDS = ("normal", "heavy tails", "largest below zero", "bf16", "tiny", "huge", "few values")


def weight_of(kind: str, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(40, 512, generator=generator)
    if kind == "heavy tails":
        return normal * torch.randn(40, 512, generator=generator).exp()
    if kind == "largest below zero":
        normal[:, ::128] = -8.0
    factors = {"tiny": 1e-36, "huge": 1e37}
    if kind == "few values":
        return normal.round()
    return normal.bfloat16() if kind == "bf16" else normal * factors.get(kind, 1.0)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_searched_scales_make_no_group_worse(kind: str, group: int, generator: torch.Generator) -> None:
    weight = weight_of(kind, generator)
    plain, searched = squared_error(weight, quantize_int4(weight, group)), search_int4(weight, group)
    found = squared_error(weight, searched.weight)
    assert bool((found <= plain * (1 + 1e-5)).all())  # float32 in the search, float64 here
    assert float(found.sum()) < float(plain.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_tells_the_errors_that_its_weight_has(kind: str, generator: torch.Generator) -> None:
    weight = weight_of(kind, generator)
    searched = search_int4(weight)
    size = weight.double().square().mean()
    for told, quantized in ((searched.error, searched.weight), (searched.rtn_error, quantize_int4(weight))):
        torch.testing.assert_close(told, squared_error(weight, quantized), rtol=1e-4, atol=float(size) * 1e-9)
    assert bool((searched.error <= searched.rtn_error).all())


def test_a_search_takes_the_best_factor_of_each_group(generator: torch.Generator) -> None:
    weight = torch.randn(64, 512, generator=generator)
    largest = weight.view(64, 4, 128).abs().amax(2) / 7
    tried = []
    for factor in SEARCH_FACTORS:
        spread = (largest * factor).double().repeat_interleave(128, 1)
        codes = (weight.double() / spread).round().clamp(-8, 7)
        tried.append((codes * spread - weight.double()).square().view(64, 4, 128).sum(2))
    least = torch.stack(tried).amin(0)
    searched = search_int4(weight)
    torch.testing.assert_close(squared_error(weight, searched.weight), least, rtol=1e-5, atol=0)
    ratios = (searched.weight.scales / largest)[..., None] - torch.tensor(SEARCH_FACTORS)
    assert float(ratios.abs().amin(2).max()) < 1e-6
    assert int(ratios.abs().argmin(2).unique().numel()) == len(SEARCH_FACTORS)  # each one pays somewhere


def test_of_equal_errors_the_search_takes_the_first_scale() -> None:
    weight = torch.arange(-7, 8).repeat(2, 9)[:, :128].float()  # exact with scale 1
    searched, plain = search_int4(weight), quantize_int4(weight)
    assert torch.equal(searched.weight.codes, plain.codes)
    assert torch.equal(searched.weight.scales, plain.scales)
    assert not searched.error.any()


def test_a_search_gains_an_eighth_of_the_error_of_normal_weights(generator: torch.Generator) -> None:
    weight = torch.randn(256, 1024, generator=generator)
    searched = search_int4(weight)
    assert float(searched.error.sum() / searched.rtn_error.sum()) ** 0.5 < 7 / 8


def test_a_searched_group_of_zeros_or_of_the_smallest_subnormals_is_a_group_of_zeros() -> None:
    weight = torch.cat((torch.zeros(2, 128), torch.full((2, 128), 1.4e-45), torch.ones(2, 128)), dim=1)
    searched = search_int4(weight)
    assert searched.weight.scales[:, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert not unpack_int4(searched.weight.codes)[:, :256].any()
    assert bool(searched.error.isfinite().all())
    assert not searched.error[:, :2].any()


@pytest.mark.parametrize("value", [1e-44, 2e-43, 3e-40, 3.4e38])
def test_a_search_at_the_ends_of_float32_stays_finite_and_no_worse(value: float, generator: torch.Generator) -> None:
    weight = torch.rand(8, 128, generator=generator) * value
    searched = search_int4(weight)
    assert bool(dequantize_int4(searched.weight, torch.float64).isfinite().all())
    plain = squared_error(weight, quantize_int4(weight))
    assert bool((squared_error(weight, searched.weight) <= plain * (1 + 1e-5)).all())


def test_a_searched_group_has_the_same_bits_in_any_company(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(70, 384, generator=generator)
    whole = search_int4(weight)
    monkeypatch.setattr(w4afp8.weights, "SEARCH_ELEMENTS", 3 * 384)
    for part, rows in ((search_int4(weight), slice(None)), (search_int4(weight[11:12]), slice(11, 12))):
        assert torch.equal(part.weight.codes, whole.weight.codes[rows])
        assert torch.equal(part.weight.scales, whole.weight.scales[rows])
        assert torch.equal(part.error, whole.error[rows])
    column = search_int4(weight[:, 128:256].contiguous())
    assert torch.equal(column.weight.scales, whole.weight.scales[:, 1:2])


def test_dequantizing_int4_refuses_scales_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="scales: expected"):
        dequantize_int4(Int4Weight(torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 3)))


@pytest.mark.parametrize("shape", [(128, 256), (200, 300), (1, 1)])
def test_fp8_blocks_keep_values_within_half_a_step(shape: tuple[int, int], generator: torch.Generator) -> None:
    weight = torch.randn(*shape, generator=generator)
    quantized = quantize_fp8_block(weight)
    assert list(quantized.scales.shape) == [-(-shape[0] // 128), -(-shape[1] // 128)]
    assert torch.equal(quantized.scales[0, 0], weight[:128, :128].abs().max() / 448)
    error = (dequantize_fp8_block(quantized, torch.float64) - weight.double()).abs()
    # e4m3 keeps 4 significant bits: half a step is 2^-4 of the value, or 2^-10 steps of the scale below 2^-6.
    bound = weight.double().abs() * 2**-4 * 1.000001 + quantized.scales.max().double() * 2**-10
    assert bool((error <= bound).all())


def test_a_block_of_zeros_dequantizes_to_zero() -> None:
    weight = torch.zeros(128, 256)
    weight[:, 128:] = 3.0
    quantized = quantize_fp8_block(weight)
    assert quantized.scales[0, 0] == 0
    assert torch.equal(dequantize_fp8_block(quantized)[:, :128], weight[:, :128])


def test_dequantizing_fp8_refuses_a_missing_scale() -> None:
    with pytest.raises(ValueError, match=r"scales: expected \[2, 1\]"):
        dequantize_fp8_block(Fp8BlockWeight(torch.zeros(200, 100).to(torch.float8_e4m3fn), torch.ones(1, 1)))
