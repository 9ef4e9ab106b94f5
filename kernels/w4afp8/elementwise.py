"""exp, sigmoid and SwiGLU whose bits depend on nothing but the argument.

torch's own exp, sigmoid and silu run a vectorised body and a scalar tail on CPU, which may differ in the last bit:
a value's result then depends on where in a batch it stands. Here every step is one correctly rounded operation
(IEEE 754 multiply, add, divide, convert), for which body and tail agree; multiply and add stay separate calls, so
that none is fused. The work is done in float64 and rounded to float32 once, which leaves an error of half a unit in
the last place and a hair.
"""

from __future__ import annotations

import math

import torch

_LOG2_E = 1 / math.log(2)
_LN_2 = math.log(2)
# Taylor's series to r^10: on |r| <= ln(2)/2 what is left out is below 0.35^11 / 11! = 3e-13 of the result.
_COEFFICIENTS = tuple(1 / math.factorial(degree) for degree in range(9, -1, -1))
_HIGHEST = 1 / math.factorial(10)
# Beyond this, exp is 0 or Inf in float32 by hundreds of powers of ten, and still a normal number in float64.
_BOUND = 700.0
# Elements worked on at a time: five float64 temporaries of this size stay in a second-level cache or near it.
_CHUNK = 1 << 16


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Make 2^exponent by setting the exponent bits, which no rounding can touch.

    exponent: int64 in [-1022, 1023].
    Returns: float64, the same shape.
    """
    return ((exponent + 1023) << 52).view(torch.float64)


def exp(x: torch.Tensor) -> torch.Tensor:
    """Exponential, below 1e-7 relative error, the same bits wherever a value stands.

    x: float32, any shape; NaN stays NaN.
    Returns: float32.
    Raises: ValueError for another dtype.
    """
    _check_float32("x", x)
    return _exp(x.to(torch.float64)).to(torch.float32)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Logistic function 1 / (1 + exp(-x)), below 1e-7 relative error, the same bits wherever a value stands.

    x: float32, any shape; NaN stays NaN.
    Returns: float32 in [0, 1].
    Raises: ValueError for another dtype.
    """
    _check_float32("x", x)
    return _exp(-x.to(torch.float64)).add_(1.0).reciprocal_().to(torch.float32)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's elementwise part, gate * sigmoid(gate) * up, the same bits wherever a row stands.

    gate, up: [T, I] float32.
    Returns: [T, I] float32; Inf or NaN only where the product exceeds float32 or an argument was not finite.
    Raises: ValueError for another dtype, or shapes that differ.
    """
    _check_float32("gate", gate)
    _check_float32("up", up)
    if gate.shape != up.shape:
        raise ValueError(f"up: expected the shape of gate {list(gate.shape)}, got {list(up.shape)}")
    y = torch.empty(gate.numel(), dtype=torch.float32, device=gate.device)
    flat_gate, flat_up = gate.reshape(-1), up.reshape(-1)
    for first in range(0, y.numel(), _CHUNK):
        part = slice(first, first + _CHUNK)
        wide = flat_gate[part].to(torch.float64)
        y[part] = wide.div_(_exp(-wide).add_(1.0)).mul_(flat_up[part])
    return y.view(gate.shape)


def halving_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row in one fixed order: the upper half is added to the lower until one column is left.

    x: [T, E] floating point.
    Returns: [T] of the same dtype; the bits of a row do not depend on the other rows.
    """
    width = 1 << max(x.shape[1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp of float64 `x`, exact to about 3e-13 and clamped to exp(+-700)."""
    x = x.clamp(-_BOUND, _BOUND)
    exponent = (x * _LOG2_E).round_()
    rest = x.sub_(exponent * _LN_2)
    y = torch.full_like(rest, _HIGHEST)
    for coefficient in _COEFFICIENTS:
        y.mul_(rest).add_(coefficient)
    return y.mul_(power_of_two(exponent.to(torch.int64)))


def _check_float32(name: str, x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"{name}: expected float32, got {x.dtype}")
