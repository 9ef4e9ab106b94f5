"""Open Inference Protocol v2 over REST with the binary tensor data extension, as KServe and Triton speak it.

Protocol: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.wire.base import ForwardCall, ReplyNotes, WireLimits, WireReply, WireRequest, output_shape
from moe_forward.wire.checks import check_uncompressed, forward_call
from moe_forward.wire.numbers import to_floats
from moe_forward.wire.oip_fields import DATATYPES, parse_parameters, read_inputs, wants_binary
from moe_forward.wire.oip_metadata import MODEL_VERSION, check_model, model_metadata, server_metadata
from moe_forward.wire.parameters import NAMES, collect
from moe_forward.wire.text import parse_object, shown

__all__ = ["HEADER_LENGTH", "OipReply", "check_model", "decode", "encode", "model_metadata", "name", "server_metadata"]

HEADER_LENGTH = "inference-header-content-length"
MAX_HEADER_BYTES = 1 << 20
"""JSON in front of binary tensors; a body that is all JSON is capped by the caller."""

_KEYS = ("id", "inputs", "outputs", "parameters", "model_name")  # model_name: KServe's client repeats it

name = "oip"


@dataclass(frozen=True, slots=True)
class OipReply:
    """What a reply repeats of its request. binary: the output follows the JSON as bytes."""

    model: str
    id: str | None
    binary: bool


def decode(request: WireRequest, limits: WireLimits) -> ForwardCall:
    """Read an inference request; binary tensors are views of the body, JSON ones are converted.

    Raises: ForwardError.
    """
    check_uncompressed(request)
    check_model(request.model, request.version, limits.spec)
    end = _json_end(request)
    message = parse_object(request.body[:end], "inference request")
    for key in message:
        if key not in _KEYS:
            raise _malformed(f"inference request: expected keys of {', '.join(_KEYS)}, got {shown(key)}")
    if "model_name" in message:
        check_model(message["model_name"], None, limits.spec)
    request_id = message.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise _malformed(f"id: expected a string, got {shown(request_id)}")
    parameters = parse_parameters(message.get("parameters"), "parameters", (*NAMES, "binary_data_output"))
    binary = wants_binary(message.get("outputs"), parameters.get("binary_data_output", False))
    tensors = read_inputs(message.get("inputs"), request.body, end)
    given = collect(request, parameters, typed=True)
    call = forward_call(tensors, given, limits, OipReply(limits.spec.name, request_id, binary))
    values = call.tokens * limits.spec.hidden_size
    if not binary and values > limits.max_json_values:
        raise ForwardError(
            ErrorCode.TOO_LARGE,
            f"outputs: expected at most {limits.max_json_values} numbers in a JSON reply, got {values}; ask for "
            "binary_data_output",
        )
    return call


def encode(call: ForwardCall, output: memoryview, notes: ReplyNotes) -> WireReply:
    """Write the inference response: `output` behind the JSON as it is, or as a flat list of numbers inside.

    Raises: ForwardError NON_FINITE for a value JSON cannot hold.
    """
    reply = call.reply
    if not isinstance(reply, OipReply):
        raise TypeError(f"expected a call that oip.decode made, got reply notes {reply!r}")
    shape = output_shape(call, output)
    tensor: dict[str, object] = {"name": "output", "datatype": DATATYPES[call.output_dtype], "shape": shape}
    if reply.binary:
        tensor["parameters"] = {"binary_data_size": output.nbytes}
    else:
        tensor["data"] = to_floats(output, call.output_dtype, shape[1]).ravel().tolist()
    about: dict[str, int] = {
        "batch_tokens": notes.batch_tokens,
        "queue_us": round(notes.queue_seconds * 1e6),
        "forward_us": round(notes.step_seconds * 1e6),
        **notes.lacking,
    }
    message = {
        "model_name": reply.model,
        "model_version": MODEL_VERSION,
        **({} if reply.id is None else {"id": reply.id}),
        "outputs": [tensor],
        "parameters": about,
    }
    text = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if reply.binary:
        return WireReply("application/octet-stream", ((HEADER_LENGTH, str(len(text))),), text, output)
    return WireReply("application/json", (), b"", text)


def _json_end(request: WireRequest) -> int:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return len(request.body)
    text = text.strip()
    length = int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else -1
    if not 0 <= length <= len(request.body):
        raise _malformed(f"{HEADER_LENGTH}: expected bytes in [0, {len(request.body)}], got {shown(text)}")
    if length > MAX_HEADER_BYTES:
        raise ForwardError(
            ErrorCode.TOO_LARGE,
            f"{HEADER_LENGTH}: expected at most {MAX_HEADER_BYTES} bytes of JSON before binary tensors, got {length}",
        )
    return length


def _malformed(message: str) -> ForwardError:
    return ForwardError(ErrorCode.MALFORMED_BODY, message)
