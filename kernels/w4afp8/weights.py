"""Weights: int4 with group scales and fp8 with block scales, to and from float."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from w4afp8.tensors import FP8_BLOCK, FP8_MAX, Fp8BlockWeight, Int4Weight

SEARCH_FACTORS = (1.0, 0.93, 0.875, 0.84, 0.8, 0.76, 0.72)
"""Scales that a search tries, in units of amax / 7; at 0.875 = 7/8 the code -8 reaches a largest value below zero.

Of normal weights in groups of 128 these bring the relative error from 0.1173 to 0.1013; steps of 0.005 from 0.5 on
would reach 0.1009, at 14 times the work.
"""

SEARCH_ELEMENTS = 1 << 20
"""Elements searched at a time, in whole rows: bounds the float32 temporaries to three of 4 MiB; smaller is slower."""


class SearchedWeight(NamedTuple):
    """An int4 weight whose scales were searched, and what that gained.

    weight: codes [N, K/2], scales [N, K/group].
    rtn_error, error: [N, K/group] float64, sum of a group's squared errors with scale amax / 7 and with the one taken.
    """

    weight: Int4Weight
    rtn_error: torch.Tensor
    error: torch.Tensor


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Pack two's complement 4 bit codes in pairs; the low nibble holds the even index.

    q: [..., K] int8 in [-8, 7], K even.
    Returns: [..., K/2] int8.
    Raises: ValueError for another dtype, an odd K or a code out of range.
    Source: the layout of SGLang's w4afp8 loader and TensorRT-LLM's mixed-precision MoE writer.
    """
    if q.dtype != torch.int8:
        raise ValueError(f"q: expected int8, got {q.dtype}")
    if q.ndim == 0 or q.shape[-1] % 2:
        raise ValueError(f"q: expected an even last dimension, got shape {list(q.shape)}")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ValueError(f"q: expected codes in [-8, 7], got {int(q.min())} to {int(q.max())}")
    return (q[..., 0::2] & 15) | (q[..., 1::2] << 4)


def unpack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Undo `pack_int4`.

    codes: [..., K/2] int8.
    Returns: [..., K] int8 in [-8, 7].
    Raises: ValueError for another dtype.
    """
    if codes.dtype != torch.int8:
        raise ValueError(f"codes: expected int8, got {codes.dtype}")
    # A shift to the right of a signed byte repeats its sign, which extends the nibble.
    return torch.stack(((codes << 4) >> 4, codes >> 4), dim=-1).flatten(-2)


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> Int4Weight:
    """Quantize a weight to int4 with scale = amax / 7 per output channel and group of inputs.

    weight: [N, K] floating point.
    group_size: inputs that share one scale; divides K and is even.
    Returns: codes [N, K/2] and scales [N, K/group_size]; a group of zeros has scale 0 and codes 0.
    Raises: ValueError for a bad shape, dtype or group size, and for NaN or Inf.
    Source: TensorRT-LLM examples/quantization/quantize_mixed_precision_moe.py (rounding half to even).
    """
    groups = _groups(weight, group_size)
    return _rounded(groups, groups.abs().amax(dim=2) / 7)


def search_int4(weight: torch.Tensor, group_size: int = 128) -> SearchedWeight:
    """Quantize a weight to int4 with the scale of least squared error, of `SEARCH_FACTORS` times amax / 7.

    A scale below amax / 7 cuts the largest values off and rounds all others more finely. No group's error is larger
    than that of `quantize_int4`; of equal errors the larger scale wins. Bits depend on the group alone.

    weight: [N, K] floating point.
    group_size: inputs that share one scale; divides K and is even.
    Returns: the weight, and each group's squared error before and after.
    Raises: ValueError for a bad shape, dtype or group size, and for NaN or Inf.
    Source: AWQ, arXiv 2306.00978, clips weights where the error is least; here the error is that of the weights alone.
    """
    groups = _groups(weight, group_size)
    height = max(1, SEARCH_ELEMENTS // (groups.shape[1] * groups.shape[2]))
    searched = [_search(block) for block in torch.split(groups, height)]
    scales, rtn_error, error = (torch.cat(column) for column in zip(*searched, strict=True))
    return SearchedWeight(_rounded(groups, scales), rtn_error, error)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Expand an int4 weight: w = q * scale.

    weight: codes [N, K/2], scales [N, K/group].
    dtype: of the result; the product itself is float32, or float64 where that is asked for.
    Returns: [N, K].
    Raises: ValueError where the scales do not divide the inputs evenly.
    """
    codes = unpack_int4(weight.codes)
    rows, columns = codes.shape
    if weight.scales.ndim != 2 or weight.scales.shape[0] != rows or columns % weight.scales.shape[1]:
        raise ValueError(f"scales: expected [{rows}, a divisor of {columns}], got {list(weight.scales.shape)}")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    groups = codes.view(rows, weight.scales.shape[1], -1).to(compute)
    return (groups * weight.scales.to(compute).unsqueeze(2)).view(rows, columns).to(dtype)


def quantize_fp8_block(weight: torch.Tensor) -> Fp8BlockWeight:
    """Quantize a weight to e4m3 with scale = amax / 448 per 128 x 128 block.

    weight: [N, K] floating point; edge blocks may be smaller.
    Returns: values [N, K] and scales [ceil(N/128), ceil(K/128)]; a block of zeros has scale 0.
    Raises: ValueError for a bad shape or dtype, and for NaN or Inf.
    Source: DeepSeek-V3 report, arXiv 2412.19437 section 3.3.2.
    """
    values = _checked(weight)
    rows, columns = values.shape
    padded = pad(values, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    spread = scales[:, None, :, None]
    quantized = (blocks / spread).clamp_(-FP8_MAX, FP8_MAX).masked_fill_(spread == 0, 0)
    return Fp8BlockWeight(quantized.view_as(padded)[:rows, :columns].contiguous().to(torch.float8_e4m3fn), scales)


def dequantize_fp8_block(weight: Fp8BlockWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Expand a block-scaled fp8 weight: w = value * scale of its block.

    weight: values [N, K], scales [ceil(N/128), ceil(K/128)].
    dtype: of the result; the product itself is float32, or float64 where that is asked for.
    Returns: [N, K].
    Raises: ValueError where there is not one scale for each block.
    """
    rows, columns = weight.values.shape
    expected = [-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)]
    if list(weight.scales.shape) != expected:
        raise ValueError(f"scales: expected {expected} for values [{rows}, {columns}], got {list(weight.scales.shape)}")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    spread = weight.scales.to(compute).repeat_interleave(FP8_BLOCK, 0)[:rows]
    spread = spread.repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return (weight.values.to(compute) * spread).to(dtype)


def _groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return `weight` [N, K] as float32 [N, K/group_size, group_size], or raise ValueError."""
    values = _checked(weight)
    rows, columns = values.shape
    if group_size < 2 or group_size % 2 or columns % group_size:
        raise ValueError(f"group_size: expected an even divisor of K = {columns}, got {group_size}")
    return values.view(rows, columns // group_size, group_size)


def _rounded(groups: torch.Tensor, scales: torch.Tensor) -> Int4Weight:
    """Round groups [N, G, group] to codes by scales [N, G]."""
    # A scale of 0 (zeros, or subnormals too small to divide) would divide 0 by 0.
    codes = (groups / scales.unsqueeze(2)).round_().clamp_(-8, 7).masked_fill_(scales.unsqueeze(2) == 0, 0)
    return Int4Weight(pack_int4(codes.to(torch.int8).flatten(1)), scales)


def _search(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the scales of groups [N, G, group].

    Returns: scales float32, squared error with amax / 7 and with these scales float64, each [N, G].
    """
    largest = groups.abs().amax(dim=2) / 7
    scales = torch.stack([largest * factor for factor in SEARCH_FACTORS])
    steps, codes = torch.empty_like(groups), torch.empty_like(groups)
    errors = torch.empty_like(scales)
    for number, tried in enumerate(scales):
        torch.div(groups, tried.unsqueeze(2), out=steps)
        torch.round(steps, out=codes)
        torch.sum(steps.sub_(codes.clamp_(-8, 7)).square_(), dim=2, out=errors[number])
    # In units of `largest`, so that no square over- or underflows. A scale of 0 has no error that could be the least.
    errors.mul_((scales / largest).square_()).nan_to_num_(nan=torch.inf)
    least = errors.argmin(dim=0, keepdim=True)  # the first of equals
    unit = largest.double().square_()
    rtn_error, error = (
        (found.double() * unit).masked_fill_(largest == 0, 0) for found in (errors[0], errors.gather(0, least)[0])
    )
    return scales.gather(0, least)[0], rtn_error, error


def _checked(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [N, K] as float32, or raise ValueError for what cannot be quantized."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a shape [N, K] without zeros, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected floating point, got {weight.dtype}")
    values = weight.to(torch.float32).contiguous()
    if not bool(values.isfinite().all()):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return values
