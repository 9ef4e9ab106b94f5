"""Whatever bytes come, a body is decoded or refused with a sentence: no other exception, and no unsound view."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_forward.errors import ForwardError
from moe_forward.wire import WireRequest, oip, plain_json, safetensors

H = 256
ARRAYS = {
    "hidden_states": np.ones((1, H), "<f2"),
    "topk_ids": np.array([[1, 2]], "<i4"),
    "topk_weights": np.ones((1, 2), "<f4"),
}
NAMES = {"<f2": ("F16", "FP16"), "<i4": ("I32", "INT32"), "<f4": ("F32", "FP32")}
BINARY = b"".join(array.tobytes() for array in ARRAYS.values())


def safetensors_header():
    header, begin = {"__metadata__": {"layer": "3"}}, 0
    for name, array in ARRAYS.items():
        end = begin + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.str][0], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    return header


def oip_message():
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": NAMES[array.dtype.str][1],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in ARRAYS.items()
    ]
    return {"id": "1", "inputs": inputs, "outputs": [{"name": "output"}], "parameters": {"layer": 3}}


def json_message():
    return {"layer": 3} | {name: array.tolist() for name, array in ARRAYS.items()}


def body_of(encoding, message):
    """Bytes of a body whose JSON part is `message`, and the headers that go with it."""
    text = json.dumps(message).encode()
    if encoding is safetensors:
        return len(text).to_bytes(8, "little") + text + BINARY, {}
    if encoding is oip:
        return text + BINARY, {oip.HEADER_LENGTH: str(len(text))}
    return text, {}


VALID = {safetensors: safetensors_header(), oip: oip_message(), plain_json: json_message()}
ENCODINGS = pytest.mark.parametrize("encoding", list(VALID), ids=lambda encoding: encoding.name)


def attempt(encoding, body, headers, limits):
    """Decode; False when it was refused with a sentence. A call that comes out must be sound."""
    try:
        call = encoding.decode(WireRequest(headers, (), memoryview(body)), limits)
    except ForwardError as error:
        return not error.message.encode()
    for tensor in (call.hidden, call.hidden_scales, call.chosen, call.weights):
        if tensor is not None:
            assert tensor.data.nbytes == np.prod(tensor.shape) * tensor.dtype.itemsize
            if tensor.offset is not None:
                assert bytes(tensor.data) == body[tensor.offset : tensor.offset + tensor.data.nbytes]
    assert 1 <= call.tokens <= limits.max_request_tokens
    assert call.hidden.shape == (call.tokens, limits.spec.hidden_size)
    assert call.layer in limits.spec.layers
    return True


@ENCODINGS
def test_the_body_that_gets_mutated_is_valid(encoding, limits):
    assert attempt(encoding, *body_of(encoding, VALID[encoding]), limits)


@ENCODINGS
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(body=st.binary(max_size=200), length=st.integers(-5, 250))
def test_arbitrary_bytes_are_decoded_or_refused(encoding, limits, body, length):
    attempt(encoding, body, {oip.HEADER_LENGTH: str(length)}, limits)
    attempt(encoding, len(body).to_bytes(8, "little") + body, {}, limits)


@ENCODINGS
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_valid_body_with_bytes_changed_cut_or_added_is_decoded_or_refused(encoding, limits, data):
    body, headers = body_of(encoding, VALID[encoding])
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(0, len(changed) - 1)))
        piece = data.draw(st.binary(max_size=3))
        changed[position : position + data.draw(st.integers(0, 3))] = piece
    attempt(encoding, bytes(changed), headers, limits)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2, 3, 256, 512, 2**31, 2**63, 2**64, 10**60]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["output", "F32", "FP32", "UINT8", "I64", "hidden_scales", "router_logits", "\ud800"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def spots(value, path=()):
    """Paths of everything inside a JSON value, long lists by their first items."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from spots(inner, (*path, key))


def replaced(value, path, new):
    """A copy of a JSON value with the part at `path` replaced."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@ENCODINGS
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_valid_body_with_any_field_replaced_is_decoded_or_refused(encoding, limits, data):
    message = VALID[encoding]
    path = data.draw(st.sampled_from(list(spots(message))))
    body, headers = body_of(encoding, replaced(message, path, data.draw(VALUES)))
    attempt(encoding, body, headers, limits)


@ENCODINGS
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_valid_body_with_any_field_missing_or_added_is_decoded_or_refused(encoding, limits, data):
    message = json.loads(json.dumps(VALID[encoding]))
    objects = [message]
    for item in objects:
        objects += [
            inner for inner in (item.values() if isinstance(item, dict) else item) if isinstance(inner, dict | list)
        ]
    target = data.draw(st.sampled_from([item for item in objects if isinstance(item, dict)]))
    key = data.draw(st.sampled_from(list(target)) | st.text(max_size=8))
    if data.draw(st.booleans()):
        target.pop(key, None)
    else:
        target[key] = data.draw(VALUES)
    attempt(encoding, *body_of(encoding, message), limits)
