"""The specification of w4afp8 in plain torch: what every backend computes, written to be read.

y[t, n] = sa[t] * sum over groups g of sw[n, g] * (sum over k in g of q[n, k] * a8[t, k])

with int4 codes q, their group scales sw, e4m3 activations a8 and their scales sa (SGLang PR 21101; e4m3: OCP 8-bit
Floating Point Specification 1.0). With a scale per token and 128 channels, sa moves inside the sum. Group scales are
never rounded. A `dtype` of float64 turns the same lines into the oracle that backends are measured against;
activations are quantized in float32 either way, because that rounding is part of the contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from w4afp8.activations import quantize_intermediate, quantize_tokens
from w4afp8.checks import check_gemm, check_grouped, weight_group, weight_shape
from w4afp8.tensors import (
    ACTIVATION_GROUP,
    FP8_BLOCK,
    ExpertWeights,
    Fp8BlockWeight,
    Granularity,
    Int4Weight,
    Quantized,
    SharedExpert,
)
from w4afp8.weights import unpack_int4

__all__ = ["ExpertWeights", "SharedExpert", "expert_forward", "gemm", "grouped_gemm", "moe_layer", "silu_mul"]


def gemm(x: Quantized, weight: Int4Weight | Fp8BlockWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Multiply quantized activations by a quantized weight.

    x: values [T, K] float8_e4m3fn, scales [T, 1] or [T, K/128] float32.
    weight: [N, K], int4 with group scales or fp8 with 128 x 128 block scales.
    dtype: what is computed in, float32 or float64.
    Returns: [T, N] of `dtype`.
    Raises: ValueError naming what does not fit.
    """
    check_gemm(x, weight)
    group = weight_group(weight)
    codes = unpack_int4(weight.codes) if isinstance(weight, Int4Weight) else weight.values
    outputs, inputs = weight_shape(weight)
    weight_scales = weight.scales
    if isinstance(weight, Fp8BlockWeight):
        weight_scales = weight_scales.repeat_interleave(FP8_BLOCK, dim=0)[:outputs]
    per_token = x.scales.shape[1] == 1
    y = torch.zeros(x.values.shape[0], outputs, dtype=dtype, device=x.values.device)
    for first in range(0, inputs, group):
        activations = x.values[:, first : first + group].to(dtype)
        partial = activations @ codes[:, first : first + group].to(dtype).T
        partial = partial * weight_scales[:, first // group].to(dtype)
        if not per_token:
            partial = partial * x.scales[:, first // ACTIVATION_GROUP, None].to(dtype)
        y = y + partial
    return y * x.scales.to(dtype) if per_token else y


def grouped_gemm(
    x: Quantized,
    offsets: torch.Tensor,
    weights: Sequence[Int4Weight],
    row_weights: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Multiply each expert's rows by that expert's weight.

    x: [rows, K], the rows of expert e at offsets[e] to offsets[e + 1].
    offsets: [E+1] int64, ascending, from 0 to rows.
    weights: E weights [N, K].
    row_weights: [rows] float32, routing weight that multiplies a row of the result, or None.
    dtype: what is computed in, float32 or float64.
    Returns: [rows, N] of `dtype`.
    Raises: ValueError naming what does not fit.
    """
    bounds = check_grouped(x, offsets, weights, row_weights)
    parts = [
        gemm(Quantized(x.values[low:high], x.scales[low:high]), weight, dtype)
        for low, high, weight in zip(bounds[:-1], bounds[1:], weights, strict=True)
    ]
    y = torch.cat(parts)
    return y if row_weights is None else y * row_weights.to(dtype).unsqueeze(1)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's elementwise part: gate * sigmoid(gate) * up.

    gate, up: [T, I] floating point, computed in their own dtype.
    Returns: [T, I].
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; DeepSeek-V3's expert.
    """
    return gate * torch.sigmoid(gate) * up


def expert_forward(
    x: Quantized, expert: ExpertWeights | SharedExpert, granularity: Granularity, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Pass tokens through one expert: down(quantize(SiLU(gate(x)) * up(x))).

    x: [T, H]. expert: routed or shared. granularity: of the second quantization.
    dtype: what is computed in, float32 or float64.
    Returns: [T, H] of `dtype`; NaN in the rows of a token that overflowed float32 between the GEMMs.
    """
    hidden = silu_mul(gemm(x, expert.gate, dtype), gemm(x, expert.up, dtype))
    return gemm(quantize_intermediate(hidden.to(torch.float32), granularity), expert.down, dtype)


def moe_layer(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Sequence[ExpertWeights],
    shared: SharedExpert | None,
    granularity: Granularity,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Run the MoE part of one layer on routed tokens.

    x: [T, H] bfloat16, float16 or float32.
    topk_ids: [T, K] integer, expert of each route. topk_weights: [T, K] float32.
    experts: all E of the layer. shared: added for every token, or None.
    granularity: of both quantizations. dtype: what is computed in, float32 or float64.
    Returns: [T, H] of `dtype`; NaN in the rows of tokens that held NaN or Inf.
    Raises: ValueError for ids out of range or shapes that do not fit.
    Source: DeepSeek-V3 report, arXiv 2412.19437 section 2.1.2.
    """
    if topk_ids.shape != topk_weights.shape or topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"topk_ids, topk_weights: expected both [{x.shape[0]}, K], "
            f"got {list(topk_ids.shape)} and {list(topk_weights.shape)}"
        )
    if topk_ids.numel() and (int(topk_ids.min()) < 0 or int(topk_ids.max()) >= len(experts)):
        raise ValueError(f"topk_ids: expected 0 to {len(experts) - 1}, got {int(topk_ids.min())} to {topk_ids.max()}")
    quantized, non_finite = quantize_tokens(x, granularity)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    routed = torch.zeros(*topk_ids.shape, x.shape[1], dtype=dtype, device=x.device)
    for index, expert in enumerate(experts):
        tokens, slots = torch.nonzero(topk_ids == index, as_tuple=True)
        if len(tokens):
            rows = Quantized(quantized.values[tokens], quantized.scales[tokens])
            output = expert_forward(rows, expert, granularity, dtype)
            routed[tokens, slots] = output * topk_weights[tokens, slots, None].to(dtype)
    for slot in range(topk_ids.shape[1]):
        y = y + routed[:, slot]
    if shared is not None:
        y = y + expert_forward(quantized, shared, granularity, dtype)
    return y.masked_fill(non_finite.unsqueeze(1), torch.nan)
