"""The lists `inputs` and `outputs` of an Open Inference Protocol request, field by field."""

from __future__ import annotations

from types import MappingProxyType

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import DType
from moe_forward.wire.base import WireTensor
from moe_forward.wire.checks import TENSORS
from moe_forward.wire.numbers import from_lists
from moe_forward.wire.text import elements, parse_shape, shown

DATATYPES = MappingProxyType(
    {
        DType.BF16: "BF16",
        DType.F16: "FP16",
        DType.F32: "FP32",
        DType.I32: "INT32",
        DType.I64: "INT64",
        DType.F8_E4M3: "UINT8",  # the protocol has no fp8; the tensor parameter moe_dtype says what the bytes are
    }
)
FP8_NAME = "FP8_E4M3"


def parse_parameters(value: object, where: str, accepted: tuple[str, ...]) -> dict[str, object]:
    """Check a `parameters` object: nothing in it is ignored.

    value: the object, None where there is none. where: whose it is, for messages.
    Raises: ForwardError MALFORMED_BODY when it is no object, INVALID_PARAMETER for a name not in `accepted`.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _malformed(f"{where}: expected an object, got {shown(value)}")
    for key in value:
        if key not in accepted:
            reason = "" if not key.startswith("shared_memory") else ", shared memory is not supported"
            raise ForwardError(
                ErrorCode.INVALID_PARAMETER,
                f"{where}: expected only {', '.join(accepted)}, got {shown(key)}{reason}",
            )
    return value


def wants_binary(outputs: object, default: object) -> bool:
    """Whether the reply's tensor comes as bytes behind the JSON.

    outputs: the request's list, None or empty for everything. default: request parameter binary_data_output.
    Raises: ForwardError UNEXPECTED_TENSOR for a name other than `output`, INVALID_PARAMETER, MALFORMED_BODY.
    """
    binary = _boolean("binary_data_output", default)
    if outputs is None:
        return binary
    if not isinstance(outputs, list):
        raise _malformed(f"outputs: expected a list, got {shown(outputs)}")
    for item in outputs:
        fields = _fields(item, "outputs", ("name", "parameters"))
        if fields["name"] != "output":
            raise ForwardError(
                ErrorCode.UNEXPECTED_TENSOR, f"outputs: expected only 'output', got {shown(fields['name'])}"
            )
        parameters = parse_parameters(fields.get("parameters"), "output parameters", ("binary_data",))
        binary = _boolean("output parameter binary_data", parameters.get("binary_data", binary))
    if len(outputs) > 1:
        raise ForwardError(ErrorCode.UNEXPECTED_TENSOR, f"outputs: expected 'output' once, got it {len(outputs)} times")
    return binary


def read_inputs(inputs: object, body: memoryview, start: int) -> dict[str, WireTensor]:
    """Read the tensors of a request.

    inputs: the request's list. body: JSON and, from byte `start` on, the binary tensors in the order of `inputs`.
    Returns: by name; binary ones are views of the body.
    Raises: ForwardError MALFORMED_BODY, UNEXPECTED_TENSOR, WRONG_DTYPE, INVALID_PARAMETER and what JSON data raises.
    """
    if not isinstance(inputs, list):
        raise _malformed(f"inputs: expected a list of tensors, got {shown(inputs)}")
    tensors: dict[str, WireTensor] = {}
    position = start
    for item in inputs:
        tensor = _input(item, body, position)
        if tensor.name in tensors:
            raise ForwardError(ErrorCode.UNEXPECTED_TENSOR, f"inputs: expected {tensor.name} once, got it twice")
        tensors[tensor.name] = tensor
        position += 0 if tensor.offset is None else tensor.data.nbytes
    if position != len(body):
        raise _malformed(
            f"body: expected {position - start} bytes of binary tensors by binary_data_size, got {len(body) - start}"
        )
    return tensors


def _input(item: object, body: memoryview, position: int) -> WireTensor:
    fields = _fields(item, "inputs", ("name", "shape", "datatype", "parameters", "data"))
    label = fields["name"]
    if label not in TENSORS:
        raise ForwardError(
            ErrorCode.UNEXPECTED_TENSOR, f"inputs: expected only {', '.join(TENSORS)}, got {shown(label)}"
        )
    if "shape" not in fields or "datatype" not in fields:
        raise _malformed(f"{label}: expected shape and datatype, got only {list(fields)}")
    parameters = parse_parameters(fields.get("parameters"), f"{label} parameters", ("binary_data_size", "moe_dtype"))
    shape, dtype = parse_shape(label, fields["shape"]), _dtype(label, fields["datatype"], parameters)
    if ("data" in fields) == ("binary_data_size" in parameters):
        raise _malformed(f"{label}: expected either data or the parameter binary_data_size, got both or neither")
    if "data" in fields:
        if dtype in (DType.BF16, DType.F16):
            raise ForwardError(
                ErrorCode.WRONG_DTYPE,
                f"{label}: expected {DATATYPES[dtype]} as binary data, got JSON numbers, which only FP32 may be",
            )
        return from_lists(label, fields["data"], dtype, shape)
    size, expected = parameters["binary_data_size"], elements(shape) * dtype.itemsize
    if type(size) is not int or size != expected:
        raise _malformed(
            f"{label}: expected binary_data_size {expected} for {DATATYPES[dtype]} {list(shape)}, got {shown(size)}"
        )
    if position + size > len(body):
        raise _malformed(f"{label}: expected {size} bytes of binary data, got {len(body) - position} left in the body")
    return WireTensor(label, dtype, shape, body[position : position + size], position)


def _dtype(label: str, datatype: object, parameters: dict[str, object]) -> DType:
    dtype = next((dtype for dtype, text in DATATYPES.items() if text == datatype), None)
    if dtype is None:
        raise ForwardError(
            ErrorCode.WRONG_DTYPE,
            f"{label}: expected a datatype of {', '.join(DATATYPES.values())}, got {shown(datatype)}",
        )
    moe_dtype = parameters.get("moe_dtype")
    if (dtype is DType.F8_E4M3) != (moe_dtype == FP8_NAME) or moe_dtype not in (None, FP8_NAME):
        raise ForwardError(
            ErrorCode.WRONG_DTYPE,
            f"{label}: expected UINT8 with the tensor parameter moe_dtype={FP8_NAME}, or neither, "
            f"got {datatype} with moe_dtype {shown(moe_dtype)}",
        )
    return dtype


def _fields(item: object, where: str, accepted: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise _malformed(f"{where}: expected objects with a name, got {shown(item)}")
    for key in item:
        if key not in accepted:
            raise _malformed(f"{where}: expected fields of {', '.join(accepted)}, got {shown(key)}")
    return item


def _boolean(label: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ForwardError(ErrorCode.INVALID_PARAMETER, f"{label}: expected true or false, got {shown(value)}")
    return value


def _malformed(message: str) -> ForwardError:
    return ForwardError(ErrorCode.MALFORMED_BODY, message)
