"""Tensors written as JSON numbers, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import DType
from moe_forward.wire.base import WireTensor
from moe_forward.wire.text import elements, shown

_INTEGERS: dict[DType, str] = {DType.I32: "<i4", DType.I64: "<i8", DType.F8_E4M3: "u1"}
_FLOAT32_END = float(2**128 - 2**103)
"""The least magnitude that rounds to infinity in float32: half a unit beyond its largest number."""


def from_lists(name: str, value: object, dtype: DType, shape: tuple[int, ...] | None = None) -> WireTensor:
    """Make a tensor of JSON numbers.

    value: a list of numbers, or a list of rows of numbers, all rows equally long.
    dtype: F32 takes numbers; I32, I64 and F8_E4M3 (its bytes) take integers, never 1.0.
    shape: what `value` must have; a flat list may have any shape of as many elements. None: its own shape.
    Returns: the tensor, outside the body (offset None).
    Raises: ForwardError WRONG_SHAPE, WRONG_DTYPE, OUT_OF_RANGE or NON_FINITE, naming the row.
    """
    if not isinstance(value, list):
        raise ForwardError(ErrorCode.WRONG_SHAPE, f"{name}: expected a list of numbers or of rows, got {shown(value)}")
    nested = bool(value) and isinstance(value[0], list)
    if nested:
        columns = len(value[0])
        _check_rows(name, value, columns)
        numbers = list(itertools.chain.from_iterable(value))
        own: tuple[int, ...] = (len(value), columns)
    else:
        columns, numbers, own = 0, value, (len(value),)

    def place(index: int) -> str:
        return f"{name} row {index // columns} column {index % columns}" if nested else f"{name} element {index}"

    array = _floats(numbers, place) if dtype is DType.F32 else _integers(numbers, dtype, place)
    if shape is not None and (own != shape if nested else own[0] != elements(shape)):
        raise ForwardError(
            ErrorCode.WRONG_SHAPE, f"{name}: expected data of shape {list(shape)}, got data of shape {list(own)}"
        )
    return WireTensor(name, dtype, own if shape is None else shape, memoryview(array.tobytes()), None)


def to_floats(data: memoryview, dtype: DType, columns: int) -> npt.NDArray[np.float32]:
    """Widen an output tensor for printing.

    data: bytes of [T, columns] in BF16, F16 or F32.
    Returns: [T, columns] float32, the same values; `tolist` gives numbers that read back to them exactly.
    Raises: ForwardError NON_FINITE naming the first row that JSON cannot hold.
    """
    if dtype is DType.BF16:  # the upper half of a float32
        floats = (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        with np.errstate(invalid="ignore"):  # a signalling NaN; it is refused below
            floats = np.frombuffer(data, {DType.F16: "<f2", DType.F32: "<f4"}[dtype]).astype(np.float32)
    rows: npt.NDArray[np.float32] = floats.reshape(-1, columns)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ForwardError(
            ErrorCode.NON_FINITE,
            f"output: row {int(bad[0])} overflowed to a value that JSON cannot hold; ask for a binary reply to see it",
        )
    return rows


def _check_rows(name: str, rows: list[Any], columns: int) -> None:
    for index, row in enumerate(rows):
        if not isinstance(row, list):
            raise ForwardError(ErrorCode.WRONG_SHAPE, f"{name}: expected row {index} to be a list, got {shown(row)}")
        if len(row) != columns:
            raise ForwardError(
                ErrorCode.WRONG_SHAPE,
                f"{name}: expected rows of {columns} numbers like row 0, got {len(row)} in row {index}",
            )


def _check_types(numbers: list[Any], allowed: set[type], what: str, place: Callable[[int], str]) -> None:
    if set(map(type, numbers)) <= allowed:
        return
    index = next(index for index, value in enumerate(numbers) if type(value) not in allowed)
    code = ErrorCode.WRONG_SHAPE if isinstance(numbers[index], list) else ErrorCode.WRONG_DTYPE
    raise ForwardError(code, f"{place(index)}: expected {what}, got {shown(numbers[index])}")


def _floats(numbers: list[Any], place: Callable[[int], str]) -> npt.NDArray[Any]:
    _check_types(numbers, {int, float}, "a number", place)
    try:
        wide = np.array(numbers, dtype=np.float64)
    except OverflowError:  # an integer beyond float64; the loop below finds it
        wide = np.array([np.inf])
    if not (np.abs(wide) < _FLOAT32_END).all():
        index, value = next((i, v) for i, v in enumerate(numbers) if not -_FLOAT32_END < v < _FLOAT32_END)
        if isinstance(value, float) and not math.isfinite(value):
            raise ForwardError(ErrorCode.NON_FINITE, f"{place(index)}: expected a finite number, got {value}")
        raise ForwardError(
            ErrorCode.OUT_OF_RANGE, f"{place(index)}: expected a number that float32 can hold, got {shown(value)}"
        )
    return wide.astype("<f4")


def _integers(numbers: list[Any], dtype: DType, place: Callable[[int], str]) -> npt.NDArray[Any]:
    _check_types(numbers, {int}, "an integer", place)
    limits = np.iinfo(_INTEGERS[dtype])
    low, high = int(limits.min), int(limits.max)
    if numbers and not low <= min(numbers) <= max(numbers) <= high:
        index, value = next((i, v) for i, v in enumerate(numbers) if not low <= v <= high)
        raise ForwardError(
            ErrorCode.OUT_OF_RANGE, f"{place(index)}: expected an integer in [{low}, {high}], got {shown(value)}"
        )
    return np.array(numbers, dtype=_INTEGERS[dtype])
