"""Atomic files: a shard whose tensors may be written in any order by many threads, and small text files.

A file appears under its name only when it is whole and on disk; until then it is `.NAME.part` beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from moe_forward.checkpoint.index import TORCH_DTYPES
from moe_forward.errors import CheckpointError

ALIGNMENT_BYTES = 64  # of the data's start, so that memory-mapped tensors of every dtype are aligned


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that a shard will hold. dtype: safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class ShardWriter:
    """A safetensors file that is laid out from its entries first and filled tensor by tensor, from any thread."""

    def __init__(self, path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> None:
        """Create `.NAME.part` with the header; the library's own writer would need all tensors in memory at once.

        entries: of unique names; wider element types are laid out first, so that every tensor is aligned.
        """
        ordered = sorted(entries, key=lambda entry: -TORCH_DTYPES[entry.dtype].itemsize)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position, positions = 0, {}
        for entry in ordered:
            if entry.name in header:
                raise CheckpointError(f"{path.name} would hold two tensors named {entry.name}")
            end = position + entry.size_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
            positions[entry.name] = position
            position = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(len(raw) + 8) % ALIGNMENT_BYTES)
        start = 8 + len(raw)
        self._path = path
        self._part = part_path(path)
        self._entries = {entry.name: entry for entry in entries}
        self._offsets = {name: start + offset for name, offset in positions.items()}
        self._missing = set(self._offsets)
        self._lock = threading.Lock()
        self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        _write_all(self._file, memoryview(len(raw).to_bytes(8, "little") + raw), 0)
        os.ftruncate(self._file, start + position)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place.

        tensor: of the entry's dtype and shape, on the CPU.
        """
        entry = self._entries[name]
        if tensor.dtype != TORCH_DTYPES[entry.dtype] or tuple(tensor.shape) != entry.shape:
            raise ValueError(f"{name} was to be {entry.dtype} {entry.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_all(self._file, data, self._offsets[name])
        with self._lock:
            self._missing.discard(name)

    def commit(self) -> None:
        """Make the file durable under its own name; every tensor must have been written."""
        if self._missing:
            raise ValueError(f"{self._path.name} is not whole: {min(self._missing)} was not written")
        os.fsync(self._file)
        os.close(self._file)
        os.replace(self._part, self._path)
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove the unfinished file."""
        os.close(self._file)
        self._part.unlink(missing_ok=True)


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    data = (json.dumps(document, indent=2) + "\n").encode()
    part = part_path(path)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def part_path(path: Path) -> Path:
    """Name of a file that is not finished."""
    return path.with_name(f".{path.name}.part")


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold: CheckpointError with both numbers."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CheckpointError(f"{folder} has {free_bytes} bytes free, but {needed_bytes} are needed")


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)  # one call writes 2 GiB at most
        data, offset = data[written:], offset + written
