"""Weights: int4 with group scales and fp8 with block scales, to and from float."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from w4afp8.tensors import FP8_BLOCK, FP8_MAX, Fp8BlockWeight, Int4Weight


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
    groups = split_groups(weight, group_size)
    return round_groups(groups, full_scales(groups))


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
    scales = _divided(_finite(blocks.abs().amax(dim=(1, 3))), FP8_MAX)
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


def split_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return `weight` [N, K] as float32 [N, K/group_size, group_size]; ValueError where it cannot be quantized."""
    values = _checked(weight)
    rows, columns = values.shape
    if group_size < 2 or group_size % 2 or columns % group_size:
        raise ValueError(f"group_size: expected an even divisor of K = {columns}, got {group_size}")
    return values.view(rows, columns // group_size, group_size)


def full_scales(groups: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] with which nothing of groups [N, G, group] is cut off: amax / 7; ValueError for NaN or Inf."""
    return _divided(_finite(groups.abs().amax(dim=2)), 7)


def round_groups(groups: torch.Tensor, scales: torch.Tensor) -> Int4Weight:
    """Round groups [N, G, group] to codes by scales [N, G]."""
    # A scale of 0 (zeros, or subnormals too small to divide) would divide 0 by 0.
    codes = (groups / scales.unsqueeze(2)).round_().clamp_(-8, 7).masked_fill_(scales.unsqueeze(2) == 0, 0)
    return Int4Weight(pack_int4(codes.to(torch.int8).flatten(1)), scales)


def _divided(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide, to the same bits on every device: CUDA would multiply by the reciprocal of a Python number."""
    return values / torch.full_like(values, divisor)


def _finite(largest: torch.Tensor) -> torch.Tensor:
    """Return the largest sizes, which NaN and Inf are among if there are any, or raise ValueError."""
    if not bool(largest.isfinite().all()):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return largest


def _checked(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [N, K] as float32, or raise ValueError for what is no weight."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a shape [N, K] without zeros, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected floating point, got {weight.dtype}")
    return weight.to(torch.float32).contiguous()
