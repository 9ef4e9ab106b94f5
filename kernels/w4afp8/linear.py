"""A float32 matrix product whose bits do not depend on the batch, for router logits.

A BLAS may add the products of a row in any order, and picks the order by the size of the batch. The order cannot
matter where every product and every partial sum is exact. So each row is cut into two slices of `bits` bits below its
largest power of two: integers high and low with row = 2^exponent * (high * 2^-bits + low * 2^-2bits). A float64 sum
of H products of two such integers is exact while 2 * bits + log2(H) <= 53, whatever the order, fused or not. The
four slice products are then put together by elementwise steps in a fixed order. What is cut off lies 2^-41 below the
row's largest element for H = 7168, far under float32's own rounding. (This is the error-free transformation of
Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication", Numerical Algorithms 59, 2012.)

Measured against elementwise products added in a fixed order, on two cores with H = 7168 and E = 256: 7, 12, 16 and
35 ms for 1, 4, 16 and 64 tokens against 4, 13, 51 and 208 ms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from w4afp8.elementwise import power_of_two

_DOUBLE_BITS = 53
# Elements of the two operands held in float64 at a time: 2 x 8 bytes x 2^20 = 16 MiB of tokens, 4 MiB of weights.
_TOKEN_ELEMENTS = 1 << 20
_WEIGHT_ELEMENTS = 1 << 18
# On a GPU a block of tokens costs some twenty launches: 256 MiB at a time.
_CUDA_TOKEN_ELEMENTS = 1 << 24


class SlicedWeight(NamedTuple):
    """A weight cut once, for products with many batches; four times the bytes of the float32 weight.

    slices: [2E, H] float64, integers: the high slices of all rows above the low ones.
    units: [E, 1] float64, each row's power of two.
    """

    slices: torch.Tensor
    units: torch.Tensor


def slice_weight(weight: torch.Tensor) -> SlicedWeight:
    """Cut a weight for `linear`, which gives the same bits with it as with the weight itself.

    weight: [E, H] float32, finite.
    Raises: ValueError for another dtype or shape.
    """
    if weight.dtype != torch.float32 or weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected float32 [E, H], got {weight.dtype} {list(weight.shape)}")
    return SlicedWeight(*_slices(weight, slice_bits(weight.shape[1])))


def linear(x: torch.Tensor, weight: torch.Tensor | SlicedWeight) -> torch.Tensor:
    """Multiply x by the transpose of weight; the bits of a row depend on that row and the weight alone.

    x: [T, H] float32; NaN or Inf in a row makes that row of the result NaN and no other.
    weight: [E, H] float32, finite, or what `slice_weight` made of it.
    Returns: [T, E] float32.
    Raises: ValueError for another dtype or shapes that do not fit.
    """
    dtype, shape = _dtype_and_shape(weight)
    if x.dtype != torch.float32 or dtype != torch.float32:
        raise ValueError(f"x, weight: expected float32, got {x.dtype} and {dtype}")
    if x.ndim != 2 or len(shape) != 2 or x.shape[1] != shape[1] or x.shape[1] == 0:
        raise ValueError(f"x, weight: expected [T, H] and [E, H], got {list(x.shape)} and {shape}")
    inputs = x.shape[1]
    bits = slice_bits(inputs)
    y = torch.empty(x.shape[0], shape[0], dtype=torch.float32, device=x.device)
    tokens = max(1, (_CUDA_TOKEN_ELEMENTS if x.is_cuda else _TOKEN_ELEMENTS) // inputs)
    outputs = max(1, shape[0] if isinstance(weight, SlicedWeight) else _WEIGHT_ELEMENTS // inputs)
    for t in range(0, x.shape[0], tokens):
        left, left_unit = _slices(x[t : t + tokens], bits)
        for n in range(0, shape[0], outputs):
            right, right_unit = weight if isinstance(weight, SlicedWeight) else _slices(weight[n : n + outputs], bits)
            y[t : t + tokens, n : n + outputs] = _combine(left @ right.T, bits) * left_unit * right_unit.T
    return y


def slice_bits(inputs: int) -> int:
    """Return how many bits a slice has where `inputs` products of two slices are added up exactly."""
    return (_DOUBLE_BITS - (inputs - 1).bit_length()) // 2


def _dtype_and_shape(weight: torch.Tensor | SlicedWeight) -> tuple[torch.dtype, list[int]]:
    if isinstance(weight, SlicedWeight):
        return torch.float32, [weight.units.shape[0], weight.slices.shape[1]]
    return weight.dtype, list(weight.shape)


def _slices(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut rows [R, H] into integer slices.

    Returns: [2R, H] float64, the high slices above the low ones, and each row's power of two [R, 1] float64.
    """
    wide = rows.to(torch.float64)
    peak = wide.abs().amax(dim=1, keepdim=True)
    peak = peak.masked_fill(~peak.isfinite(), 1.0)  # such a row turns into NaN below
    exponent = torch.frexp(peak).exponent.to(torch.int64)
    slices = torch.empty(2, *wide.shape, dtype=torch.float64, device=rows.device)
    wide.mul_(power_of_two(bits - exponent))
    torch.round(wide, out=slices[0])
    torch.sub(wide, slices[0], out=slices[1])  # Inf - Inf is NaN
    slices[1].mul_(2.0**bits).round_()
    return slices.view(-1, wide.shape[1]), power_of_two(exponent)


def _combine(products: torch.Tensor, bits: int) -> torch.Tensor:
    """Add the four slice products [2T, 2E] with their weights: [T, E] float64 in units of both rows' powers of two."""
    upper, lower = products.chunk(2, dim=0)
    high_high, high_low = upper.chunk(2, dim=1)
    low_high, low_low = lower.chunk(2, dim=1)
    y = (high_low + low_high) * 2.0**-bits + high_high
    return (low_low * 2.0 ** (-2 * bits) + y) * 2.0 ** (-2 * bits)
