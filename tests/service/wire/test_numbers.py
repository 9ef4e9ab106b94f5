from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from moe_forward.errors import ErrorCode
from moe_forward.types import DType
from moe_forward.wire.numbers import from_lists, to_floats


def test_rows_become_a_float32_tensor_outside_the_body():
    tensor = from_lists("x", [[1, 0.1, -2.5e3], [1e-45, 0, 7]], DType.F32)
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.offset) == ("x", DType.F32, (2, 3), None)
    assert bytes(tensor.data) == struct.pack("<6f", 1, 0.1, -2.5e3, 1e-45, 0, 7)


def test_a_flat_list_has_its_own_shape_or_the_one_it_is_told():
    assert from_lists("x", [1, 2, 3, 4], DType.F32).shape == (4,)
    assert from_lists("x", [1, 2, 3, 4], DType.F32, (2, 2)).shape == (2, 2)
    assert from_lists("x", [[1, 2], [3, 4]], DType.F32, (2, 2)).shape == (2, 2)
    assert from_lists("x", [], DType.I64).shape == (0,)
    assert from_lists("x", [[], []], DType.I64).shape == (2, 0)


@pytest.mark.parametrize(
    ("dtype", "format_", "values"),
    [
        (DType.I64, "<3q", [-(2**63), 0, 2**63 - 1]),
        (DType.I32, "<3i", [-(2**31), 0, 2**31 - 1]),
        (DType.F8_E4M3, "<3B", [0, 127, 255]),
    ],
)
def test_integers_keep_their_exact_values(dtype, format_, values):
    assert bytes(from_lists("x", values, dtype).data) == struct.pack(format_, *values)


@pytest.mark.parametrize("dtype", [DType.I64, DType.I32, DType.F8_E4M3])
@pytest.mark.parametrize("value", [1.0, True, "1", None, {}])
def test_only_integers_are_integers(dtype, value, refused):
    words = ["ids row 1 column 0: expected an integer"]
    refused(ErrorCode.WRONG_DTYPE, words, from_lists, "ids", [[0, 1], [value, 2]], dtype)


@pytest.mark.parametrize(
    ("dtype", "value"), [(DType.I64, 2**63), (DType.I64, 10**300), (DType.I32, -(2**31) - 1), (DType.F8_E4M3, 256)]
)
def test_integers_that_do_not_fit_are_out_of_range(dtype, value, refused):
    refused(ErrorCode.OUT_OF_RANGE, ["ids element 1", "integer in ["], from_lists, "ids", [0, value], dtype)


@pytest.mark.parametrize("value", [True, "1", None, {}])
def test_only_numbers_are_numbers(value, refused):
    refused(ErrorCode.WRONG_DTYPE, ["x element 2: expected a number"], from_lists, "x", [1, 2.5, value], DType.F32)


@pytest.mark.parametrize("value", [3.5e38, -3.4028236e38, 10**39, 10**400, -(10**400), 1e308])
def test_numbers_beyond_float32_are_out_of_range(value, refused):
    rows = [[0.0, 1.0], [2.0, value]]
    refused(ErrorCode.OUT_OF_RANGE, ["x row 1 column 1", "float32"], from_lists, "x", rows, DType.F32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("beside", [0.0, 10**400])
def test_numbers_that_are_not_finite_are_named(value, beside, refused):
    refused(ErrorCode.NON_FINITE, ["x element 0", "finite"], from_lists, "x", [value, beside], DType.F32)


def test_the_largest_float32_is_accepted_in_its_shortest_decimal_form():
    largest = np.finfo(np.float32).max
    assert bytes(from_lists("x", [3.4028235e38], DType.F32).data) == largest.tobytes()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, ["expected a list", "got 5"]),
        ("abc", ["expected a list", "'abc'"]),
        ({"a": 1}, ["expected a list"]),
        ([[1, 2], [3]], ["rows of 2 numbers", "got 1 in row 1"]),
        ([[1, 2], 3], ["row 1 to be a list", "got 3"]),
        ([1, [2]], ["x element 1: expected a number"]),
        ([[[1]]], ["x row 0 column 0: expected a number"]),
    ],
)
def test_ragged_and_wrongly_nested_lists_are_refused_by_row(value, words, refused):
    refused(ErrorCode.WRONG_SHAPE, words, from_lists, "x", value, DType.F32)


@pytest.mark.parametrize("value", [[1, 2, 3], [[1, 2], [3, 4], [5, 6]], [[1, 2, 3, 4]], []])
def test_data_must_have_the_declared_shape(value, refused):
    refused(ErrorCode.WRONG_SHAPE, ["x: expected data of shape [2, 2]"], from_lists, "x", value, DType.F32, (2, 2))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [(DType.BF16, ml_dtypes.bfloat16), (DType.F16, np.float16), (DType.F32, np.float32)]
)
def test_every_finite_value_prints_to_a_number_that_reads_back_to_it(dtype, numpy_dtype):
    if dtype is DType.F32:
        bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
        bits[:6] = [0, 1, 0x80000000, 0x7F7FFFFF, 0x00800000, 0x007FFFFF]
    else:
        bits = np.arange(65536, dtype=np.uint16)
    values = bits.view(numpy_dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = values[np.isfinite(values)]
    values = values[: len(values) // 8 * 8]
    printed = json.dumps(to_floats(memoryview(values.tobytes()), dtype, 8).tolist(), allow_nan=False)
    back = np.array(json.loads(printed), dtype=np.float32).ravel().astype(numpy_dtype)
    assert back.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (DType.BF16, np.uint16(0x7F80)),
        (DType.BF16, np.uint16(0x7F81)),
        (DType.F16, np.uint16(0xFC00)),
        (DType.F16, np.uint16(0x7C01)),  # a signalling NaN
        (DType.F32, np.uint32(0x7F800000)),
        (DType.F32, np.uint32(0xFF800001)),
    ],
)
def test_an_output_that_json_cannot_hold_is_refused_by_row(dtype, bits, refused):
    values = np.zeros((3, 4), dtype=bits.dtype)
    values[1, 2] = bits
    refused(ErrorCode.NON_FINITE, ["output: row 1"], to_floats, memoryview(values.tobytes()), dtype, 4)
