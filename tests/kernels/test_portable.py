"""The portable GEMMs: against the specification, and bit for bit against themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from w4afp8 import (
    Fp8BlockWeight,
    Granularity,
    Int4Weight,
    Quantized,
    pack_int4,
    portable,
    quantize_fp8_block,
    quantize_int4,
    quantize_tokens,
    reference,
)

Rows = Callable[[int, int], torch.Tensor]
Threads = Callable[[int], None]
Weight = Int4Weight | Fp8BlockWeight

GRANULARITIES: list[Granularity] = ["token", "token_group"]


def rows_of(x: Quantized, rows: torch.Tensor | slice) -> Quantized:
    return Quantized(x.values[rows], x.scales[rows])


def relative_frobenius(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture(params=["32", "128", "fp8"])
def weight(request: pytest.FixtureRequest, lognormal: Rows) -> Int4Weight | Fp8BlockWeight:
    dense = lognormal(300, 1024) * 0.02
    if request.param == "fp8":
        return quantize_fp8_block(dense)
    return quantize_int4(dense, int(request.param))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gemm_meets_the_specification(weight: Weight, granularity: Granularity, lognormal: Rows) -> None:
    x, _ = quantize_tokens(lognormal(33, 1024), granularity)
    exact = reference.gemm(x, weight, torch.float64)
    y = portable.gemm(x, weight)
    assert relative_frobenius(y, exact) < 5e-7  # 32 float32 additions; the contract allows 2e-4
    assert relative_frobenius(y.bfloat16(), exact) < 2.5e-3
    assert relative_frobenius(reference.gemm(x, weight), exact) < 2e-4


def test_all_int4_codes_meet_all_fp8_values_exactly() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat_interleave(128).view(16, 128)
    weight = Int4Weight(pack_int4(codes), torch.ones(16, 1))
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    values = torch.zeros(len(finite), 128, dtype=torch.uint8)
    values[torch.arange(len(finite)), torch.arange(len(finite)) % 128] = finite
    x = Quantized(values.view(torch.float8_e4m3fn), torch.ones(len(finite), 1))
    expected = finite.view(torch.float8_e4m3fn).float()[:, None] * torch.arange(-8, 8)
    assert torch.equal(portable.gemm(x, weight), expected)


@pytest.mark.parametrize("even_k", [0, 1])
def test_each_weight_meets_its_own_channel(even_k: int, generator: torch.Generator) -> None:
    codes = torch.randint(-8, 8, (5, 256), generator=generator, dtype=torch.int8)
    weight = Int4Weight(pack_int4(codes), torch.ones(5, 2))
    one_hot = torch.zeros(128, 256)
    one_hot[torch.arange(128), torch.arange(128) * 2 + even_k] = 448.0
    x, _ = quantize_tokens(one_hot, "token")
    assert torch.equal(portable.gemm(x, weight), 448.0 * codes[:, even_k::2].T)


def test_largest_sums_of_a_group_are_exact(generator: torch.Generator) -> None:
    values = torch.full((1, 128), 448.0)
    values[0, 1::2] = 2**-9
    weight = Int4Weight(pack_int4(torch.full((1, 128), -8, dtype=torch.int8)), torch.ones(1, 1))
    exact = -8.0 * 64 * (448 + 2**-9)
    y = portable.gemm(Quantized(values.to(torch.float8_e4m3fn), torch.ones(1, 1)), weight)
    assert float(y) == float(torch.tensor(exact, dtype=torch.float64).float())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_neither_batch_nor_order_nor_threads_change_bits(
    weight: Weight, granularity: Granularity, lognormal: Rows, generator: torch.Generator, threads: Threads
) -> None:
    x, _ = quantize_tokens(lognormal(67, 1024), granularity)
    threads(2)
    whole = portable.gemm(x, weight)
    order = torch.randperm(67, generator=generator)
    assert torch.equal(portable.gemm(rows_of(x, order), weight), whole[order])
    for count in (1, 2, 3, 8, 17, 66):
        assert torch.equal(portable.gemm(rows_of(x, slice(67 - count, 67)), weight), whole[67 - count :])
    threads(1)
    assert torch.equal(portable.gemm(x, weight), whole)


def test_block_sizes_do_not_change_bits(weight: Weight, lognormal: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = quantize_tokens(lognormal(21, 1024), "token_group")
    whole = portable.gemm(x, weight)
    monkeypatch.setattr(portable, "_WEIGHT_ELEMENTS", 7 * 1024)
    monkeypatch.setattr(portable, "_PARTIAL_ELEMENTS", 900)
    assert torch.equal(portable.gemm(x, weight), whole)


@pytest.mark.parametrize("shape", [(200, 256), (130, 384), (64, 100), (1, 1)])
def test_fp8_edge_blocks_meet_the_specification(shape: tuple[int, int], lognormal: Rows) -> None:
    x, _ = quantize_tokens(lognormal(5, shape[1]), "token")
    weight = quantize_fp8_block(lognormal(*shape))
    assert relative_frobenius(portable.gemm(x, weight), reference.gemm(x, weight, torch.float64)) < 5e-7


def test_an_odd_code_of_minus_eight_is_not_plus_eight() -> None:
    weight = Int4Weight(pack_int4(torch.full((1, 2), -8, dtype=torch.int8)), torch.ones(1, 1))
    x, _ = quantize_tokens(torch.tensor([[1.0, 1.0]]), "token")
    assert float(portable.gemm(x, weight)) == pytest.approx(-16.0, rel=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_grouped_gemm_takes_empty_and_hot_experts(
    granularity: Granularity, lognormal: Rows, generator: torch.Generator
) -> None:
    weights = [quantize_int4(lognormal(96, 256) * 0.02) for _ in range(5)]
    x, _ = quantize_tokens(lognormal(90, 256), granularity)
    offsets = torch.tensor([0, 0, 85, 86, 86, 90])
    row_weights = torch.rand(90, generator=generator)
    y = portable.grouped_gemm(x, offsets, weights, row_weights)
    exact = reference.grouped_gemm(x, offsets, weights, row_weights, torch.float64)
    assert relative_frobenius(y, exact) < 5e-7
    alone = portable.gemm(rows_of(x, slice(85, 86)), weights[2]) * row_weights[85]
    assert torch.equal(y[85:86], alone)
    unweighted = portable.grouped_gemm(x, offsets, weights, None)
    assert torch.equal(unweighted * row_weights[:, None], y)


def test_no_rows_give_no_rows(lognormal: Rows) -> None:
    x, _ = quantize_tokens(torch.empty(0, 256), "token")
    weights = [quantize_int4(lognormal(96, 256))] * 2
    assert list(portable.grouped_gemm(x, torch.zeros(3, dtype=torch.int64), weights, None).shape) == [0, 96]


def test_a_poisoned_row_touches_no_other(lognormal: Rows) -> None:
    x, _ = quantize_tokens(lognormal(4, 256), "token")
    weight = quantize_int4(lognormal(50, 256))
    clean = portable.gemm(x, weight)
    values = x.values.view(torch.uint8).clone()
    values[1, 3] = 0x7F
    result = portable.gemm(Quantized(values.view(torch.float8_e4m3fn), x.scales), weight)
    assert torch.equal(result[[0, 2, 3]], clean[[0, 2, 3]])
    assert bool(result[1].isnan().all())


def test_strided_arguments_give_the_same_bits(lognormal: Rows) -> None:
    wide = lognormal(4, 512)
    x, _ = quantize_tokens(wide[:, :256], "token")
    packed, _ = quantize_tokens(wide[:, :256].clone(), "token")
    weight = quantize_int4(lognormal(50, 512))
    half = Int4Weight(weight.codes[:, :128], weight.scales[:, :2])
    whole = Int4Weight(half.codes.clone(), half.scales.clone())
    assert torch.equal(portable.gemm(x, half), portable.gemm(packed, whole))
