"""`application/json`: tensors as nested lists, for trying things with curl. The caller caps the body's size."""

from __future__ import annotations

import json

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import DType
from moe_forward.wire.base import ForwardCall, ReplyNotes, WireLimits, WireReply, WireRequest, output_shape
from moe_forward.wire.checks import TENSORS, check_uncompressed, forward_call
from moe_forward.wire.numbers import from_lists, to_floats
from moe_forward.wire.parameters import NAMES, collect
from moe_forward.wire.text import parse_object, shown

CONTENT_TYPE = "application/json"

name = "json"


def decode(request: WireRequest, limits: WireLimits) -> ForwardCall:
    """Read a forward; numbers become F32, ids I64, and parameters are keys beside the tensors.

    Raises: ForwardError.
    """
    check_uncompressed(request)
    message = parse_object(request.body, "body")
    for key in message:
        if key not in TENSORS and key not in NAMES:
            raise ForwardError(
                ErrorCode.UNEXPECTED_TENSOR, f"body: expected keys of {', '.join(TENSORS + NAMES)}, got {shown(key)}"
            )
    tensors = {
        key: from_lists(key, message[key], DType.I64 if key == "topk_ids" else DType.F32)
        for key in TENSORS
        if key in message
    }
    return forward_call(tensors, collect(request, message, typed=True), limits, None)


def encode(call: ForwardCall, output: memoryview, notes: ReplyNotes) -> WireReply:
    """Write `output` as rows of numbers that read back to the same float32.

    Raises: ForwardError NON_FINITE for a value JSON cannot hold.
    """
    rows = to_floats(output, call.output_dtype, output_shape(call, output)[1])
    about = {"layer": call.layer, "tokens": call.tokens, "request_id": notes.request_id, **notes.lacking}
    message = {"output": rows.tolist(), **about}
    return WireReply(CONTENT_TYPE, (), b"", json.dumps(message, allow_nan=False).encode())
