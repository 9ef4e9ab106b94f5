"""Many copies between the device and host memory that CUDA knows, in one call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from w4afp8.library import load
from w4afp8.pointers import stream_address


def copy_cuda(copies: Sequence[tuple[int, int, int]], device: torch.device) -> None:
    """Copy bytes between memory of the device and host memory, on the current stream; does not wait.

    Large copies are the copy engines'; all small ones are one kernel's, which costs the host what one of them would.

    copies: (to, from, bytes) each, addresses of the device's memory or of host memory that is pinned, or registered and
        mapped; no two of them overlap. Who calls answers for the addresses: the memory lives until the stream has
        passed.
    device: a CUDA device with its index.
    Raises: LibraryNotBuilt, LibraryMismatch, KernelError.
    """
    if copies:
        flat = array("Q", [word for copy in copies for word in copy])
        load().copy(flat.buffer_info()[0], len(copies), device.index, stream_address(device))
