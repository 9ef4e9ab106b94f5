"""Routes of tokens in the form that exchanges take, as one kernel for sm_90a."""

from __future__ import annotations

import torch

from w4afp8.library import RoutesArguments, load
from w4afp8.pointers import address, check_tensor, cuda_device, stream_address


def pad_routes_cuda(ids: torch.Tensor, weights: torch.Tensor, out_ids: torch.Tensor, out_weights: torch.Tensor) -> None:
    """Write tokens' routes into memory with room for more tokens, which get no expert; does not wait.

    ids: [T, K] int32 or int64, contiguous CUDA. weights: [T, K] float32.
    out_ids: [P, K] int64, P at least T: gets ids, and -1 in the rows behind them.
    out_weights: [P, K] float32: gets weights; the rows behind them are not written.
    Raises: ValueError naming the argument; LibraryNotBuilt, LibraryMismatch, KernelError.
    """
    device = cuda_device("out_ids", out_ids)
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids: expected int32 or int64 [T, K], got {ids.dtype} {list(ids.shape)}")
    rows, top_k = ids.shape
    check_tensor("weights", weights, torch.float32, (rows, top_k))
    if out_ids.ndim != 2 or out_ids.shape[0] < rows:
        raise ValueError(f"out_ids: expected room for {rows} tokens, got {list(out_ids.shape)}")
    check_tensor("out_ids", out_ids, torch.int64, (out_ids.shape[0], top_k))
    check_tensor("out_weights", out_weights, torch.float32, (out_ids.shape[0], top_k))
    load().routes(
        RoutesArguments(
            ids=address("ids", ids, device),
            weights=address("weights", weights, device),
            out_ids=address("out_ids", out_ids, device),
            out_weights=address("out_weights", out_weights, device),
            rows=rows,
            padded_rows=out_ids.shape[0],
            top_k=top_k,
            wide=int(ids.dtype == torch.int64),
            device=device.index,
            stream=stream_address(device),
        )
    )
