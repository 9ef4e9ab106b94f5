from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from moe_forward.errors import ErrorCode
from moe_forward.types import DType, Routing
from moe_forward.wire import plain_json as encoding

H = 256
ROW = [0.5] * H


@pytest.fixture
def decode(make_request, limits):
    def run(message, **kwargs):
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        return encoding.decode(make_request(body, **{"query": ()} | kwargs), limits)

    return run


def test_nested_lists_become_float32_and_int64_outside_the_body(decode):
    row = [index / 7 for index in range(H)]
    call = decode(
        {"layer": 4, "hidden_states": [row, ROW], "topk_ids": [[1, 0], [7, 2]], "topk_weights": [[1, 0.25], [0, 2]]}
    )
    assert (call.layer, call.tokens, call.routing) == (4, 2, Routing.TOPK)
    assert (call.hidden.dtype, call.output_dtype, call.hidden.offset) == (DType.F32, DType.F32, None)
    assert bytes(call.hidden.data) == np.array([row, ROW], "<f4").tobytes()
    assert bytes(call.chosen.data) == struct.pack("<4q", 1, 0, 7, 2)
    assert bytes(call.weights.data) == struct.pack("<4f", 1, 0.25, 0, 2)


def test_parameters_may_stand_in_the_body_or_the_query(decode):
    call = decode({"hidden_states": [ROW], "shared_experts": False, "timeout_ms": 20}, query=[("layer", "5")])
    assert (call.layer, call.shared_experts, call.timeout_seconds) == (5, False, 0.02)


def test_router_logits_are_float32(decode):
    call = decode({"layer": 4, "hidden_states": [ROW], "router_logits": [[0, 1, 2, 3, 4, 5, 6, 7.5]]})
    assert (call.routing, call.chosen.dtype) == (Routing.LOGITS, DType.F32)


ROUTED = {"layer": 3, "hidden_states": [ROW], "topk_weights": [[1, 1]]}
REFUSALS = {
    "not JSON": (b"layer=3", ErrorCode.MALFORMED_BODY, ["body", "expected JSON"]),
    "empty": (b"", ErrorCode.MALFORMED_BODY, ["body"]),
    "not UTF-8": (b'{"layer": "\xff"}', ErrorCode.MALFORMED_BODY, ["UTF-8"]),
    "truncated": (json.dumps({"hidden_states": [ROW]}).encode()[:-3], ErrorCode.MALFORMED_BODY, ["expected JSON"]),
    "a list": ([ROW], ErrorCode.MALFORMED_BODY, ["object"]),
    "key twice": (b'{"layer": 3, "layer": 4}', ErrorCode.MALFORMED_BODY, ["'layer' 2 times"]),
    "too deep": (
        b'{"hidden_states": ' + b"[" * 300_000 + b"]" * 300_000 + b"}",
        ErrorCode.MALFORMED_BODY,
        ["nested too deeply"],
    ),
    "three levels": ({"layer": 3, "hidden_states": [[ROW]]}, ErrorCode.WRONG_SHAPE, ["hidden_states row 0 column 0"]),
    "integer of many digits": (
        b'{"layer": 3, "hidden_states": [[1' + b"0" * 5000 + b"]]}",
        ErrorCode.MALFORMED_BODY,
        ["sane length"],
    ),
    "unknown key": ({"layer": 3, "hidden": [ROW]}, ErrorCode.UNEXPECTED_TENSOR, ["'hidden'", "hidden_states"]),
    "no tensor": ({"layer": 3}, ErrorCode.MISSING_TENSOR, ["hidden_states"]),
    "null tensor": ({"layer": 3, "hidden_states": None}, ErrorCode.WRONG_SHAPE, ["hidden_states", "None"]),
    "no layer": ({"hidden_states": [ROW]}, ErrorCode.INVALID_PARAMETER, ["layer"]),
    "layer a string": ({"layer": "3", "hidden_states": [ROW]}, ErrorCode.INVALID_PARAMETER, ["layer", "'3'"]),
    "layer infinite": (b'{"layer": Infinity, "hidden_states": []}', ErrorCode.INVALID_PARAMETER, ["layer", "inf"]),
    "zero tokens": ({"layer": 3, "hidden_states": []}, ErrorCode.WRONG_SHAPE, ["at least one token"]),
    "flat": ({"layer": 3, "hidden_states": ROW}, ErrorCode.WRONG_SHAPE, ["[tokens, 256]", "got [256]"]),
    "ragged": ({"layer": 3, "hidden_states": [ROW, ROW[1:]]}, ErrorCode.WRONG_SHAPE, ["256", "255 in row 1"]),
    "string in a row": (
        {"layer": 3, "hidden_states": [ROW, [*ROW[:-1], "x"]]},
        ErrorCode.WRONG_DTYPE,
        ["hidden_states row 1 column 255", "'x'"],
    ),
    "NaN literal": (
        {"layer": 3, "hidden_states": [[float("nan"), *ROW[1:]]]},
        ErrorCode.NON_FINITE,
        ["hidden_states row 0 column 0", "nan"],
    ),
    "Infinity literal": ({"layer": 3, "hidden_states": [[float("inf")]]}, ErrorCode.NON_FINITE, ["inf"]),
    "beyond float64": (b'{"layer": 3, "hidden_states": [[1e999]]}', ErrorCode.NON_FINITE, ["hidden_states"]),
    "beyond float32": ({"layer": 3, "hidden_states": [[1e39]]}, ErrorCode.OUT_OF_RANGE, ["hidden_states", "1e+39"]),
    "float ids": (ROUTED | {"topk_ids": [[1.0, 2]]}, ErrorCode.WRONG_DTYPE, ["topk_ids row 0 column 0", "1.0"]),
    "boolean ids": (ROUTED | {"topk_ids": [[True, 2]]}, ErrorCode.WRONG_DTYPE, ["topk_ids", "True"]),
    "ids beyond int64": (ROUTED | {"topk_ids": [[2**64, 2]]}, ErrorCode.OUT_OF_RANGE, ["topk_ids", str(2**64)]),
    "negative ids": (ROUTED | {"topk_ids": [[-1, 2]]}, ErrorCode.OUT_OF_RANGE, ["topk_ids row 0", "-1"]),
    "NaN weights": (
        ROUTED | {"topk_ids": [[1, 2]], "topk_weights": [[float("nan"), 1]]},
        ErrorCode.NON_FINITE,
        ["topk_weights row 0"],
    ),
    "scales": (
        {"layer": 3, "hidden_states": [ROW], "hidden_scales": [1.0]},
        ErrorCode.UNEXPECTED_TENSOR,
        ["hidden_scales", "F32"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_bodies_are_refused_by_name(case, decode, refused):
    message, code, words = REFUSALS[case]
    refused(code, words, decode, message)


def test_a_reply_holds_rows_that_read_back_to_the_same_float32(decode, notes):
    call = decode({"layer": 4, "hidden_states": [ROW, ROW]})
    output = np.random.default_rng(0).standard_normal((2, H), dtype=np.float32) * np.float32(1e-30)
    reply = encoding.encode(call, memoryview(output.tobytes()), notes)
    assert reply.content_type == "application/json"
    message = json.loads(reply.head + bytes(reply.body))
    assert np.array_equal(np.array(message.pop("output"), dtype=np.float32), output)
    assert message == {"layer": 4, "tokens": 2, "request_id": "r-17"}


def test_a_reply_that_json_cannot_hold_is_refused(decode, notes, refused):
    call = decode({"layer": 4, "hidden_states": [ROW]})
    output = np.full((1, H), np.inf, dtype=np.float32)
    refused(ErrorCode.NON_FINITE, ["output: row 0"], encoding.encode, call, memoryview(output.tobytes()), notes)
