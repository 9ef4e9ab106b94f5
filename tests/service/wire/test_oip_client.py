"""Requests that `tritonclient` builds are decoded, and it parses the replies."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton

from moe_forward.errors import ErrorCode
from moe_forward.types import DType, Routing
from moe_forward.wire import oip as encoding

H = 256
FLOATS = {"BF16": ml_dtypes.bfloat16, "FP16": np.float16, "FP32": np.float32}


def tensor(name, datatype, values, binary=True):
    return triton.InferInput(name, list(values.shape), datatype).set_data_from_numpy(values, binary_data=binary)


def random(shape, dtype):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.fixture
def decode(make_request, limits):
    def run(inputs, outputs=None, request_id="", **parameters):
        body, json_bytes = triton.InferenceServerClient.generate_request_body(
            inputs, outputs, request_id, parameters={"layer": 3} | parameters
        )
        headers = {} if json_bytes is None else {"inference-header-content-length": str(json_bytes)}
        return encoding.decode(make_request(body, (), headers, "tiny"), limits)

    return run


def parse(reply):
    lengths = [int(value) for key, value in reply.headers if key == "inference-header-content-length"]
    body = reply.head + bytes(reply.body)
    return triton.InferenceServerClient.parse_response_body(body, header_length=lengths[0] if lengths else None)


@pytest.mark.parametrize("datatype", FLOATS)
def test_a_binary_request_and_its_binary_reply_keep_every_bit(datatype, decode, notes):
    hidden, output = random((3, H), FLOATS[datatype]), random((3, H), FLOATS[datatype]) * 2
    call = decode([tensor("hidden_states", datatype, hidden)], request_id="q-1", shared_experts=False, timeout_ms=9)
    assert (call.tokens, call.shared_experts, call.timeout_seconds) == (3, False, 0.009)
    assert bytes(call.hidden.data) == hidden.tobytes()
    result = parse(encoding.encode(call, memoryview(output.tobytes()), notes))
    assert result.as_numpy("output").dtype == output.dtype
    assert result.as_numpy("output").tobytes() == output.tobytes()
    assert result.get_response()["id"] == "q-1"
    assert result.get_response()["parameters"]["batch_tokens"] == 24


@pytest.mark.parametrize("datatype", FLOATS)
def test_a_reply_in_json_keeps_every_bit(datatype, decode, notes):
    output = random((3, H), FLOATS[datatype])
    call = decode(
        [tensor("hidden_states", datatype, output)], [triton.InferRequestedOutput("output", binary_data=False)]
    )
    result = parse(encoding.encode(call, memoryview(output.tobytes()), notes))
    assert result.as_numpy("output").tobytes() == output.tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_a_routed_request_is_decoded(binary, decode):
    ids, weights = np.array([[0, 1], [6, 7]], np.int64), random((2, 2), np.float32)
    call = decode(
        [
            tensor("topk_ids", "INT64", ids, binary),
            tensor("hidden_states", "FP32", random((2, H), np.float32), binary),
            tensor("topk_weights", "FP32", weights, binary),
        ]
    )
    assert call.routing is Routing.TOPK
    assert (bytes(call.chosen.data), bytes(call.weights.data)) == (ids.tobytes(), weights.tobytes())


def test_fp8_with_scales_is_decoded(decode):
    hidden = random((2, H), ml_dtypes.float8_e4m3fn).view(np.uint8)
    states = tensor("hidden_states", "UINT8", hidden)
    states._parameters["moe_dtype"] = "FP8_E4M3"  # the client has no public way to set a tensor's parameter
    call = decode([states, tensor("hidden_scales", "FP32", np.ones((2, 2), np.float32))])
    assert (call.hidden.dtype, bytes(call.hidden.data)) == (DType.F8_E4M3, hidden.tobytes())


def test_what_the_client_can_ask_for_and_the_service_cannot_do_is_refused_by_name(decode, refused):
    states = tensor("hidden_states", "FP32", random((1, H), np.float32))
    shared = triton.InferInput("hidden_states", [1, H], "FP32").set_shared_memory("region", 4 * H)
    output = triton.InferRequestedOutput("output")
    output.set_shared_memory("region", 4 * H)
    refused(ErrorCode.INVALID_PARAMETER, ["shared_memory_region"], decode, [shared])
    refused(ErrorCode.INVALID_PARAMETER, ["shared_memory_region"], decode, [states], [output])
    classes = triton.InferRequestedOutput("output", class_count=3)
    refused(ErrorCode.INVALID_PARAMETER, ["classification"], decode, [states], [classes])
    refused(ErrorCode.UNEXPECTED_TENSOR, ["'logits'"], decode, [states], [triton.InferRequestedOutput("logits")])
