"""Routed experts with searched int4 scales, and what the search gained, kept with each shard for the report."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from math import fsum, sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from moe_forward.checkpoint.convert import convert, float_strips
from moe_forward.checkpoint.documents import read_document
from moe_forward.checkpoint.layout import GROUP_SIZE
from moe_forward.checkpoint.mapped import MappedFiles
from moe_forward.checkpoint.plan import Conversion
from moe_forward.checkpoint.writer import write_document
from moe_forward.errors import CheckpointError
from w4afp8.weights import SEARCH_FACTORS, search_int4

Scales = Literal["rtn", "search"]
"""Of int4: `rtn` rounds to nearest with scale amax / 7, `search` takes the scale of least squared error."""

REPORT_FILE = "quantization_report.json"
SEARCH_SETTINGS = f"scales=search factors={','.join(map(str, SEARCH_FACTORS))}"


class MatrixErrors(NamedTuple):
    """Frobenius norm of a matrix' error over that of the matrix, with scale amax / 7 and with the searched scales."""

    rtn: float
    search: float


class ErrorNotes:
    """The errors of one shard's matrices, from many threads, on disk before the shard is."""

    def __init__(self, shard: Path, matrices: int) -> None:
        """Begin a shard, named as it will be, of so many int4 matrices."""
        self._path = errors_path(shard)
        self._matrices = matrices
        self._errors: dict[str, MatrixErrors] = {}
        self._lock = threading.Lock()

    def add(self, name: str, errors: MatrixErrors) -> None:
        """Note a matrix; the last one writes the file."""
        with self._lock:
            self._errors[name] = errors
            if len(self._errors) == self._matrices:
                write_document(self._path, self._errors)


def errors_path(shard: Path) -> Path:
    """Where the errors of a shard wait until the report is written."""
    return shard.with_name(f".{shard.name}.errors.json")


def require_errors(shards: Iterable[Path]) -> None:
    """Refuse to go on behind a finished shard without its errors: CheckpointError with the way out."""
    for shard in shards:
        if not errors_path(shard).is_file():
            raise CheckpointError(f"{errors_path(shard)} is missing, which the report needs; remove {shard} as well")


def convert_searched(files: MappedFiles, conversion: Conversion, notes: ErrorNotes) -> tuple[torch.Tensor, ...]:
    """Make what a conversion promises, as `convert` does, int4 with searched scales.

    notes: take the errors, under the name of the matrix.
    Returns: tensors in the order of `conversion.entries`.
    Raises: CheckpointError naming the tensor for NaN or Inf in it.
    """
    if conversion.to != "int4":
        return convert(files, conversion)
    values, scales, errors = search_matrix(files, conversion)
    notes.add(conversion.entries[0].name, errors)
    return values, scales


def search_matrix(files: MappedFiles, conversion: Conversion) -> tuple[torch.Tensor, torch.Tensor, MatrixErrors]:
    """Quantize a matrix to int4, strip by strip.

    Returns: codes and scales, as `search_int4` makes them of the whole, and the errors.
    Raises: CheckpointError naming the tensor for NaN or Inf in it.
    """
    codes: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    squares: list[tuple[float, float, float]] = []
    for strip in float_strips(files, conversion.source, conversion.scales, conversion.part):
        try:
            found = search_int4(strip, GROUP_SIZE)
        except ValueError as error:
            raise CheckpointError(f"{conversion.source}: {error}") from error
        codes.append(found.weight.codes)
        scales.append(found.weight.scales)
        # float64: the squares of float32 may leave its range
        norm = float(torch.linalg.vector_norm(strip, dtype=torch.float64))
        squares.append((norm * norm, float(found.rtn_error.sum()), float(found.error.sum())))
    weight, rtn, search = (fsum(column) for column in zip(*squares, strict=True))
    errors = MatrixErrors(sqrt(rtn / weight), sqrt(search / weight)) if weight else MatrixErrors(0.0, 0.0)
    return torch.cat(codes), torch.cat(scales), errors


def write_report(folder: Path, shards: Iterable[Path]) -> None:
    """Write quantization_report.json: the relative errors of the routed experts with plain and with searched scales.

    shards: every one that holds int4 matrices; each has its errors beside it.
    """
    notes: dict[str, Any] = {}
    for shard in shards:
        notes |= read_document(errors_path(shard))
    matrices = [MatrixErrors(*notes[name]) for name in sorted(notes)]
    columns = MatrixErrors._fields, tuple(zip(*matrices, strict=True))
    write_document(
        folder / REPORT_FILE,
        {
            "settings": SEARCH_SETTINGS,
            "group_size": GROUP_SIZE,
            "int4_matrices": len(matrices),
            "mean_relative_error": {name: fsum(errors) / len(errors) for name, errors in zip(*columns, strict=True)},
            "largest_relative_error": {name: max(errors) for name, errors in zip(*columns, strict=True)},
        },
    )


def remove_errors(shards: Iterable[Path]) -> None:
    """Remove what the report was made from."""
    for shard in shards:
        errors_path(shard).unlink(missing_ok=True)
