"""Int4 and fp8 block weights: layout, rounding, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
from w4afp8.search import search_int4


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
