"""exp, sigmoid and SwiGLU: accuracy, limits, and bits that do not depend on position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from w4afp8 import portable

Threads = Callable[[int], None]


@pytest.fixture
def arguments(generator: torch.Generator) -> torch.Tensor:
    """1003 values over all of exp's range, a length that leaves a tail after any vector width."""
    return (torch.rand(1003, generator=generator) * 2 - 1) * torch.logspace(-6, 1.9, 1003)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((result.double() - exact).abs() / exact.abs()).max())


def test_exp_is_within_half_a_unit_in_the_last_place(arguments: torch.Tensor) -> None:
    assert relative_error(portable.exp(arguments), arguments.double().exp()) < 6.1e-8


def test_exp_is_monotone_over_neighbouring_floats() -> None:
    x = torch.linspace(-2, 2, 100_001)
    assert bool((portable.exp(x).diff() >= 0).all())


def test_sigmoid_is_accurate(arguments: torch.Tensor) -> None:
    assert relative_error(portable.sigmoid(arguments), arguments.double().sigmoid()) < 2e-7


def test_silu_mul_is_accurate(arguments: torch.Tensor) -> None:
    up = arguments.flip(0).reshape(17, 59)
    gate = arguments.reshape(17, 59)
    exact = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    normal = exact.abs() > 1e-37
    result = portable.silu_mul(gate, up)
    assert relative_error(result[normal], exact[normal]) < 2e-7


@pytest.mark.parametrize("function", [portable.exp, portable.sigmoid])
def test_position_does_not_change_bits(function: Callable[..., torch.Tensor], arguments: torch.Tensor) -> None:
    whole = function(arguments)
    assert torch.equal(torch.cat([function(one) for one in torch.split(arguments, 1)]), whole)
    for shift in range(1, 17):
        assert torch.equal(function(arguments[shift:].clone()), whole[shift:])
    assert torch.equal(function(arguments.repeat(300))[-1003:], whole)


def test_neither_batch_nor_order_nor_threads_change_bits_of_silu_mul(
    generator: torch.Generator, threads: Threads
) -> None:
    gate = torch.randn(301, 333, generator=generator) * 4
    up = torch.randn(301, 333, generator=generator)
    threads(2)
    whole = portable.silu_mul(gate, up)
    order = torch.randperm(301, generator=generator)
    assert torch.equal(portable.silu_mul(gate[order], up[order]), whole[order])
    for row in (0, 150, 300):
        assert torch.equal(portable.silu_mul(gate[row : row + 1], up[row : row + 1])[0], whole[row])
    threads(1)
    assert torch.equal(portable.silu_mul(gate, up), whole)


def test_limits_are_right_and_never_nan() -> None:
    x = torch.tensor([-3.4e38, -1e4, -200.0, -104.0, 0.0, 88.0, 89.0, 1e4, 3.4e38])
    exp = portable.exp(x)
    assert exp[:3].tolist() == [0.0, 0.0, 0.0]
    assert float(exp[4]) == 1.0
    assert bool(exp[5].isfinite())
    assert bool(exp[6:].isinf().all())
    sigmoid = portable.sigmoid(x)
    assert sigmoid[:3].tolist() == [0.0, 0.0, 0.0]
    assert float(sigmoid[4]) == 0.5
    assert sigmoid[5:].tolist() == [1.0] * 4
    ones = torch.ones_like(x)
    silu = portable.silu_mul(x[None], ones[None])[0]
    assert torch.equal(silu[:3], torch.zeros(3))
    assert torch.equal(silu[5:], x[5:])
    assert bool((portable.silu_mul(x[None], 3.4e38 * ones[None])).isnan().logical_not().all())


def test_subnormal_results_are_kept() -> None:
    x = torch.tensor([-100.0])
    assert float(portable.exp(x)) == pytest.approx(float(x.double().exp()), rel=0.02)
    assert float(portable.sigmoid(x)) > 0


def test_nan_stays_nan_and_alone() -> None:
    x = torch.tensor([0.0, torch.nan, 1.0])
    assert portable.exp(x).isnan().tolist() == [False, True, False]
    assert portable.sigmoid(x).isnan().tolist() == [False, True, False]
    assert portable.silu_mul(x, x).isnan().tolist() == [False, True, False]


def test_halving_sum_adds_every_column_in_a_fixed_order(generator: torch.Generator) -> None:
    x = torch.randn(40, 27, generator=generator)
    whole = portable.halving_sum(x)
    assert torch.allclose(whole.double(), x.double().sum(1), atol=1e-5)
    assert torch.equal(torch.cat([portable.halving_sum(row[None]) for row in x]), whole)


def test_other_dtypes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected float32, got torch\.float64"):
        portable.exp(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="x: expected float32"):
        portable.sigmoid(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"up: expected the shape of gate \[2, 3\]"):
        portable.silu_mul(torch.ones(2, 3), torch.ones(2, 4))
