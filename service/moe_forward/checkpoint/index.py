"""Where each tensor of a checkpoint folder lies: safetensors headers, read bounded and checked before any use.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, a JSON header, then the data without
holes) and transformers' model.safetensors.index.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import torch

from moe_forward.checkpoint.documents import read_document
from moe_forward.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LANGUAGE_MODEL = "language_model."
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own bound
HEADER_READERS = 16  # reading a header is waiting for the file system, not work

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Element types of safetensors that a model folder holds."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    file: its shard. dtype: safetensors name. offset, size_bytes: in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)} in {self.file.name})"


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors header. tensors: in the order of the file. digest: SHA-256 of the header's bytes."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    digest: str


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a folder.

    files: its shards by name. tensors: by name, in the order of files and offsets; those of a language model inside
    another without the `language_model.` before it.
    """

    folder: Path
    files: tuple[Path, ...]
    headers: Mapping[Path, Header]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the file's size.

    Raises: CheckpointError naming the file and the tensor for anything but a whole, well-formed file.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size_bytes < 8 or length > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: header of {length} bytes, file of {size_bytes}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        document = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: its safetensors header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of its safetensors header must map names to strings")
    start = 8 + length
    tensors = sorted(
        (_tensor(path, name, entry, start) for name, entry in document.items()),
        key=lambda tensor: (tensor.offset, tensor.size_bytes),
    )
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(f"{path}: the data of {tensor.name} starts at {tensor.offset}, expected {end}")
        end += tensor.size_bytes
    if end != size_bytes:
        raise CheckpointError(f"{path} is truncated or corrupt: its header tells of {end} bytes, it has {size_bytes}")
    return Header(tuple(tensors), MappingProxyType(metadata), hashlib.sha256(raw).hexdigest())


def open_index(folder: Path) -> CheckpointIndex:
    """Read where every tensor of a folder lies; no tensor is read.

    folder: with model.safetensors.index.json or one model.safetensors.
    Raises: CheckpointError naming the file or tensor: a missing or damaged shard, an index that names a tensor its
        shard lacks, or a file outside the folder.
    """
    if (folder / INDEX_FILE).is_file():
        names = _weight_map(folder / INDEX_FILE)
        files = tuple(folder / name for name in sorted(set(names.values())))
    elif (folder / SINGLE_FILE).is_file():
        names, files = {}, (folder / SINGLE_FILE,)
    else:
        raise CheckpointError(f"{folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}: not a safetensors checkpoint")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder / INDEX_FILE} names {missing[0]}, which is missing ({len(missing)} missing)")
    with ThreadPoolExecutor(HEADER_READERS) as pool:
        headers = dict(zip(files, pool.map(read_header, files), strict=True))
    tensors = {
        tensor.name: tensor
        for file in files
        for tensor in headers[file].tensors
        if not names or names.get(tensor.name) == file.name
    }
    for name, file_name in names.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / INDEX_FILE} places {name} in {file_name}, which does not hold it")
    plain = {name.removeprefix(LANGUAGE_MODEL): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        twice = next(name for name in tensors if LANGUAGE_MODEL + name in tensors)
        raise CheckpointError(f"{folder} holds both {twice} and {LANGUAGE_MODEL}{twice}")
    return CheckpointIndex(folder, files, MappingProxyType(headers), MappingProxyType(plain))


def _weight_map(path: Path) -> dict[str, str]:
    names = read_document(path).get("weight_map")
    if not isinstance(names, dict) or not names or any(not isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    for tensor, name in names.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {tensor} is in {name!r}, expected a .safetensors file of this folder")
    return names


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: the header's entry of {name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}; known are {', '.join(TORCH_DTYPES)}")
    if not _counts(shape):
        raise CheckpointError(f"{path}: {name} has shape {shape!r}, expected a list of sizes >= 0")
    if not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name} has data_offsets {offsets!r}, expected [begin, end]")
    size_bytes = prod(shape) * TORCH_DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size_bytes:
        raise CheckpointError(
            f"{path}: {name} is {dtype} {shape}, which takes {size_bytes} bytes, but its data_offsets are {offsets}"
        )
    return TensorInfo(name, path, dtype, tuple(shape), start + offsets[0], size_bytes)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key occurs twice")
    return document
