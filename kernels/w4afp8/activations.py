"""Activations: float tokens to fp8 with a scale per token, or per token and 128 channels, and back.

Every step is elementwise or a maximum, so the bits of a token do not depend on the tokens beside it.
"""

from __future__ import annotations

import torch

from w4afp8.tensors import ACTIVATION_GROUP, FP8_MAX, Granularity, Quantized

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def quantize_tokens(x: torch.Tensor, granularity: Granularity) -> tuple[Quantized, torch.Tensor]:
    """Quantize tokens: scale = max(amax, tiny) / 448, value = e4m3(x / scale), to nearest even, saturating.

    x: [T, K] bfloat16, float16 or float32.
    granularity: what shares a scale, a `token` or a `token_group` of 128 channels of a token (K % 128 == 0).
    Returns: the quantized tokens, and non_finite [T] bool: tokens with NaN or Inf, which come out as zeros with
        scale 0, so that they cannot reach another token.
    Raises: ValueError for a bad shape, dtype or granularity.
    Source: SGLang PR 21101 (one scale per token); DeepSeek-V3 report, arXiv 2412.19437 section 3.3.2 (groups).
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected a shape [T, K] with K > 0, got {list(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x: expected bfloat16, float16 or float32, got {x.dtype}")
    groups = torch.unflatten(x.to(torch.float32).contiguous(), 1, (scale_columns(x.shape[1], granularity), -1))
    amax = groups.abs().amax(dim=2)  # a maximum hands NaN on
    non_finite = ~amax.isfinite().all(dim=1)
    # Divided by a tensor: on CUDA, torch multiplies by the inverse of a number, which rounds twice.
    scales = amax.clamp_min(torch.finfo(torch.float32).tiny) / torch.tensor(FP8_MAX, device=x.device)
    values = (groups / scales.unsqueeze(2)).clamp_(-FP8_MAX, FP8_MAX).flatten(1).to(torch.float8_e4m3fn)
    return zero_rows(Quantized(values, scales), non_finite), non_finite


def quantize_intermediate(x: torch.Tensor, granularity: Granularity) -> Quantized:
    """Quantize values computed inside a layer; a token that overflowed on the way gets NaN scales.

    Its own output is then NaN instead of a plausible number, and no other token sees it.

    x: [T, K] float32. granularity: as in `quantize_tokens`.
    Returns: the quantized tokens.
    """
    quantized, non_finite = quantize_tokens(x, granularity)
    return Quantized(quantized.values, quantized.scales.masked_fill(non_finite.unsqueeze(1), torch.nan))


def dequantize_tokens(q: Quantized) -> torch.Tensor:
    """Expand quantized tokens: x = value * scale.

    q: values [T, K], scales [T, 1] or [T, K/128].
    Returns: [T, K] float32.
    Raises: ValueError for scales of another shape.
    """
    check_scales(q)
    values = torch.unflatten(q.values.to(torch.float32), 1, (q.scales.shape[1], -1))
    return (values * q.scales.unsqueeze(2)).flatten(1)


def requantize(q: Quantized, granularity: Granularity) -> Quantized:
    """Give fp8 tokens scales of `granularity`; tokens that have it already are returned as they are.

    q: values [T, K], scales [T, 1] or [T, K/128]. granularity: as in `quantize_tokens`.
    Returns: the same tokens with one more rounding to e4m3; NaN scales where value * scale exceeds float32.
    Raises: ValueError for scales of another shape.
    """
    check_scales(q)
    if q.scales.shape[1] == scale_columns(q.values.shape[1], granularity):
        return q
    return quantize_intermediate(dequantize_tokens(q), granularity)


def check_quantized(q: Quantized) -> torch.Tensor:
    """Find tokens with NaN among their fp8 values (e4m3 has no Inf) or NaN or Inf among their scales.

    q: values [T, K], scales [T, 1] or [T, K/128].
    Returns: non_finite [T] bool.
    Raises: ValueError for scales of another shape.
    Source: OCP 8-bit Floating Point Specification 1.0: NaN of e4m3 is S.1111.111.
    """
    check_scales(q)
    bad_value = ((q.values.view(torch.uint8) & 0x7F) == 0x7F).any(dim=1)
    return bad_value | ~q.scales.isfinite().all(dim=1)


def zero_rows(q: Quantized, rows: torch.Tensor) -> Quantized:
    """Make the chosen tokens zero, with scale 0.

    q: values [T, K], scales [T, *]. rows: [T] bool.
    Returns: a copy of `q` with those rows cleared.
    """
    cleared = q.values.view(torch.uint8).masked_fill(rows.unsqueeze(1), 0)  # 0x00 is +0 in e4m3
    return Quantized(cleared.view(torch.float8_e4m3fn), q.scales.masked_fill(rows.unsqueeze(1), 0.0))


def scale_columns(channels: int, granularity: Granularity) -> int:
    """Scales that a token of `channels` channels has.

    Raises: ValueError for an unknown granularity, or channels that are no multiple of 128 with `token_group`.
    """
    if granularity == "token":
        return 1
    if granularity != "token_group":
        raise ValueError(f"granularity: expected token or token_group, got {granularity!r}")
    if channels % ACTIVATION_GROUP:
        raise ValueError(f"granularity token_group: expected channels in multiples of 128, got {channels}")
    return channels // ACTIVATION_GROUP


def check_scales(q: Quantized) -> None:
    """Raise ValueError where `q` is not fp8 tokens [T, K] with float32 scales [T, 1] or [T, K/128]."""
    if q.values.dtype != torch.float8_e4m3fn or q.values.ndim != 2:
        raise ValueError(f"values: expected float8_e4m3fn [T, K], got {q.values.dtype} {list(q.values.shape)}")
    if q.scales.dtype != torch.float32:
        raise ValueError(f"scales: expected float32, got {q.scales.dtype}")
    tokens, channels = q.values.shape
    allowed = [[tokens, 1]] + ([[tokens, channels // ACTIVATION_GROUP]] if channels % ACTIVATION_GROUP == 0 else [])
    if list(q.scales.shape) not in allowed:
        expected = " or ".join(str(shape) for shape in allowed)
        raise ValueError(f"scales: expected {expected} for values [{tokens}, {channels}], got {list(q.scales.shape)}")
