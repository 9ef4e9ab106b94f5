"""Shards mapped into memory, and the kernel told what will be read of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

from moe_forward.checkpoint.index import TensorInfo
from moe_forward.errors import CheckpointError


class MappedFiles:
    """Shards mapped into memory; a tensor keeps its mapping alive by itself."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Map each file once.

        Raises: CheckpointError naming a file that safetensors refuses.
        """
        self._files: Mapping[Path, Any] = MappingProxyType({file: _mapped(file) for file in sorted(set(files))})

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """View a tensor; private to this process, nothing is read before it is touched."""
        tensor: torch.Tensor = self._files[info.file].get_tensor(info.name)
        return tensor


def read_ahead(info: TensorInfo) -> None:
    """Ask the kernel to read a tensor now, in parallel with the others, instead of page by page when it is used."""
    handle = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(handle, info.offset, info.size_bytes, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)


def _mapped(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except Exception as error:  # the library raises its own type, OSError and others
        raise CheckpointError(f"cannot map {file}: {error}") from error
