"""Routed experts with searched int4 scales, and what the search gained, kept with each shard for the report."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import fsum, sqrt
from pathlib import Path
from typing import Any

import torch

from moe_forward.checkpoint.calibration import Calibration
from moe_forward.checkpoint.convert import convert, float_strips
from moe_forward.checkpoint.device import Device
from moe_forward.checkpoint.documents import read_document
from moe_forward.checkpoint.layout import GROUP_SIZE
from moe_forward.checkpoint.mapped import MappedFiles
from moe_forward.checkpoint.plan import Conversion
from moe_forward.checkpoint.writer import write_document
from moe_forward.errors import CheckpointError
from w4afp8.search import SEARCH_FACTORS, GroupErrors, SearchedWeight, search_int4

REPORT_FILE = "quantization_report.json"
Errors = Mapping[str, Mapping[str, float]]
"""Of a matrix: `relative_error`, and `relative_output_error` where it was calibrated -> `rtn`, `search`, `calibrated`.

The first is the Frobenius norm of the matrix' error over that of the matrix. The second has each column times the root
mean square of its input channel: the error of outputs, if channels are uncorrelated.
"""


@dataclass(frozen=True)
class Search:
    """How scales are searched. calibration: takes the least error of outputs; None takes that of weights."""

    calibration: Calibration | None = None

    @property
    def settings(self) -> str:
        """What decides the bits, for the identity of a shard."""
        factors = f"scales=search factors={','.join(map(str, SEARCH_FACTORS))}"
        return factors if self.calibration is None else f"{factors} calibration={self.calibration.digest}"

    def importance(self, conversion: Conversion) -> torch.Tensor | None:
        """Mean square of each input channel of a matrix, or None where its weights decide."""
        if self.calibration is None or conversion.matrix is None:
            return None
        return self.calibration.importance(conversion.matrix)


class ErrorNotes:
    """The errors of one shard's matrices, from many threads, on disk before the shard is."""

    def __init__(self, shard: Path, matrices: int) -> None:
        """Begin a shard, named as it will be, of so many int4 matrices."""
        self._path = errors_path(shard)
        self._matrices = matrices
        self._errors: dict[str, Errors] = {}
        self._lock = threading.Lock()

    def add(self, name: str, errors: Errors) -> None:
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


def convert_searched(
    files: MappedFiles, device: Device, search: Search, notes: ErrorNotes, conversion: Conversion
) -> tuple[torch.Tensor, ...]:
    """Make what a conversion promises, as `convert` does, int4 with searched scales.

    notes: take the errors, under the name of the matrix.
    Returns: tensors on the CPU, in the order of `conversion.entries`.
    Raises: CheckpointError naming the tensor for NaN or Inf in it.
    """
    if conversion.to != "int4":
        return convert(files, device, conversion)
    codes, scales, errors = _search_matrix(files, device, search, conversion)
    notes.add(conversion.entries[0].name, errors)
    return codes, scales


def _search_matrix(
    files: MappedFiles, device: Device, search: Search, conversion: Conversion
) -> tuple[torch.Tensor, torch.Tensor, Errors]:
    """Quantize a matrix to int4, strip by strip; returns codes, scales and errors, as of the whole."""
    importance = search.importance(conversion)
    found: list[SearchedWeight] = []
    with device.lane():
        channels = None if importance is None else device.upload(importance)
        for strip in float_strips(files, conversion.source, conversion.scales, conversion.part, device):
            try:
                found.append(search_int4(strip, GROUP_SIZE, channels))
            except ValueError as error:
                raise CheckpointError(f"{conversion.source}: {error}") from error
        weights = zip(*(one.weight for one in found), strict=True)
        codes, scales = (device.download(torch.cat(column)) for column in weights)
        errors = {"relative_error": _relative(device, [one.weight_errors for one in found])}
        if importance is not None:
            of_outputs = [one.output_errors for one in found if one.output_errors is not None]
            errors["relative_output_error"] = _relative(device, of_outputs)
        elif search.calibration is not None:
            errors["relative_error"]["calibrated"] = errors["relative_error"]["search"]  # what it got instead
    return codes, scales, errors


def _relative(device: Device, strips: list[GroupErrors]) -> dict[str, float]:
    """Relative errors of a matrix; added up on the CPU, all groups at once, to the same bits whatever the strips."""
    columns = zip(GroupErrors._fields, zip(*strips, strict=True), strict=True)
    sums = {name: float(device.download(torch.cat(column)).sum()) for name, column in columns if column[0] is not None}
    total = sums.pop("total")
    return {name: sqrt(error / total) if total else 0.0 for name, error in sums.items()}


def write_report(folder: Path, shards: Iterable[Path], search: Search) -> None:
    """Write quantization_report.json: the relative errors of the routed experts with plain and with searched scales.

    shards: every one that holds int4 matrices; each has its errors beside it.
    """
    notes: dict[str, Errors] = {}
    for shard in shards:
        notes |= read_document(errors_path(shard))
    report: dict[str, Any] = {"settings": search.settings, "group_size": GROUP_SIZE, "int4_matrices": len(notes)}
    kinds = ["relative_error"]
    if search.calibration is not None:
        kinds.append("relative_output_error")
        report["calibrated_matrices"] = sum("relative_output_error" in errors for errors in notes.values())
    for kind in kinds:
        matrices = [notes[name][kind] for name in sorted(notes) if kind in notes[name]]
        columns = {name: [errors[name] for errors in matrices] for name in matrices[0]}
        report[f"mean_{kind}"] = {name: fsum(errors) / len(errors) for name, errors in columns.items()}
        report[f"largest_{kind}"] = {name: max(errors) for name, errors in columns.items()}
    write_document(folder / REPORT_FILE, report)


def remove_errors(shards: Iterable[Path]) -> None:
    """Remove what the report was made from."""
    for shard in shards:
        errors_path(shard).unlink(missing_ok=True)
