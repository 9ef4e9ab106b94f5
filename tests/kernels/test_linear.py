"""The batch-invariant float32 product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from w4afp8.linear import slice_weight
from w4afp8.portable import linear

Rows = Callable[[int, int], torch.Tensor]
Threads = Callable[[int], None]


def test_results_are_float32_exact_to_rounding(lognormal: Rows) -> None:
    x, weight = lognormal(37, 1000), lognormal(96, 1000)
    exact = x.double() @ weight.double().T
    bound = exact.abs() * 2**-24 + (x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)) * 2**-34
    assert bool(((linear(x, weight).double() - exact).abs() <= bound).all())


def test_outlier_channels_do_not_spoil_the_rest(generator: torch.Generator) -> None:
    x, weight = torch.randn(4, 7168, generator=generator), torch.randn(8, 7168, generator=generator)
    x[:, 100] = 5000.0  # a massive activation
    weight[:, 100] = 0.0
    exact = x.double() @ weight.double().T
    assert torch.allclose(linear(x, weight).double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e15])
def test_the_size_of_rows_does_not_matter(size: float, lognormal: Rows) -> None:
    x, weight = lognormal(3, 64), lognormal(5, 64)
    assert torch.allclose(linear(x * size, weight) / size, linear(x, weight), rtol=1e-5)


def test_neither_batch_nor_order_nor_threads_nor_blocks_change_bits(
    lognormal: Rows, generator: torch.Generator, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = lognormal(150, 1536), lognormal(64, 1536)
    threads(2)
    whole = linear(x, weight)
    order = torch.randperm(150, generator=generator)
    assert torch.equal(linear(x[order], weight), whole[order])
    for count in (1, 2, 3, 31):
        assert torch.equal(linear(x[:count], weight), whole[:count])
    threads(1)
    assert torch.equal(linear(x, weight), whole)
    monkeypatch.setattr("w4afp8.linear._TOKEN_ELEMENTS", 7 * 1536)
    monkeypatch.setattr("w4afp8.linear._WEIGHT_ELEMENTS", 5 * 1536)
    assert torch.equal(linear(x, weight), whole)


def test_a_weight_cut_once_gives_the_same_bits(lognormal: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = lognormal(150, 1536), lognormal(64, 1536)
    cut = slice_weight(weight)
    assert torch.equal(linear(x, cut), linear(x, weight))
    assert torch.equal(linear(x[:1], cut), linear(x, weight)[:1])
    monkeypatch.setattr("w4afp8.linear._TOKEN_ELEMENTS", 7 * 1536)
    assert torch.equal(linear(x, cut), linear(x, weight))
    with pytest.raises(ValueError, match=r"got \[150, 1536\] and \[64, 1535\]"):
        linear(x, slice_weight(weight[:, 1:]))
    with pytest.raises(ValueError, match=r"weight: expected float32 \[E, H\], got torch.float64"):
        slice_weight(weight.double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_row_is_nan_and_alone(bad: float, lognormal: Rows) -> None:
    x, weight = lognormal(5, 128), lognormal(9, 128)
    clean = linear(x, weight)
    x[3, 17] = bad
    result = linear(x, weight)
    assert bool(result[3].isnan().all())
    assert torch.equal(result[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


def test_zero_rows_and_no_rows() -> None:
    weight = torch.ones(4, 64)
    assert torch.equal(linear(torch.zeros(2, 64), weight), torch.zeros(2, 4))
    assert list(linear(torch.zeros(0, 64), weight).shape) == [0, 4]


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 4).bfloat16(), torch.ones(3, 4), "expected float32, got torch.bfloat16"),
        (torch.ones(2, 4), torch.ones(3, 5), r"got \[2, 4\] and \[3, 5\]"),
        (torch.ones(4), torch.ones(3, 4), r"expected \[T, H\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(x, weight)
