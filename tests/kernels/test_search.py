"""Searched int4 scales: no group worse, errors as told, importance of channels, and bits of no device of its own."""

from __future__ import annotations

import pytest
import torch

from w4afp8 import Int4Weight, dequantize_int4, quantize_int4, search, unpack_int4
from w4afp8.search import SEARCH_FACTORS, search_int4


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
    for told, quantized in (
        (searched.weight_errors.search, searched.weight),
        (searched.weight_errors.rtn, quantize_int4(weight)),
    ):
        torch.testing.assert_close(told, squared_error(weight, quantized), rtol=1e-4, atol=float(size) * 1e-9)
    assert bool((searched.weight_errors.search <= searched.weight_errors.rtn).all())


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
    assert not searched.weight_errors.search.any()


def test_a_search_gains_an_eighth_of_the_error_of_normal_weights(generator: torch.Generator) -> None:
    weight = torch.randn(256, 1024, generator=generator)
    searched = search_int4(weight)
    assert float(searched.weight_errors.search.sum() / searched.weight_errors.rtn.sum()) ** 0.5 < 7 / 8


def test_a_searched_group_of_zeros_or_of_the_smallest_subnormals_is_a_group_of_zeros() -> None:
    weight = torch.cat((torch.zeros(2, 128), torch.full((2, 128), 1.4e-45), torch.ones(2, 128)), dim=1)
    searched = search_int4(weight)
    assert searched.weight.scales[:, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert not unpack_int4(searched.weight.codes)[:, :256].any()
    assert bool(searched.weight_errors.search.isfinite().all())
    assert not searched.weight_errors.search[:, :2].any()


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
    monkeypatch.setattr(search, "SEARCH_ELEMENTS", 3 * 384)
    for part, rows in ((search_int4(weight), slice(None)), (search_int4(weight[11:12]), slice(11, 12))):
        assert torch.equal(part.weight.codes, whole.weight.codes[rows])
        assert torch.equal(part.weight.scales, whole.weight.scales[rows])
        assert torch.equal(part.weight_errors.search, whole.weight_errors.search[rows])
    column = search_int4(weight[:, 128:256].contiguous())
    assert torch.equal(column.weight.scales, whole.weight.scales[:, 1:2])


def importance_of(kind: str, generator: torch.Generator) -> torch.Tensor:
    """E[x_k^2] of 512 channels: a few large ones, the ends of float32, or a group that never sees anything."""
    values = (2 * torch.randn(512, generator=generator)).exp()
    if kind == "silent group":
        values[128:256] = 0
    return values * {"tiny": 1e-38, "huge": 1e36}.get(kind, 1.0)


def output_error(weight: torch.Tensor, quantized: Int4Weight, importance: torch.Tensor) -> torch.Tensor:
    """Sum of E[x_k^2] (w_k - q_k s)^2 of each group [N, G], float64."""
    rows, groups = quantized.scales.shape
    squares = (dequantize_int4(quantized, torch.float64) - weight.double()).square() * importance.double()
    return squares.view(rows, groups, -1).sum(2)


@pytest.mark.parametrize("kind", ["lognormal", "silent group", "tiny", "huge"])
def test_importance_makes_no_group_of_outputs_worse(kind: str, generator: torch.Generator) -> None:
    weight, importance = torch.randn(40, 512, generator=generator), importance_of(kind, generator)
    plain = quantize_int4(weight)
    searched, calibrated = search_int4(weight), search_int4(weight, importance=importance)
    errors = [output_error(weight, found, importance) for found in (plain, searched.weight, calibrated.weight)]
    for other in errors[:2]:
        assert bool((errors[2] <= other * (1 + 1e-5)).all())
    assert float(errors[2].sum()) < 0.97 * float(errors[1].sum())
    told = calibrated.output_errors
    assert told is not None
    assert told.calibrated is not None
    for exact, column in zip(errors, (told.rtn, told.search, told.calibrated), strict=True):
        torch.testing.assert_close(column, exact, rtol=1e-4, atol=0)
    whole = (weight.double().square() * importance.double()).view(40, 4, 128).sum(2)
    torch.testing.assert_close(told.total, whole, rtol=1e-5, atol=0)


def test_the_errors_of_weights_are_told_of_all_three_scales(generator: torch.Generator) -> None:
    weight, importance = torch.randn(40, 512, generator=generator), importance_of("lognormal", generator)
    searched, calibrated = search_int4(weight), search_int4(weight, importance=importance)
    told = calibrated.weight_errors
    assert torch.equal(told.total, searched.weight_errors.total)
    assert torch.equal(told.rtn, searched.weight_errors.rtn)
    assert torch.equal(told.search, searched.weight_errors.search)
    assert told.calibrated is not None
    torch.testing.assert_close(told.calibrated, squared_error(weight, calibrated.weight), rtol=1e-4, atol=0)
    assert float(told.calibrated.sum()) > float(told.search.sum())  # what outputs gain, weights lose


def test_channels_of_equal_importance_change_nothing(generator: torch.Generator) -> None:
    weight = torch.randn(16, 512, generator=generator)
    plain = search_int4(weight).weight
    for value in (0.0, 3.0):
        found = search_int4(weight, importance=torch.full((512,), value)).weight
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(found.scales, plain.scales)


def test_a_group_where_nothing_arrives_is_searched_by_its_weights(generator: torch.Generator) -> None:
    weight, importance = torch.randn(16, 512, generator=generator), importance_of("silent group", generator)
    found, plain = search_int4(weight, importance=importance), search_int4(weight)
    assert torch.equal(found.weight.scales[:, 1], plain.weight.scales[:, 1])
    assert not torch.equal(found.weight.scales, plain.weight.scales)


def test_a_calibrated_group_has_the_same_bits_in_any_company(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = torch.randn(70, 384, generator=generator), torch.rand(384, generator=generator)
    whole = search_int4(weight, importance=importance)
    monkeypatch.setattr(search, "SEARCH_ELEMENTS", 3 * 384)
    part = search_int4(weight, importance=importance)
    assert torch.equal(part.weight.codes, whole.weight.codes)
    assert part.output_errors is not None
    assert whole.output_errors is not None
    assert all(torch.equal(*pair) for pair in zip(part.output_errors, whole.output_errors, strict=True))


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(256), r"importance: expected float32 \[512\], got torch.float32 \[256\]"),
        (torch.ones(512, dtype=torch.float64), r"importance: expected float32 \[512\], got torch.float64"),
        (torch.full((512,), -1.0), "importance: expected finite values that are not negative"),
        (torch.full((512,), torch.nan), "importance: expected finite values that are not negative"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused(importance: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_int4(torch.ones(4, 512), importance=importance)
