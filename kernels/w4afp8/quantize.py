"""Quantization as one kernel for sm_90a: the bits of `quantize_tokens`, memory read once, after SwiGLU if wanted."""

from __future__ import annotations

from typing import Literal

import torch

from w4afp8.activations import scale_columns
from w4afp8.library import AS_IS, BF16, F16, F32, HALVES, INTERLEAVED, QuantizeArguments, load
from w4afp8.pointers import address, aligned_address, check_tensor, cuda_device, stream_address
from w4afp8.tensors import Granularity, Quantized

Overflow = Literal["zero", "nan"]
GateUpLayout = Literal["halves", "interleaved"]

_TYPES = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}
_LAYOUTS = {"halves": HALVES, "interleaved": INTERLEAVED}
# A kernel thread handles 8 channels of 16-bit floats.
_CHANNELS = 8


def quantize_tokens_cuda(
    x: torch.Tensor,
    granularity: Granularity,
    num_rows: torch.Tensor | None = None,
    out: tuple[Quantized, torch.Tensor] | None = None,
    overflow: Overflow = "zero",
) -> tuple[Quantized, torch.Tensor]:
    """Quantize tokens on the GPU with the bits that `quantize_tokens` gives on a CPU; does not wait.

    x: [T, K] bfloat16, float16 or float32, contiguous CUDA, K a multiple of 8 (`token_group`: of 128).
    granularity: what shares a scale, a `token` or a `token_group` of 128 channels of a token.
    num_rows: [] or [1] int64 on the GPU: only this many tokens count; the others' results are not written. None: all.
    out: what an earlier call of this shape returned, to be written again.
    overflow: scale of a token with NaN or Inf, whose values are zeros: `zero`, or `nan` as in `quantize_intermediate`,
        so that what is computed from the token is NaN too.
    Returns: the quantized tokens, and non_finite [T] bool: tokens with NaN or Inf. Beyond num_rows it is False where
        `out` is not given and overflow is `zero`, else not written.
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    Source: as `quantize_tokens`.
    """
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % _CHANNELS:
        raise ValueError(f"x: expected a shape [T, K] with K a positive multiple of {_CHANNELS}, got {list(x.shape)}")
    if x.dtype not in _TYPES:
        raise ValueError(f"x: expected bfloat16, float16 or float32, got {x.dtype}")
    return _launch("x", x, AS_IS, granularity, num_rows, out, overflow)


def silu_mul_quantize(
    gate_up: torch.Tensor,
    granularity: Granularity,
    layout: GateUpLayout,
    num_rows: torch.Tensor | None = None,
    out: tuple[Quantized, torch.Tensor] | None = None,
    overflow: Overflow = "nan",
) -> tuple[Quantized, torch.Tensor]:
    """Compute SiLU(gate) * up in float32 and quantize it, on the GPU; does not wait.

    gate_up: [T, 2 * I] bfloat16 or float32, contiguous CUDA, I a multiple of 8 (`token_group`: of 128).
    granularity, num_rows, out: as in `quantize_tokens_cuda`.
    layout: `halves`, I of gate and I of up; or `interleaved`, 8 of gate and 8 of up in turn, as `packed.interleave`
        leaves a weight's rows.
    overflow: as in `quantize_tokens_cuda`, for tokens whose gate, up or product is NaN or Inf.
    Returns: as `quantize_tokens_cuda`, values [T, I].
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    Source: w4afp8.reference.silu_mul and `quantize_intermediate`; SiLU has the bits of the grouped GEMM's epilogue.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected halves or interleaved, got {layout!r}")
    if gate_up.ndim != 2 or gate_up.shape[1] == 0 or gate_up.shape[1] % (2 * _CHANNELS):
        raise ValueError(
            f"gate_up: expected a shape [T, 2 * I] with I a positive multiple of {_CHANNELS}, got {list(gate_up.shape)}"
        )
    if gate_up.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"gate_up: expected bfloat16 or float32, got {gate_up.dtype}")
    return _launch("gate_up", gate_up, _LAYOUTS[layout], granularity, num_rows, out, overflow)


def _launch(
    name: str,
    x: torch.Tensor,
    activation: int,
    granularity: Granularity,
    num_rows: torch.Tensor | None,
    out: tuple[Quantized, torch.Tensor] | None,
    overflow: Overflow,
) -> tuple[Quantized, torch.Tensor]:
    rows = x.shape[0]
    channels = x.shape[1] if activation == AS_IS else x.shape[1] // 2
    columns = scale_columns(channels, granularity)
    if overflow not in ("zero", "nan"):
        raise ValueError(f"overflow: expected zero or nan, got {overflow!r}")
    if num_rows is not None and (num_rows.dtype != torch.int64 or num_rows.numel() != 1):
        raise ValueError(f"num_rows: expected one int64, got {num_rows.dtype} {list(num_rows.shape)}")
    if out is None:
        # Filling is a kernel more in every step; with NaN scales nobody has to look at the flags.
        flags = torch.empty if num_rows is None or overflow == "nan" else torch.zeros
        values = torch.empty(rows, channels, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
        non_finite = flags(rows, dtype=torch.bool, device=x.device)
    else:
        (values, scales), non_finite = out
        check_tensor("out values", values, torch.float8_e4m3fn, (rows, channels))
        check_tensor("out scales", scales, torch.float32, (rows, columns))
        check_tensor("out non_finite", non_finite, torch.bool, (rows,))
    device = cuda_device(name, x)
    arguments = QuantizeArguments(
        x=aligned_address(name, x, device),
        num_rows=address("num_rows", num_rows, device),
        values=aligned_address("out values", values, device),
        scales=address("out scales", scales, device),
        non_finite=address("out non_finite", non_finite, device),
        rows=rows,
        k=channels,
        x_type=_TYPES[x.dtype],
        token_group=int(granularity == "token_group"),
        device=device.index,
        stream=stream_address(device),
        activation=activation,
        nan_scales=int(overflow == "nan"),
    )
    load().quantize(arguments)
    return Quantized(values, scales), non_finite
