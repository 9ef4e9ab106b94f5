"""Where matrices are quantized: in the thread that asks, or on a GPU, with a stream of its own for each thread.

On a GPU, threads overlap one another: while one copies pages into pinned memory, the strips of others are on their way
or computed, and results are written. Bits are the same as on a CPU (`w4afp8.search`).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, get_args

import torch

from moe_forward.errors import CheckpointError

DeviceName = Literal["auto", "cpu", "cuda"]


class Device(Protocol):
    """Where matrices are quantized.

    name: for people. strip_elements: quantized at a time. max_workers: threads that are of use, or None for any number.
    """

    @property
    def name(self) -> str: ...
    @property
    def strip_elements(self) -> int: ...
    @property
    def max_workers(self) -> int | None: ...

    def lane(self) -> AbstractContextManager[object]:
        """Enter before work of one thread begins."""

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring a tensor from the CPU there."""

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring a tensor from there to the CPU, all of it when this returns."""


class Cpu:
    """The thread's own core."""

    name = "cpu"
    strip_elements = 1 << 19  # float32 temporaries of a strip stay in a core's cache
    max_workers = None

    def lane(self) -> AbstractContextManager[object]:
        """Enter nothing."""
        return nullcontext()

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return tensor

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return tensor


class Gpu:
    """A CUDA GPU behind pinned memory. torch reuses a pinned block when the copies that use it are done."""

    strip_elements = 1 << 22  # 8 MiB of bf16: large beside the launches, and some 0.2 GB of temporaries a thread
    max_workers = 16

    def __init__(self) -> None:
        """Take the current GPU."""
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._threads = threading.local()
        self.name = str(self._device)

    def lane(self) -> AbstractContextManager[object]:
        """Make this thread's stream the current one."""
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._threads.stream)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy by way of pinned memory; the stream waits, this thread only for the pages."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return pinned.to(self._device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy into pinned memory and wait for it."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return pinned


CPU = Cpu()
"""Without state of its own."""


def choose_device(name: DeviceName) -> Device:
    """Find the device of a name; `auto` takes a GPU where torch finds one.

    Raises: CheckpointError for another name, or `cuda` where torch finds no GPU.
    """
    if name not in get_args(DeviceName):
        raise CheckpointError(f"device: expected one of {', '.join(get_args(DeviceName))}, got {name!r}")
    found = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not found:
        raise CheckpointError("device: expected a CUDA GPU for cuda, but torch finds none; use cpu or auto")
    return Gpu() if found else CPU
