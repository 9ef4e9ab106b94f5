"""`quantize_tokens` as one kernel for sm_90a: the same bits, memory read once."""

from __future__ import annotations

import torch

from w4afp8.activations import scale_columns
from w4afp8.library import BF16, F16, F32, QuantizeArguments, load
from w4afp8.pointers import address, aligned_address, check_tensor, cuda_device
from w4afp8.tensors import Granularity, Quantized

_TYPES = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}
# A kernel thread handles 8 channels of 16-bit floats.
_CHANNELS = 8


def quantize_tokens_cuda(
    x: torch.Tensor,
    granularity: Granularity,
    num_rows: torch.Tensor | None = None,
    out: tuple[Quantized, torch.Tensor] | None = None,
) -> tuple[Quantized, torch.Tensor]:
    """Quantize tokens on the GPU with the bits that `quantize_tokens` gives on a CPU; does not wait.

    x: [T, K] bfloat16, float16 or float32, contiguous CUDA, K a multiple of 8 (`token_group`: of 128).
    granularity: what shares a scale, a `token` or a `token_group` of 128 channels of a token.
    num_rows: [] or [1] int64 on the GPU: only this many tokens count; the others' results are not written. None: all.
    out: what an earlier call of this shape returned, to be written again.
    Returns: the quantized tokens, and non_finite [T] bool (False beyond num_rows, where `out` is not given): tokens
        with NaN or Inf, which come out as zeros with scale 0.
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    Source: as `quantize_tokens`.
    """
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % _CHANNELS:
        raise ValueError(f"x: expected a shape [T, K] with K a positive multiple of {_CHANNELS}, got {list(x.shape)}")
    if x.dtype not in _TYPES:
        raise ValueError(f"x: expected bfloat16, float16 or float32, got {x.dtype}")
    rows, channels = x.shape
    columns = scale_columns(channels, granularity)
    if num_rows is not None and (num_rows.dtype != torch.int64 or num_rows.numel() != 1):
        raise ValueError(f"num_rows: expected one int64, got {num_rows.dtype} {list(num_rows.shape)}")
    if out is None:
        flags = torch.empty if num_rows is None else torch.zeros
        values = torch.empty(rows, channels, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
        non_finite = flags(rows, dtype=torch.bool, device=x.device)
    else:
        (values, scales), non_finite = out
        check_tensor("out values", values, torch.float8_e4m3fn, (rows, channels))
        check_tensor("out scales", scales, torch.float32, (rows, columns))
        check_tensor("out non_finite", non_finite, torch.bool, (rows,))
    device = cuda_device("x", x)
    arguments = QuantizeArguments(
        x=aligned_address("x", x, device),
        num_rows=address("num_rows", num_rows, device),
        values=aligned_address("out values", values, device),
        scales=address("out scales", scales, device),
        non_finite=address("out non_finite", non_finite, device),
        rows=rows,
        k=channels,
        x_type=_TYPES[x.dtype],
        token_group=int(granularity == "token_group"),
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
    library = load()
    with torch.cuda.device(device):
        library.quantize(arguments)
    return Quantized(values, scales), non_finite
