"""The grouped GEMM of the sm_90a library: int4 (or fp8) weights, fp8 activations, each expert's rows by its weight."""

from __future__ import annotations

from typing import Literal

import torch

from w4afp8.activations import check_scales
from w4afp8.library import BF16, F32, FP8, INT4, PLAIN, SWIGLU, GroupedGemmArguments, load
from w4afp8.packed import GROUPS, PackedWeight, blocks_shape
from w4afp8.packed_fp8 import blocks_shape as fp8_blocks_shape
from w4afp8.pointers import address, aligned_address, check_tensor, cuda_device, stream_address
from w4afp8.tensors import Quantized

Epilogue = Literal["plain", "swiglu"]

_EPILOGUES = {"plain": PLAIN, "swiglu": SWIGLU}
_CODES = {"int4": INT4, "fp8": FP8}
_TYPES = {torch.bfloat16: BF16, torch.float32: F32}
_MAX_EXPERTS = 512


def grouped_gemm(
    x: Quantized,
    weight: PackedWeight,
    offsets: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    max_rows: int | None = None,
    *,
    row_weights: torch.Tensor | None = None,
    epilogue: Epilogue = "plain",
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    expected_rows: int | None = None,
    early_start: bool = False,
) -> torch.Tensor:
    """Multiply each expert's rows by that expert's packed weight on the current stream; does not wait.

    A row's bits depend on that row and its expert's weight alone. Rows of no expert are neither read nor written.

    x: values [rows, K] float8_e4m3fn, scales [rows, 1] or [rows, K/128] float32.
    weight: E experts [N, K].
    offsets: [E+1] int64 on the GPU, ascending from 0 to at most rows: expert e has the rows [offsets[e], offsets[e+1]).
    counts, max_rows: or [E] int32 on the GPU, each at most max_rows: expert e has the counts[e] rows from
        e * max_rows on.
    row_weights: [rows] float32, routing weight that multiplies a row of the result, or None; not with `swiglu`.
    epilogue: `plain`, or `swiglu`: the weight is `interleave(gate, up)`, the result SiLU(gate(x)) * up(x).
    out: [rows, N] (`swiglu`: [rows, N/2]) to write into, or None.
    out_dtype: bfloat16 (default) or float32; `swiglu` gives float32 only.
    expected_rows: of a busy expert; chooses the tile, never the result. Default: twice the average.
    early_start: offsets or counts were written before the stream's previous kernel began, which writes at most x: the
        kernel then fetches weights while that one ends.
    Returns: [rows, N] or [rows, N/2].
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    Source: w4afp8.reference.grouped_gemm and silu_mul are the specification.
    """
    check_scales(x)
    _check_weight(weight)
    rows, channels = x.values.shape
    if channels != weight.k:
        raise ValueError(f"x: expected K = {weight.k} channels as the weight has, got {channels}")
    _check_rows(rows, weight.experts, offsets, counts, max_rows)
    if row_weights is not None:
        check_tensor("row_weights", row_weights, torch.float32, (rows,))
    dtype = _result_dtype(epilogue, out, out_dtype)
    if epilogue == "swiglu" and (weight.n % 16 or row_weights is not None):
        raise ValueError(
            "epilogue swiglu: expected N in multiples of 16 and no row_weights, "
            f"got N = {weight.n}{' and row_weights' if row_weights is not None else ''}"
        )
    shape = (rows, weight.n // 2 if epilogue == "swiglu" else weight.n)
    if expected_rows is not None and expected_rows < 1:
        raise ValueError(f"expected_rows: expected at least 1, got {expected_rows}")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.values.device)
    check_tensor("out", out, dtype, shape)
    device = cuda_device("x values", x.values)
    arguments = GroupedGemmArguments(
        x=aligned_address("x values", x.values, device),
        x_scales=address("x scales", x.scales, device),
        weight=aligned_address("weight blocks", weight.blocks, device),
        channel_scales=aligned_address("weight channel_scales", weight.channel_scales, device),
        row_weights=address("row_weights", row_weights, device),
        offsets=address("offsets", offsets, device),
        counts=address("counts", counts, device),
        y=aligned_address("out", out, device),
        rows=rows,
        max_rows=max_rows or 0,
        experts=weight.experts,
        n=weight.n,
        k=weight.k,
        expected_rows=expected_rows or max(1, -(-2 * rows // weight.experts)),
        weight_type=_CODES[weight.codes],
        group=weight.group,
        full_range=int(weight.full_range),
        token_group=int(x.scales.shape[1] > 1),
        epilogue=_EPILOGUES[epilogue],
        y_type=_TYPES[dtype],
        early_start=int(early_start),
        device=device.index,
        stream=stream_address(device),
    )
    load().grouped_gemm(arguments)
    return out


def _check_weight(weight: PackedWeight) -> None:
    if not 1 <= weight.experts <= _MAX_EXPERTS:
        raise ValueError(f"weight: expected 1 to {_MAX_EXPERTS} experts, got {weight.experts}")
    if weight.group not in GROUPS or weight.k % 128 or weight.k < 128 or weight.n % 8 or weight.n < 8:
        raise ValueError(
            f"weight: expected groups of {' or '.join(map(str, GROUPS))} inputs, K in multiples of 128 and N in "
            f"multiples of 8, got groups of {weight.group}, K = {weight.k}, N = {weight.n}"
        )
    shape = (
        fp8_blocks_shape(weight.experts, weight.n, weight.k)
        if weight.codes == "fp8"
        else blocks_shape(weight.experts, weight.n, weight.k, weight.group)
    )
    check_tensor("weight blocks", weight.blocks, torch.uint8, shape)
    check_tensor("weight channel_scales", weight.channel_scales, torch.float32, (weight.experts, shape[1] * 128))


def _check_rows(
    rows: int, experts: int, offsets: torch.Tensor | None, counts: torch.Tensor | None, max_rows: int | None
) -> None:
    if offsets is not None and counts is None and max_rows is None:
        check_tensor("offsets", offsets, torch.int64, (experts + 1,))
    elif offsets is None and counts is not None and max_rows is not None:
        check_tensor("counts", counts, torch.int32, (experts,))
        if max_rows < 1 or max_rows * experts > rows:
            raise ValueError(f"max_rows: expected 1 to {rows} rows / {experts} experts, got {max_rows}")
    else:
        given = {"offsets": offsets, "counts": counts, "max_rows": max_rows}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(f"offsets, counts, max_rows: expected offsets, or counts and max_rows, got {names}")


def _result_dtype(epilogue: str, out: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    if epilogue not in _EPILOGUES:
        raise ValueError(f"epilogue: expected plain or swiglu, got {epilogue!r}")
    default = torch.float32 if epilogue == "swiglu" else torch.bfloat16 if out is None else out.dtype
    dtype = out_dtype or default
    allowed = [torch.float32] if epilogue == "swiglu" else list(_TYPES)
    if dtype not in allowed:
        raise ValueError(f"out_dtype: expected one of {allowed} with epilogue {epilogue}, got {dtype}")
    return dtype
