"""Inference requests that must be refused, each by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moe_forward.errors import ErrorCode
from moe_forward.wire import oip as encoding

from .oip_messages import DATA, ONES, H, as_json, hidden

REGION = {"shared_memory_region": "r", "shared_memory_byte_size": 512}
BAD, EXTRA, PARAMETER = ErrorCode.MALFORMED_BODY, ErrorCode.UNEXPECTED_TENSOR, ErrorCode.INVALID_PARAMETER
REFUSALS = {
    "empty": (b"", None, BAD, ["inference request", "expected JSON"]),
    "no JSON": (b"\x00\x01", None, BAD, ["inference request"]),
    "deep": (b'{"inputs":' + b"[" * 200_000 + b"]" * 200_000 + b"}", None, BAD, ["nested too deeply"]),
    "key twice": (b'{"inputs": [], "inputs": []}', None, BAD, ["'inputs' 2 times"]),
    "unknown key": ({"inputs": [ONES], "input": []}, None, BAD, ["'input'"]),
    "id a number": ({"inputs": [ONES], "id": 7}, None, BAD, ["id", "string", "7"]),
    "no inputs": ({}, None, BAD, ["inputs", "list", "None"]),
    "inputs an object": ({"inputs": ONES}, None, BAD, ["inputs", "list"]),
    "inputs empty": ({"inputs": []}, None, ErrorCode.MISSING_TENSOR, ["hidden_states"]),
    "input a string": ({"inputs": ["hidden_states"]}, None, BAD, ["inputs", "with a name"]),
    "input without name": ({"inputs": [{"shape": []}]}, None, BAD, ["inputs", "with a name"]),
    "unknown field": ({"inputs": [ONES | {"dtype": 1}]}, None, BAD, ["inputs", "'dtype'"]),
    "no shape": ({"inputs": [{"name": "hidden_states", "datatype": "FP32"}]}, None, BAD, ["hidden_states", "shape"]),
    "unknown input": ({"inputs": [as_json("INPUT0", [1], "FP32", [1])]}, None, EXTRA, ["'INPUT0'", "hidden_states"]),
    "input twice": ({"inputs": [ONES, ONES]}, None, EXTRA, ["hidden_states", "twice"]),
    "unknown datatype": (
        {"inputs": [hidden(datatype="FP8_E4M3")]},
        DATA,
        ErrorCode.WRONG_DTYPE,
        ["hidden_states", "BF16, FP16, FP32", "'FP8_E4M3'"],
    ),
    "datatype a list": ({"inputs": [hidden(datatype=["BF16"])]}, DATA, ErrorCode.WRONG_DTYPE, ["hidden_states"]),
    "uint8 alone": ({"inputs": [hidden(H, datatype="UINT8")]}, DATA[:H], ErrorCode.WRONG_DTYPE, ["moe_dtype=FP8_E4M3"]),
    "moe_dtype of bf16": ({"inputs": [hidden(moe_dtype="FP8_E4M3")]}, DATA, ErrorCode.WRONG_DTYPE, ["UINT8", "BF16"]),
    "other moe_dtype": (
        {"inputs": [hidden(H, datatype="UINT8", moe_dtype="FP8_E5M2")]},
        DATA[:H],
        ErrorCode.WRONG_DTYPE,
        ["'FP8_E5M2'"],
    ),
    "bf16 in JSON": (
        {"inputs": [as_json("hidden_states", [1, H], "BF16", [1.0] * H)]},
        None,
        ErrorCode.WRONG_DTYPE,
        ["hidden_states", "BF16 as binary data"],
    ),
    "fp16 in JSON": (
        {"inputs": [as_json("hidden_states", [1, H], "FP16", [1.0] * H)]},
        None,
        ErrorCode.WRONG_DTYPE,
        ["FP16 as binary data"],
    ),
    "float ids in JSON": (
        {"inputs": [ONES, as_json("topk_ids", [1, 2], "INT64", [1.0, 2])]},
        None,
        ErrorCode.WRONG_DTYPE,
        ["topk_ids element 0", "1.0"],
    ),
    "data of another size": (
        {"inputs": [as_json("hidden_states", [1, H], "FP32", [1.0] * (H - 1))]},
        None,
        ErrorCode.WRONG_SHAPE,
        ["hidden_states", "[1, 256]", "[255]"],
    ),
    "data of another nesting": (
        {"inputs": [as_json("hidden_states", [1, H], "FP32", [[1.0]] * H)]},
        None,
        ErrorCode.WRONG_SHAPE,
        ["[1, 256]", "[256, 1]"],
    ),
    "NaN in data": (
        {"inputs": [as_json("hidden_states", [1, 1], "FP32", [float("nan")])]},
        None,
        ErrorCode.NON_FINITE,
        ["hidden_states element 0"],
    ),
    "shape negative": ({"inputs": [hidden(shape=(-1, H))]}, DATA, BAD, ["hidden_states", "-1"]),
    "shape overflows": ({"inputs": [hidden(shape=(2**32, 2**32))]}, DATA, BAD, ["hidden_states", str(2**65)]),
    "data and binary": ({"inputs": [hidden() | {"data": [1]}]}, DATA, BAD, ["either data or", "binary_data_size"]),
    "neither": ({"inputs": [{"name": "hidden_states", "shape": [1], "datatype": "FP32"}]}, None, BAD, ["neither"]),
    "size differs": ({"inputs": [hidden(511)]}, DATA, BAD, ["binary_data_size 512", "BF16 [1, 256]", "511"]),
    "size a string": ({"inputs": [hidden("512")]}, DATA, BAD, ["binary_data_size 512", "'512'"]),
    "size a float": ({"inputs": [hidden(512.0)]}, DATA, BAD, ["binary_data_size 512", "512.0"]),
    "size true": ({"inputs": [hidden(True, shape=(1,), datatype="UINT8", moe_dtype="FP8_E4M3")]}, b"x", BAD, ["True"]),
    "body short": ({"inputs": [hidden()]}, DATA[:-1], BAD, ["hidden_states", "512 bytes", "511 left"]),
    "body long": ({"inputs": [hidden()]}, DATA + b"x", BAD, ["body", "512 bytes", "got 513"]),
    "binary without header": ({"inputs": [hidden()]}, None, BAD, ["hidden_states", "512 bytes", "0 left"]),
    "input in shared memory": ({"inputs": [ONES | {"parameters": REGION}]}, None, PARAMETER, ["shared_memory_region"]),
    "unknown tensor parameter": (
        {"inputs": [ONES | {"parameters": {"content_type": "np"}}]},
        None,
        PARAMETER,
        ["hidden_states parameters", "'content_type'"],
    ),
    "tensor parameters a list": ({"inputs": [ONES | {"parameters": [1]}]}, None, BAD, ["parameters", "object"]),
    "unknown request parameter": (
        {"inputs": [ONES], "parameters": {"layer": 3, "timeout": 5}},
        None,
        PARAMETER,
        ["'timeout'", "timeout_ms"],
    ),
    "parameters a list": ({"inputs": [ONES], "parameters": []}, None, BAD, ["parameters", "object"]),
    "layer a string": ({"inputs": [ONES], "parameters": {"layer": "3"}}, None, PARAMETER, ["layer", "'3'"]),
    "no layer": ({"inputs": [ONES], "parameters": {}}, None, PARAMETER, ["layer"]),
    "binary_data_output 1": (
        {"inputs": [ONES], "parameters": {"layer": 3, "binary_data_output": 1}},
        None,
        PARAMETER,
        ["binary_data_output", "true or false"],
    ),
    "binary_data a string": (
        {"inputs": [ONES], "outputs": [{"name": "output", "parameters": {"binary_data": "true"}}]},
        None,
        PARAMETER,
        ["binary_data", "'true'"],
    ),
    "outputs a string": ({"inputs": [ONES], "outputs": "output"}, None, BAD, ["outputs", "list"]),
    "unknown output": ({"inputs": [ONES], "outputs": [{"name": "logits"}]}, None, EXTRA, ["'output'", "'logits'"]),
    "output twice": ({"inputs": [ONES], "outputs": [{"name": "output"}] * 2}, None, EXTRA, ["once", "2 times"]),
    "classification": (
        {"inputs": [ONES], "outputs": [{"name": "output", "parameters": {"classification": 3}}]},
        None,
        PARAMETER,
        ["'classification'"],
    ),
    "output in shared memory": (
        {"inputs": [ONES], "outputs": [{"name": "output", "parameters": REGION}]},
        None,
        PARAMETER,
        ["shared_memory_region", "not supported"],
    ),
    "other model_name": ({"inputs": [ONES], "model_name": "big"}, None, ErrorCode.MODEL_NOT_FOUND, ["'tiny'", "'big'"]),
    "too many tokens": (
        {"inputs": [hidden(2 * H * 17, (17, H))]},
        bytes(2 * H * 17),
        ErrorCode.TOO_LARGE,
        ["at most 16 tokens", "17"],
    ),
    "zero tokens": ({"inputs": [hidden(0, (0, H))]}, b"", ErrorCode.WRONG_SHAPE, ["at least one token"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_requests_are_refused_by_name(case, decode_oip, refused):
    message, data, code, words = REFUSALS[case]
    refused(code, words, decode_oip, message, data)


@pytest.mark.parametrize("length", ["", "-1", "1e2", "100000", "9" * 5000, "\u0663", "0x10", "12, 12"])
def test_a_header_length_that_is_no_length_inside_the_body_is_malformed(length, decode_oip, refused):
    headers = {encoding.HEADER_LENGTH: length}
    refused(BAD, [encoding.HEADER_LENGTH, "expected bytes in [0, "], decode_oip, {"inputs": [hidden()]}, DATA, headers)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_header_length_beside_the_end_of_the_json_is_malformed(shift, make_request, limits, refused):
    text = json.dumps({"inputs": [hidden()]}).encode()
    headers = {encoding.HEADER_LENGTH: str(len(text) + shift)}
    request = make_request(text + b"\xff" + DATA[1:], (("layer", "3"),), headers, "tiny")
    refused(BAD, ["inference request"], encoding.decode, request, limits)


def test_more_json_than_the_cap_before_binary_tensors_is_too_large(decode_oip, refused):
    text = json.dumps({"inputs": [hidden()]}).encode() + b" " * (1 << 20)
    refused(ErrorCode.TOO_LARGE, [encoding.HEADER_LENGTH, "at most 1048576"], decode_oip, text, DATA)


def test_more_numbers_than_a_front_end_has_time_to_write_are_too_large_unless_the_output_is_binary(
    make_request, limits, refused
):
    few = replace(limits, max_json_values=2 * H)

    def decode(tokens, **parameters):
        message = {"inputs": [hidden(tokens * 2 * H, (tokens, H))], "parameters": {"layer": 3, **parameters}}
        text = json.dumps(message).encode()
        headers = {encoding.HEADER_LENGTH: str(len(text))}
        return encoding.decode(make_request(bytearray(text + tokens * DATA), (), headers, "tiny"), few)

    refused(ErrorCode.TOO_LARGE, ["JSON reply", "at most 512", "got 768", "binary_data_output"], decode, 3)
    assert decode(2).tokens == 2
    assert decode(3, binary_data_output=True).tokens == 3
