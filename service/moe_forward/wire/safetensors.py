"""`application/vnd.safetensors`: an 8-byte little-endian header length, a JSON header, then the tensors' bytes.

Format: https://github.com/huggingface/safetensors#format. The header is parsed here because the library takes a copy
of the body or a file, and this body is read in place.
"""

from __future__ import annotations

import json

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import DType
from moe_forward.wire.base import ForwardCall, ReplyNotes, WireLimits, WireReply, WireRequest, WireTensor, output_shape
from moe_forward.wire.checks import TENSORS, check_uncompressed, forward_call
from moe_forward.wire.parameters import collect
from moe_forward.wire.text import elements, parse_object, parse_shape, shown

CONTENT_TYPE = "application/vnd.safetensors"
MAX_HEADER_BYTES = 128 * 1024
"""Five tensors need some hundred bytes; the rest is for metadata."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"

name = "safetensors"


def decode(request: WireRequest, limits: WireLimits) -> ForwardCall:
    """Read a forward; parameters may also stand in `__metadata__`, whose other keys are free text.

    Returns: the call; its tensors are views of the body.
    Raises: ForwardError.
    """
    check_uncompressed(request)
    header, start = _header(request.body)
    metadata = _metadata(header.pop(_METADATA, {}))
    tensors = _tensors(header, request.body, start)
    return forward_call(tensors, collect(request, metadata, typed=False), limits, None)


def encode(call: ForwardCall, output: memoryview, notes: ReplyNotes) -> WireReply:
    """Write the tensor `output` [T, H] behind a header padded so that it starts on 8 bytes.

    output: bytes of [T, H] in `call.output_dtype`; sent as they are.
    """
    shape = output_shape(call, output)
    header = json.dumps(
        {
            _METADATA: {"request_id": notes.request_id},
            "output": {"dtype": call.output_dtype.name, "shape": shape, "data_offsets": (0, output.nbytes)},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    return WireReply(CONTENT_TYPE, (), len(header).to_bytes(_LENGTH_BYTES, "little") + header, output)


def _header(body: memoryview) -> tuple[dict[str, object], int]:
    if len(body) < _LENGTH_BYTES:
        raise _malformed(f"body: expected at least {_LENGTH_BYTES} bytes of safetensors, got {len(body)}")
    length = int.from_bytes(body[:_LENGTH_BYTES], "little")
    if length > len(body) - _LENGTH_BYTES:
        raise _malformed(
            f"safetensors header: expected it inside the body, got length {length} with "
            f"{len(body) - _LENGTH_BYTES} bytes left"
        )
    if length > MAX_HEADER_BYTES:
        raise _malformed(f"safetensors header: expected at most {MAX_HEADER_BYTES} bytes, got {length}")
    start = _LENGTH_BYTES + length
    return parse_object(body[_LENGTH_BYTES:start], "safetensors header"), start


def _metadata(value: object) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _malformed(f"{_METADATA}: expected an object of strings, got {shown(value)}")
    return value


def _tensors(header: dict[str, object], body: memoryview, start: int) -> dict[str, WireTensor]:
    spans = {key: _span(key, entry, len(body) - start) for key, entry in header.items()}
    position = 0
    for key, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            problem = "a hole before it" if begin > position else "an overlap"
            raise _malformed(f"{_label(key)}: expected data_offsets to start at {position}, got {begin}: {problem}")
        position = end
    if start + position != len(body):
        raise _malformed(f"body: expected {position} bytes of tensor data, got {len(body) - start}")
    return {
        key: WireTensor(key, dtype, shape, body[start + begin : start + end], start + begin)
        for key, (dtype, shape, begin, end) in spans.items()
    }


def _span(key: str, entry: object, data_bytes: int) -> tuple[DType, tuple[int, ...], int, int]:
    label = _label(key)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(f"{label}: expected an object of dtype, shape and data_offsets, got {shown(entry)}")
    dtype = next((dtype for dtype in DType if dtype.name == entry["dtype"]), None)
    if dtype is None:
        raise ForwardError(
            ErrorCode.WRONG_DTYPE,
            f"{label}: expected a dtype of {', '.join(dtype.name for dtype in DType)}, got {shown(entry['dtype'])}",
        )
    shape = parse_shape(label, entry["shape"])
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise _malformed(f"{label}: expected data_offsets of two integers, got {shown(offsets)}")
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        raise _malformed(f"{label}: expected data_offsets ascending in [0, {data_bytes}], got {shown(offsets)}")
    if end - begin != elements(shape) * dtype.itemsize:
        raise _malformed(
            f"{label}: expected {elements(shape) * dtype.itemsize} bytes for {dtype.name} {list(shape)}, "
            f"got {end - begin} in data_offsets"
        )
    return dtype, shape, begin, end


def _label(key: str) -> str:
    return key if key in TENSORS else shown(key)


def _malformed(message: str) -> ForwardError:
    return ForwardError(ErrorCode.MALFORMED_BODY, message)
