from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from moe_forward.errors import ErrorCode
from moe_forward.types import DType, Routing
from moe_forward.wire import safetensors as encoding

H = 256


def container(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="BF16"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HIDDEN = entry([1, H], 0, 2 * H)
DATA = bytes(2 * H)


@pytest.fixture
def decode(make_request, limits):
    return lambda body, *args, **kwargs: encoding.decode(make_request(body, *args, **kwargs), limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_body_that_the_public_library_wrote_is_decoded_bit_for_bit(dtype, decode):
    torch.manual_seed(0)
    hidden = torch.randn(3, H).to(dtype)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    body = safetensors.torch.save({"hidden_states": hidden, "topk_ids": ids, "topk_weights": weights})
    call = decode(body)
    assert call.routing is Routing.TOPK
    for tensor, expected in ((call.hidden, hidden), (call.chosen, ids), (call.weights, weights)):
        assert tensor.shape == tuple(expected.shape)
        assert bytes(tensor.data) == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert call.output_dtype.name == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[str(dtype)[6:]]


def test_fp8_with_scales_of_the_public_library_is_decoded(decode):
    hidden = torch.randn(2, H).to(torch.float8_e4m3fn)
    call = decode(safetensors.torch.save({"hidden_states": hidden, "hidden_scales": torch.ones(2)}))
    assert (call.hidden.dtype, call.output_dtype) == (DType.F8_E4M3, DType.BF16)
    assert bytes(call.hidden.data) == hidden.view(torch.uint8).numpy().tobytes()
    assert call.hidden_scales.shape == (2, 1)


def test_parameters_in_the_metadata_are_read_and_other_metadata_is_free_text(decode):
    hidden = {"hidden_states": torch.zeros(1, H)}
    metadata = {"format": "pt", "layer": "7", "shared_experts": "false", "timeout_ms": "250"}
    call = decode(safetensors.torch.save(hidden, metadata), query=())
    assert (call.layer, call.shared_experts, call.timeout_seconds) == (7, False, 0.25)


def test_metadata_that_contradicts_the_query_is_refused(decode, refused):
    body = safetensors.torch.save({"hidden_states": torch.zeros(1, H)}, {"layer": "7"})
    refused(ErrorCode.INVALID_PARAMETER, ["layer", "3 in the query", "7 in the body"], decode, body)


@pytest.mark.parametrize("padding", range(9))
def test_tensors_are_views_of_the_body_at_any_header_length(padding, decode):
    logits = entry([1, 8], 2 * H, 2 * H + 32, "F32")
    text = json.dumps({"hidden_states": HIDDEN, "router_logits": logits}).encode() + b" " * padding
    body = bytearray(container(text, bytes(range(256)) * 2 + np.arange(8, dtype="<f4").tobytes()))
    call = decode(body)
    start = 8 + len(text)
    assert (call.hidden.offset, call.chosen.offset) == (start, start + 2 * H)
    body[start] = 0xAB
    body[start + 2 * H + 31] = 0xCD
    assert call.hidden.data[0] == 0xAB
    assert call.chosen.data[31] == 0xCD


def test_ids_at_an_odd_address_are_checked_like_any_other(decode, refused):
    def body(ids):
        header = {
            "hidden_states": HIDDEN,
            "topk_ids": entry([1, 2], 2 * H, 2 * H + 16, "I64"),
            "topk_weights": entry([1, 2], 2 * H + 16, 2 * H + 24, "F32"),
        }
        text = json.dumps(header).encode()
        text += b" " * (1 - len(text) % 2)
        return container(text, DATA + np.array(ids, "<i8").tobytes() + np.ones(2, "<f4").tobytes())

    assert decode(body([1, 7])).chosen.offset % 2 == 1
    refused(ErrorCode.OUT_OF_RANGE, ["topk_ids row 0", "got 9"], decode, body([1, 9]))


def test_tensors_may_lie_in_any_order(decode):
    header = {"hidden_states": entry([1, H], 32, 32 + 2 * H), "router_logits": entry([1, 8], 0, 32, "F32")}
    call = decode(container(header, bytes(32) + DATA))
    assert call.hidden.offset == call.chosen.offset + 32


OTHER = entry([1, 8], 2 * H, 2 * H + 32, "F32")
MALFORMED = {
    "empty body": (b"", ["at least 8 bytes", "got 0"]),
    "short body": (b"\x01\x00\x00", ["at least 8 bytes", "got 3"]),
    "header beyond the body": (container({"hidden_states": HIDDEN}, length=10_000), ["length 10000", "bytes left"]),
    "header length of 2**64-1": (b"\xff" * 8 + b"{}", [str(2**64 - 1), "2 bytes left"]),
    "header above the cap": (container(b"{" + b" " * 200_000 + b"}"), ["at most 131072", "200002"]),
    "header cut": (container({"hidden_states": HIDDEN}, length=20) + DATA, ["safetensors header", "expected JSON"]),
    "no JSON": (container(b"\x00\x01"), ["safetensors header"]),
    "a list": (container(b"[]"), ["expected a JSON object"]),
    "deep": (container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", length=130_000), ["safetensors header"]),
    "key twice": (container(b'{"a": 1, "a": 2}'), ["'a' 2 times"]),
    "metadata of numbers": (container({"__metadata__": {"layer": 3}}), ["__metadata__", "strings"]),
    "metadata list": (container({"__metadata__": []}), ["__metadata__", "strings"]),
    "entry a list": (container({"hidden_states": []}), ["hidden_states", "dtype, shape and data_offsets"]),
    "entry incomplete": (container({"hidden_states": {"dtype": "F32"}}), ["hidden_states", "data_offsets"]),
    "entry with more": (container({"hidden_states": {**HIDDEN, "order": "F"}}, DATA), ["data_offsets", "'order'"]),
    "shape a string": (container({"hidden_states": entry("1,256", 0, 512)}, DATA), ["hidden_states", "shape"]),
    "shape negative": (container({"hidden_states": entry([-1, -H], 0, 512)}, DATA), ["hidden_states", "-1"]),
    "shape of floats": (container({"hidden_states": entry([1.0, 256.0], 0, 512)}, DATA), ["hidden_states", "1.0"]),
    "shape of bools": (container({"hidden_states": entry([True, H], 0, 512)}, DATA), ["hidden_states", "True"]),
    "shape overflows": (
        container({"hidden_states": entry([2**32, 2**32, H], 0, 512)}, DATA),
        ["hidden_states", str(2**64 * H * 2), "got 512"],
    ),
    "shape enormous": (container({"hidden_states": entry([2**63], 0, 512)}, DATA), ["hidden_states", "2**40"]),
    "size differs": (container({"hidden_states": entry([1, H - 1], 0, 512)}, DATA), ["510 bytes", "got 512"]),
    "offsets reversed": (container({"hidden_states": entry([1, H], 512, 0)}, DATA), ["data_offsets ascending"]),
    "offsets negative": (container({"hidden_states": entry([1, H], -512, 0)}, DATA), ["data_offsets ascending"]),
    "offsets beyond": (container({"hidden_states": HIDDEN}, DATA[:-1]), ["[0, 511]", "512"]),
    "offsets of floats": (container({"hidden_states": entry([1, H], 0, 512.0)}, DATA), ["two integers", "512.0"]),
    "offsets of bools": (container({"hidden_states": entry([], False, 2)}, DATA), ["two integers", "False"]),
    "offsets of three": (
        container({"hidden_states": {**HIDDEN, "data_offsets": [0, 1, 2]}}, DATA),
        ["two integers", "[0, 1, 2]"],
    ),
    "offsets enormous": (container({"hidden_states": entry([1, H], 0, 10**30)}, DATA), ["ascending"]),
    "bytes left over": (container({"hidden_states": HIDDEN}, DATA + b"x"), ["512 bytes of tensor data", "got 513"]),
    "hole in front": (
        container({"hidden_states": entry([1, H], 8, 520)}, bytes(8) + DATA),
        ["hidden_states", "start at 0, got 8", "hole"],
    ),
    "hole between": (
        container({"hidden_states": HIDDEN, "router_logits": entry([1, 8], 516, 548, "F32")}, DATA + bytes(36)),
        ["router_logits", "start at 512, got 516", "hole"],
    ),
    "overlap": (
        container({"hidden_states": HIDDEN, "router_logits": entry([1, 8], 480, 512, "F32")}, DATA),
        ["router_logits", "start at 512, got 480", "overlap"],
    ),
    "the same bytes twice": (
        container({"hidden_states": HIDDEN, "router_logits": entry([1, H], 0, 512)}, DATA),
        ["overlap"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_container_that_lies_is_malformed(case, decode, refused):
    body, words = MALFORMED[case]
    refused(ErrorCode.MALFORMED_BODY, words, decode, body)


@pytest.mark.parametrize("dtype", ["F64", "U8", "F8_E5M2", "BOOL", "bf16", "", None, 7, ["BF16"]])
def test_other_dtypes_are_refused_with_the_accepted_ones(dtype, decode, refused):
    body = container({"hidden_states": entry([1, H], 0, 512, dtype)}, DATA)
    refused(ErrorCode.WRONG_DTYPE, ["hidden_states", "BF16, F16, F32, F8_E4M3, I32, I64"], decode, body)


def test_zero_tokens_are_refused_though_the_container_is_sound(decode, refused):
    body = safetensors.torch.save({"hidden_states": torch.zeros(0, H)})
    refused(ErrorCode.WRONG_SHAPE, ["hidden_states", "at least one token"], decode, body)


def test_an_unknown_tensor_is_refused(decode, refused):
    body = safetensors.torch.save({"hidden_states": torch.zeros(1, H), "bias\ud7ff": torch.zeros(1)})
    refused(ErrorCode.UNEXPECTED_TENSOR, ["bias"], decode, body)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("request_id", ["", "r", "r-123", 'quo"te\u00e9'])
def test_a_reply_is_read_by_the_public_library_and_aligned(dtype, request_id, decode, notes):
    call = decode(safetensors.torch.save({"hidden_states": torch.zeros(3, H, dtype=dtype)}))
    output = torch.randn(3, H).to(dtype)
    data = memoryview(bytearray(output.view(torch.uint8).numpy().tobytes()))
    reply = encoding.encode(call, data, type(notes)(request_id, 3, 0.0, 0.0))
    assert reply.body is data  # sent in place
    assert len(reply.head) % 8 == 0
    loaded = safetensors.torch.load(reply.head + bytes(reply.body))
    assert list(loaded) == ["output"]
    assert loaded["output"].dtype == dtype
    assert torch.equal(loaded["output"], output)
    assert json.loads(reply.head[8:])["__metadata__"] == {"request_id": request_id}
    assert reply.content_type == "application/vnd.safetensors"


def test_the_reply_to_fp8_is_bf16(decode, notes):
    hidden = torch.ones(2, H).to(torch.float8_e4m3fn)
    call = decode(safetensors.torch.save({"hidden_states": hidden, "hidden_scales": torch.ones(2, 2)}))
    reply = encoding.encode(call, memoryview(torch.ones(2, H, dtype=torch.bfloat16).view(torch.uint8).numpy()), notes)
    assert safetensors.torch.load(reply.head + bytes(reply.body))["output"].dtype == torch.bfloat16


@pytest.mark.parametrize("nbytes", [0, 511, 513, 1024])
def test_an_output_of_the_wrong_size_is_a_mistake_of_the_caller(nbytes, decode, notes):
    call = decode(container({"hidden_states": HIDDEN}, DATA))
    with pytest.raises(ValueError, match="expected 512 bytes"):
        encoding.encode(call, memoryview(bytes(nbytes)), notes)


def test_nothing_but_the_call_holds_on_to_the_body(decode):
    body = bytearray(safetensors.torch.save({"hidden_states": torch.zeros(1, H)}))
    call = decode(body)
    hidden = call.hidden.data
    del call
    hidden.release()
    body.append(0)  # raises BufferError while anything still looks at it
