"""Shards mapped into memory, and the kernel told what will be read of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch

from moe_forward.checkpoint.index import TORCH_DTYPES, TensorInfo
from moe_forward.errors import CheckpointError


class MappedFiles:
    """Shards mapped into memory; a tensor keeps its mapping alive by itself.

    The safetensors library maps too, but touches each tensor as it hands it out: the kernel then reads megabytes behind
    that page, and so, tensor by tensor, most of a checkpoint of which nothing was asked yet.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Map each file once.

        files: whose headers `index.read_header` has checked.
        Raises: CheckpointError naming a file that cannot be mapped.
        """
        self._files: Mapping[Path, torch.UntypedStorage] = MappingProxyType(
            {file: _mapped(file) for file in sorted(set(files))}
        )

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """View a tensor; private to this process, nothing is read before it is touched."""
        data = self._files[info.file][info.offset : info.offset + info.size_bytes]
        return torch.empty(0, dtype=TORCH_DTYPES[info.dtype]).set_(data).view(info.shape)


def read_ahead(info: TensorInfo) -> None:
    """Ask the kernel to read a tensor now, in parallel with the others, instead of page by page when it is used."""
    handle = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(handle, info.offset, info.size_bytes, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)


def _mapped(file: Path) -> torch.UntypedStorage:
    try:
        storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
    except (OSError, RuntimeError) as error:  # torch raises the latter
        raise CheckpointError(f"cannot map {file}: {error}") from error
    return cast(torch.UntypedStorage, storage)
