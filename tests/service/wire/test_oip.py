from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from moe_forward.errors import ErrorCode
from moe_forward.types import DType, Routing
from moe_forward.wire import oip as encoding

from .oip_messages import DATA, ONES, H, as_json, hidden


@pytest.mark.parametrize("padding", range(5))
def test_binary_tensors_are_views_of_the_body_in_input_order(padding, make_request, limits):
    logits = {"name": "router_logits", "shape": [1, 8], "datatype": "FP32", "parameters": {"binary_data_size": 32}}
    text = json.dumps({"inputs": [logits, hidden()], "parameters": {"layer": 3}}).encode() + b" " * padding
    body = bytearray(text + np.arange(8, dtype="<f4").tobytes() + DATA)
    headers = {"inference-header-content-length": str(len(text))}
    call = encoding.decode(make_request(body, (), headers, "tiny", "1"), limits)
    assert (call.chosen.offset, call.hidden.offset) == (len(text), len(text) + 32)
    assert bytes(call.hidden.data) == DATA
    body[-1] ^= 0xFF
    assert call.hidden.data[-1] == DATA[-1] ^ 0xFF


@pytest.mark.parametrize("nested", [False, True])
def test_json_tensors_are_flat_or_nested(nested, decode_oip):
    values = np.arange(2 * H, dtype=np.float32).reshape(2, H)
    ids, weights = [[0, 1], [2, 3]], [[0.5, 1], [2, 3]]
    if not nested:
        ids, weights = [0, 1, 2, 3], [0.5, 1, 2, 3]
    call = decode_oip(
        {
            "inputs": [
                as_json("hidden_states", [2, H], "FP32", (values if nested else values.ravel()).tolist()),
                as_json("topk_ids", [2, 2], "INT32", ids),
                as_json("topk_weights", [2, 2], "FP32", weights),
            ]
        }
    )
    assert (call.routing, call.output_dtype, call.hidden.offset) == (Routing.TOPK, DType.F32, None)
    assert bytes(call.hidden.data) == values.tobytes()
    assert bytes(call.chosen.data) == struct.pack("<4i", 0, 1, 2, 3)


def test_json_and_binary_tensors_mix(decode_oip):
    call = decode_oip({"inputs": [as_json("router_logits", [1, 8], "FP32", [0] * 8), hidden()]}, DATA)
    assert call.chosen.offset is None
    assert bytes(call.hidden.data) == DATA


@pytest.mark.parametrize("datatype", ["BF16", "FP16", "FP32"])
def test_the_output_has_the_type_of_the_input(datatype, decode_oip, notes):
    size = 4 if datatype == "FP32" else 2
    call = decode_oip({"inputs": [hidden(size * H, datatype=datatype)]}, bytes(size * H))
    reply = encoding.encode(call, memoryview(bytes(size * H)), notes)
    assert json.loads(reply.head + bytes(reply.body))["outputs"][0]["datatype"] == datatype


def test_fp8_travels_as_uint8_and_is_answered_in_bf16(decode_oip):
    scales = as_json("hidden_scales", [1, 2], "FP32", [1, 2])
    call = decode_oip({"inputs": [hidden(H, datatype="UINT8", moe_dtype="FP8_E4M3"), scales]}, bytes(H))
    assert (call.hidden.dtype, call.output_dtype, call.hidden_scales.shape) == (DType.F8_E4M3, DType.BF16, (1, 2))
    inputs = [as_json("hidden_states", [1, H], "UINT8", list(range(256)), moe_dtype="FP8_E4M3"), scales]
    assert bytes(decode_oip({"inputs": inputs}).hidden.data) == bytes(range(256))


def test_parameters_may_stand_in_the_request_the_query_or_a_header(decode_oip):
    parameters = {"layer": 5, "shared_experts": False, "timeout_ms": 40}
    call = decode_oip({"inputs": [ONES], "parameters": parameters})
    assert (call.layer, call.shared_experts, call.timeout_seconds) == (5, False, 0.04)
    assert decode_oip({"inputs": [ONES], "parameters": None}, query=[("layer", "6")]).layer == 6
    assert decode_oip({"inputs": [ONES], "parameters": {}}, headers={"x-moe-layer": "7"}).layer == 7


@pytest.mark.parametrize(
    ("message", "binary"),
    [
        ({}, False),
        ({"outputs": []}, False),
        ({"outputs": [{"name": "output"}]}, False),
        ({"outputs": [{"name": "output", "parameters": {"binary_data": True}}]}, True),
        ({"parameters": {"layer": 3, "binary_data_output": True}}, True),
        ({"outputs": [{"name": "output"}], "parameters": {"layer": 3, "binary_data_output": True}}, True),
        (
            {
                "outputs": [{"name": "output", "parameters": {"binary_data": False}}],
                "parameters": {"layer": 3, "binary_data_output": True},
            },
            False,
        ),
    ],
)
def test_the_output_is_binary_when_it_is_asked_for(message, binary, decode_oip, notes):
    call = decode_oip({"inputs": [ONES]} | message)
    values = np.arange(H, dtype="<f4") / 7
    output = memoryview(values.tobytes())
    reply = encoding.encode(call, output, notes)
    head = json.loads(reply.head) if binary else json.loads(reply.head + bytes(reply.body))
    tensor = head["outputs"][0]
    assert {key: tensor[key] for key in ("name", "datatype", "shape")} == {
        "name": "output",
        "datatype": "FP32",
        "shape": [1, H],
    }
    if binary:
        assert reply.body is output  # sent in place
        assert reply.headers == (("inference-header-content-length", str(len(reply.head))),)
        assert reply.content_type == "application/octet-stream"
        assert tensor["parameters"] == {"binary_data_size": 4 * H}
        assert "data" not in tensor
    else:
        assert (reply.headers, reply.content_type) == ((), "application/json")
        assert np.array_equal(np.array(tensor["data"], dtype=np.float32), values)
        assert "parameters" not in tensor


def test_a_reply_names_the_model_and_the_work_and_repeats_an_id_only_when_there_was_one(decode_oip, notes):
    def reply(message):
        made = encoding.encode(decode_oip({"inputs": [ONES]} | message), memoryview(bytes(4 * H)), notes)
        return json.loads(made.head + bytes(made.body))

    parameters = {"batch_tokens": 24, "queue_us": 125, "forward_us": 3100}
    expected = {"model_name": "tiny", "model_version": "1", "parameters": parameters}
    assert {key: value for key, value in reply({}).items() if key != "outputs"} == expected
    assert reply({"id": 'a"\ud800'})["id"] == 'a"\ud800'
    assert reply({"id": ""})["id"] == ""


def test_numbers_of_a_bf16_output_are_its_exact_decimals(decode_oip, notes):
    call = decode_oip({"inputs": [hidden()]}, DATA)
    bits = np.full(H, 0x3DCD, dtype="<u2")  # bf16(0.1)
    reply = encoding.encode(call, memoryview(bits.tobytes()), notes)
    assert json.loads(reply.head + bytes(reply.body))["outputs"][0]["data"] == [0.10009765625] * H


@pytest.mark.parametrize(("model", "version"), [("tiny", None), ("tiny", "1"), (None, None)])
def test_the_served_model_is_found(model, version, decode_oip):
    assert decode_oip({"inputs": [ONES], "model_name": "tiny"}, model=model, version=version).layer == 3


@pytest.mark.parametrize(
    ("model", "version", "words"),
    [("big", None, ["'tiny'", "'big'"]), ("tiny", "2", ["version", "'1'", "'2'"]), ("tiny", "", ["version"])],
)
def test_another_model_or_version_is_not_found(model, version, words, limits, decode_oip, refused):
    def ask():
        decode_oip({"inputs": [ONES]}, model=model, version=version)

    refused(ErrorCode.MODEL_NOT_FOUND, words, ask)
    refused(ErrorCode.MODEL_NOT_FOUND, words, encoding.check_model, model, version, limits.spec)


def test_metadata_names_extensions_and_tensors(limits):
    optional = {"parameters": {"optional": True}}
    assert encoding.server_metadata("0.1.0") == {
        "name": "moe-forward",
        "version": "0.1.0",
        "extensions": ["binary_tensor_data", "moe_forward"],
    }
    assert encoding.model_metadata(limits.spec) == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "moe_forward",
        "inputs": [
            {"name": "hidden_states", "datatype": "BF16", "shape": [-1, 256]},
            {"name": "hidden_scales", "datatype": "FP32", "shape": [-1, -1], **optional},
            {"name": "topk_ids", "datatype": "INT64", "shape": [-1, 2], **optional},
            {"name": "topk_weights", "datatype": "FP32", "shape": [-1, 2], **optional},
            {"name": "router_logits", "datatype": "FP32", "shape": [-1, 8], **optional},
        ],
        "outputs": [{"name": "output", "datatype": "BF16", "shape": [-1, 256]}],
    }


def test_encoding_a_call_of_another_encoding_is_a_mistake_of_the_caller(decode_oip, notes):
    call = decode_oip({"inputs": [ONES]})._replace(reply=None)
    with pytest.raises(TypeError, match=r"oip\.decode"):
        encoding.encode(call, memoryview(bytes(4 * H)), notes)
