"""The grouped GEMM and the quantization of the kernel library, on a CPU in float64, from the packed weights.

Like the kernels they leave rows of no expert as they find them, here NaN.
"""

from __future__ import annotations

import itertools

import torch

from w4afp8 import Granularity, Quantized, dequantize_int4, dequantize_tokens, quantize_tokens
from w4afp8.activations import quantize_intermediate, scale_columns
from w4afp8.packed import TILE_ROWS, PackedWeight, unpack, widen_ratios
from w4afp8.packed_fp8 import CODE_BYTES


def grouped_gemm(
    x: Quantized,
    weight: PackedWeight,
    offsets: torch.Tensor,
    *,
    row_weights: torch.Tensor | None = None,
    epilogue: str = "plain",
    out_dtype: torch.dtype | None = None,
    expected_rows: int,
    early_start: bool = False,
) -> torch.Tensor:
    """Stands in for w4afp8.gemm.grouped_gemm."""
    rows, channels = x.values.shape
    assert channels == weight.k
    assert offsets.dtype == torch.int64
    assert list(offsets.shape) == [weight.experts + 1]
    assert expected_rows >= 1
    assert epilogue == "plain" or row_weights is None
    assert epilogue == "plain" or out_dtype is None
    swiglu = epilogue == "swiglu"
    dtype = torch.float32 if swiglu else out_dtype or torch.bfloat16
    out = torch.full((rows, weight.n // 2 if swiglu else weight.n), torch.nan, dtype=dtype)
    for expert, (low, high) in enumerate(itertools.pairwise(offsets.tolist())):
        part = dequantize_tokens(Quantized(x.values[low:high], x.scales[low:high])).to(torch.float64)
        y = part @ exact(weight, expert).T
        if swiglu:
            gate, up = torch.unflatten(y, 1, (-1, 2, 8)).unbind(2)
            y = (torch.nn.functional.silu(gate) * up).flatten(1)
        out[low:high] = y if row_weights is None else y * row_weights[low:high, None].to(torch.float64)
    return out


def quantize_tokens_cuda(
    x: torch.Tensor,
    granularity: Granularity,
    num_rows: torch.Tensor | None = None,
    out: tuple[Quantized, torch.Tensor] | None = None,
    overflow: str = "zero",
) -> tuple[Quantized, torch.Tensor]:
    """Stands in for w4afp8.quantize.quantize_tokens_cuda."""
    live = x.shape[0] if num_rows is None else int(num_rows)
    values = torch.full(x.shape, 0x7F, dtype=torch.uint8)  # NaN in e4m3
    scales = torch.full((x.shape[0], scale_columns(x.shape[1], granularity)), torch.nan)
    flags = torch.ones(x.shape[0], dtype=torch.bool)
    quantized, flags[:live] = quantize_tokens(x[:live], granularity)
    if overflow == "nan":
        quantized = quantize_intermediate(x[:live], granularity)
    values[:live], scales[:live] = quantized.values.view(torch.uint8), quantized.scales
    if out is None:
        return Quantized(values.view(torch.float8_e4m3fn), scales), flags
    laid, laid_flags = out
    laid.values.view(torch.uint8).copy_(values)
    laid.scales.copy_(scales)
    return laid, laid_flags.copy_(flags)


def exact(weight: PackedWeight, expert: int) -> torch.Tensor:
    """Expand a packed expert: [N, K] float64."""
    if weight.codes == "int4":
        return dequantize_int4(unpack(weight, expert), torch.float64)
    blocks = weight.blocks[expert]
    words = torch.unflatten(blocks.view(torch.int32)[..., : CODE_BYTES // 4], 2, (2, 4, 4, 8, 4, 2, 2))
    words = words.permute(0, 2, 4, 8, 5, 1, 3, 7, 6)  # tile, wg, w, hi, l4, block, step, r1, lm
    values = words.reshape(blocks.shape[0] * TILE_ROWS, -1).view(torch.float8_e4m3fn).to(torch.float64)
    ratios = torch.unflatten(blocks.view(torch.int16)[..., CODE_BYTES // 2 :], 2, (2, 4, 8, 2))
    ratios = widen_ratios(ratios).to(torch.float64)
    scales = ratios.permute(0, 2, 3, 5, 4, 1).reshape(values.shape[0], -1)  # tile, wg, w, hi, l4
    scales = scales * weight.channel_scales[expert, :, None].to(torch.float64)
    groups = torch.unflatten(values, 1, (scales.shape[1], -1)) * scales[:, :, None]
    return groups.flatten(1)[: weight.n, : weight.k]
