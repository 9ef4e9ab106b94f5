"""`application/vnd.safetensors`: an 8-byte little-endian header length, a JSON header, then the tensors' bytes.

Format: https://github.com/huggingface/safetensors#format. The header is parsed here because the library takes a copy
of the body or a file, and this body is read in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii  # what json.dumps comes to for a string

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import DType
from moe_forward.wire.base import ForwardCall, ReplyNotes, WireLimits, WireReply, WireRequest, WireTensor, output_shape
from moe_forward.wire.checks import TENSORS, check_uncompressed, forward_call
from moe_forward.wire.parameters import PARAMETER_HEADERS, collect
from moe_forward.wire.text import elements, parse_object, parse_shape, shown

CONTENT_TYPE = "application/vnd.safetensors"
MAX_HEADER_BYTES = 128 * 1024
"""Five tensors need some hundred bytes; the rest is for metadata."""

REMEMBERED_BYTES = 4096
"""Longest header that is remembered: what is kept stays small whatever clients send."""

_NO_DATA = memoryview(b"")
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

name = "safetensors"


def decode(request: WireRequest, limits: WireLimits) -> ForwardCall:
    """Read a forward; parameters may also stand in `__metadata__`, whose other keys are free text.

    Returns: the call; its tensors are views of the body.
    Raises: ForwardError.
    """
    check_uncompressed(request)
    body, headers = request.body, request.headers
    length = _header_length(body)
    text = bytes(body[_LENGTH_BYTES : _LENGTH_BYTES + length])
    given = () if headers.keys().isdisjoint(PARAMETER_HEADERS) else _given(headers)
    read = _remembered if length <= REMEMBERED_BYTES else _remembered.__wrapped__
    metadata, tensors, call = read(text, len(body), tuple(request.query), given, limits)
    if call is None:
        here = {tensor.name: _in(body, tensor) for tensor in tensors}
        return forward_call(here, collect(request, dict(metadata), typed=False), limits, None)
    return ForwardCall(
        call.layer,
        call.tokens,
        call.timeout_seconds,
        call.shared_experts,
        _in(body, call.hidden),
        None if call.hidden_scales is None else _in(body, call.hidden_scales),
        call.routing,
        None if call.chosen is None else _in(body, call.chosen),
        None,
        call.output_dtype,
        None,
    )


def encode(call: ForwardCall, output: memoryview, notes: ReplyNotes) -> WireReply:
    """Write the tensor `output` [T, H] behind a header padded so that it starts on 8 bytes.

    output: bytes of [T, H] in `call.output_dtype`; sent as they are.
    """
    before, after = _reply_header(call.output_dtype, output_shape(call, output), output.nbytes)
    header = f"{before}{encode_basestring_ascii(notes.request_id)}{after}".encode()
    header += b" " * (-len(header) % 8)
    return WireReply(CONTENT_TYPE, (), len(header).to_bytes(_LENGTH_BYTES, "little") + header, output)


def _given(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, headers[name]) for name in PARAMETER_HEADERS if name in headers)


def _header_length(body: memoryview) -> int:
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
    return length


@lru_cache(maxsize=256)
def _remembered(
    text: bytes,
    body_bytes: int,
    query: tuple[tuple[str, str], ...],
    headers: tuple[tuple[str, str], ...],
    limits: WireLimits,
) -> tuple[tuple[tuple[str, object], ...], tuple[WireTensor, ...], ForwardCall | None]:
    """Read what says nothing of values, since a client sends it again and again; what is refused is read anew.

    text: the JSON header. headers: those that hold parameters.
    Returns: metadata as pairs; the tensors without their data; the call of these, or None where values are checked.
    """
    header = parse_object(memoryview(text), "safetensors header")
    metadata = _metadata(header.pop(_METADATA, {}))
    tensors = _tensors(header, body_bytes, _LENGTH_BYTES + len(text))
    call = None
    if not tensors.keys() & {"topk_ids", "topk_weights"}:
        request = WireRequest(dict(headers), query, _NO_DATA)
        call = forward_call(tensors, collect(request, metadata, typed=False), limits, None)
    return tuple(metadata.items()), tuple(tensors.values()), call


def _in(body: memoryview, tensor: WireTensor) -> WireTensor:
    """Return `tensor` with its data, from its place in `body`."""
    assert tensor.offset is not None
    nbytes = elements(tensor.shape) * tensor.dtype.itemsize
    data = body[tensor.offset : tensor.offset + nbytes]
    return WireTensor(tensor.name, tensor.dtype, tensor.shape, data, tensor.offset)


@lru_cache(maxsize=256)
def _reply_header(dtype: DType, shape: tuple[int, int], nbytes: int) -> tuple[str, str]:
    """Return what stands before and after the request's id in the header of a reply."""
    output = {"dtype": dtype.name, "shape": shape, "data_offsets": (0, nbytes)}
    header = json.dumps({_METADATA: {"request_id": 0}, "output": output}, separators=(",", ":"))
    before, _, after = header.partition("0")
    return before, after


def _metadata(value: object) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _malformed(f"{_METADATA}: expected an object of strings, got {shown(value)}")
    return value


def _tensors(header: dict[str, object], body_bytes: int, start: int) -> dict[str, WireTensor]:
    data_bytes = body_bytes - start
    spans = {key: _span(key, entry, data_bytes) for key, entry in header.items()}
    position = 0
    for key, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            problem = "a hole before it" if begin > position else "an overlap"
            raise _malformed(f"{_label(key)}: expected data_offsets to start at {position}, got {begin}: {problem}")
        position = end
    if position != data_bytes:
        raise _malformed(f"body: expected {position} bytes of tensor data, got {data_bytes}")
    return {
        key: WireTensor(key, dtype, shape, _NO_DATA, start + begin) for key, (dtype, shape, begin, _) in spans.items()
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
