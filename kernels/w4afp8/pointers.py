"""Tensors on their way to a kernel: checks that need no look at the device, then the address."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNMENT_BYTES = 16
"""What the kernels' vector loads and bulk copies require of a tensor's first byte."""


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raise ValueError where `tensor` has another dtype or shape."""
    if tensor.dtype != dtype or tensor.shape != tuple(shape):
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def address(name: str, tensor: torch.Tensor | None, device: torch.device) -> int | None:
    """Address of a tensor's first byte.

    name: for the message. tensor: or None. device: a CUDA device with its index.
    Returns: the address, None for None.
    Raises: ValueError where the tensor is elsewhere or not contiguous.
    """
    if tensor is None:
        return None
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()


def aligned_address(name: str, tensor: torch.Tensor, device: torch.device) -> int | None:
    """Address of a tensor that a kernel reads or writes in vectors.

    name, tensor, device: as in `address`.
    Returns: the address.
    Raises: ValueError as `address`, and where the address is no multiple of 16.
    """
    pointer = address(name, tensor, device)
    if pointer is not None and pointer % ALIGNMENT_BYTES:
        raise ValueError(f"{name}: expected an address in multiples of {ALIGNMENT_BYTES} bytes, got {pointer:#x}")
    return pointer


def cuda_device(name: str, tensor: torch.Tensor) -> torch.device:
    """The device of a tensor. Raises: ValueError where that is not a CUDA device."""
    if tensor.device.type != "cuda":
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {tensor.device}")
    return tensor.device


def stream_address(device: torch.device) -> int:
    """Return the current stream of a CUDA device, as kernels are launched on it. device: with its index."""
    stream: int = torch.cuda.current_stream(device.index).cuda_stream  # by the index: a device is looked up for longer
    return stream
