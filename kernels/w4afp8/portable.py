"""The GEMMs in blocked torch for any device, bit for bit independent of batch, row order, threads and ranks.

Why the bits cannot change. Codes and e4m3 values are multiples of a power of two with few bits: a group's sum of int4
x e4m3 is a multiple of 2^-9 below 2^19, and of e4m3 x e4m3 a multiple of 2^-18 below 2^25, so both fit float64's 53
bits with room to spare. Every product and every partial sum of a group is therefore exact, in any order, fused or
not: the BLAS may do as it likes. Each group's sum is rounded to float32 once; then it is multiplied by its scales and
added to the groups before it, by separate elementwise float32 operations in ascending order of groups. A row's result
depends on that row and the weight, and on nothing else.

Why float64 and not float32. Split by |a8| < 16, both halves of an int4 product are exact in float32 too, with the
halves stacked along T. That halves the bytes of the expanded weight and doubles the rows: on two AVX2 cores the
products of [4096, 7168] took 7 and 30 ms for 1 and 16 tokens against 6 and 28 ms. A draw, and float64 also serves
fp8 weights and cannot be broken by a global TF32 or bfloat16 matmul setting. (Group sums as in SGLang PR 21101;
`w4afp8.reference` is the specification.)

A weight is expanded in blocks of rows that stay in cache, never a whole layer. Nibbles are not interleaved again:
inside a group even k come first, then odd k, for weights and activations alike; sums are exact, so order is free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from w4afp8.checks import check_gemm, check_grouped, weight_group, weight_shape
from w4afp8.elementwise import exp, halving_sum, sigmoid, silu_mul
from w4afp8.linear import linear
from w4afp8.tensors import ACTIVATION_GROUP, FP8_BLOCK, Fp8BlockWeight, Int4Weight, Quantized

__all__ = ["exp", "gemm", "grouped_gemm", "halving_sum", "linear", "sigmoid", "silu_mul"]

# Weight elements expanded to float64 at a time: 4 MiB; below 2 MiB, and at 16, it was far slower on two cores.
_WEIGHT_ELEMENTS = 1 << 19
# Group sums held in float32 at a time: 16 MiB. Many rows at once keep the additions over groups few and long.
_PARTIAL_ELEMENTS = 1 << 22


def gemm(x: Quantized, weight: Int4Weight | Fp8BlockWeight) -> torch.Tensor:
    """Multiply quantized activations by a quantized weight; the bits of a row depend on nothing beside it.

    x: values [T, K] float8_e4m3fn, scales [T, 1] or [T, K/128] float32.
    weight: [N, K], int4 with group scales or fp8 with 128 x 128 block scales.
    Returns: [T, N] float32.
    Raises: ValueError naming what does not fit.
    """
    check_gemm(x, weight)
    group = weight_group(weight)
    tokens, (outputs, inputs) = x.values.shape[0], weight_shape(weight)
    groups = -(-inputs // group)
    block = max(1, _WEIGHT_ELEMENTS // (groups * group))
    token_block = max(1, _PARTIAL_ELEMENTS // (groups * block))
    y = torch.empty(tokens, outputs, dtype=torch.float32, device=x.values.device)
    for t in range(0, tokens, token_block):
        part = Quantized(x.values[t : t + token_block], x.scales[t : t + token_block])
        activations = _group_activations(part.values, group, isinstance(weight, Int4Weight))
        span = block * max(1, _PARTIAL_ELEMENTS // (groups * part.values.shape[0] * block))
        for first in range(0, outputs, span):
            last = min(first + span, outputs)
            sums = _group_sums(activations, weight, group, range(first, last, block), last)
            y[t : t + token_block, first:last] = _add_groups(sums, _row_scales(weight, first, last), part.scales, group)
    return y


def grouped_gemm(
    x: Quantized, offsets: torch.Tensor, weights: Sequence[Int4Weight], row_weights: torch.Tensor | None
) -> torch.Tensor:
    """Multiply each expert's rows by that expert's weight; the bits of a row depend on nothing beside it.

    x: [rows, K], the rows of expert e at offsets[e] to offsets[e + 1].
    offsets: [E+1] int64, ascending, from 0 to rows.
    weights: E weights [N, K].
    row_weights: [rows] float32, routing weight that multiplies a row of the result, or None.
    Returns: [rows, N] float32.
    Raises: ValueError naming what does not fit.
    """
    bounds = check_grouped(x, offsets, weights, row_weights)
    y = torch.empty(x.values.shape[0], weight_shape(weights[0])[0], dtype=torch.float32, device=x.values.device)
    for low, high, weight in zip(bounds[:-1], bounds[1:], weights, strict=True):
        if high > low:
            y[low:high] = gemm(Quantized(x.values[low:high], x.scales[low:high]), weight)
    return y if row_weights is None else y.mul_(row_weights.unsqueeze(1))


def _group_activations(values: torch.Tensor, group: int, even_odd: bool) -> torch.Tensor:
    """Arrange fp8 values [T, K] as float64 [groups, T, group], even channels first where `even_odd`."""
    wide = values.to(torch.float64)
    wide = torch.unflatten(pad(wide, (0, -wide.shape[1] % group)), 1, (-1, group))
    if even_odd:
        wide = torch.cat((wide[..., 0::2], wide[..., 1::2]), dim=2)
    return wide.transpose(0, 1).contiguous()


def _group_sums(
    activations: torch.Tensor, weight: Int4Weight | Fp8BlockWeight, group: int, firsts: range, last: int
) -> torch.Tensor:
    """Multiply and add inside each group, exactly, and round to float32.

    activations: [groups, T, group] float64.
    firsts, last: the first weight row of each block, and the end of the last block.
    Returns: [groups, T, rows] float32.
    """
    groups, tokens, _ = activations.shape
    sums = torch.empty(groups, tokens, last - firsts.start, dtype=torch.float32, device=activations.device)
    expanded = torch.zeros(
        groups, min(firsts.step, last - firsts.start), group, dtype=torch.float64, device=sums.device
    )
    for first in firsts:
        rows = min(firsts.step, last - first)
        block = expanded[:, :rows]
        if isinstance(weight, Int4Weight):
            packed = torch.unflatten(weight.codes[first : first + rows], 1, (groups, -1)).transpose(0, 1)
            block[..., : group // 2] = (packed << 4) >> 4
            block[..., group // 2 :] = packed >> 4
        else:
            bytes_ = weight.values[first : first + rows].view(torch.uint8)
            bytes_ = pad(bytes_, (0, -bytes_.shape[1] % group))
            block[:] = torch.unflatten(bytes_.view(torch.float8_e4m3fn), 1, (groups, -1)).transpose(0, 1)
        start = first - firsts.start
        sums[..., start : start + rows] = torch.bmm(activations, block.transpose(1, 2))
    return sums


def _row_scales(weight: Int4Weight | Fp8BlockWeight, first: int, last: int) -> torch.Tensor:
    """Scales of weight rows first to last: [groups, rows] float32."""
    if isinstance(weight, Int4Weight):
        return weight.scales[first:last].T
    rows = torch.arange(first, last, device=weight.scales.device) // FP8_BLOCK
    return weight.scales[rows].T


def _add_groups(sums: torch.Tensor, weight_scales: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Scale group sums and add them up in ascending order.

    sums: [groups, T, rows] float32, overwritten.
    weight_scales: [groups, rows]. scales: [T, 1] or [T, K/128], of the activations.
    Returns: [T, rows] float32.
    """
    sums.mul_(weight_scales.contiguous().unsqueeze(1))
    per_token = scales.shape[1] == 1
    if not per_token:
        sums.mul_(scales.repeat_interleave(ACTIVATION_GROUP // group, dim=1).T.unsqueeze(2))
    y = sums[0].clone()
    for index in range(1, sums.shape[0]):
        y.add_(sums[index])
    return y.mul_(scales) if per_token else y
