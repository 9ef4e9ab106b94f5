from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from moe_forward.errors import ErrorCode
from moe_forward.types import DType, Routing
from moe_forward.wire import WireTensor
from moe_forward.wire.checks import check_uncompressed, forward_call
from moe_forward.wire.parameters import Given

LAYER = (Given("layer", 3, "the body", typed=True),)
H, E, K = 256, 8, 2
NUMPY = {
    DType.BF16: ml_dtypes.bfloat16,
    DType.F16: np.float16,
    DType.F32: np.float32,
    DType.F8_E4M3: ml_dtypes.float8_e4m3fn,
    DType.I32: np.int32,
    DType.I64: np.int64,
}


def tensor(name, shape, dtype=DType.BF16, values=None):
    array = np.zeros(shape, NUMPY[dtype]) if values is None else np.array(values, NUMPY[dtype])
    return WireTensor(name, dtype, array.shape, memoryview(array.tobytes()), 64)


def hidden(tokens=2, dtype=DType.BF16):
    return tensor("hidden_states", (tokens, H), dtype)


def ids(values=((0, 1), (6, 7)), dtype=DType.I64):
    return tensor("topk_ids", None, dtype, values)


def weights(values=((0.5, 0.5), (1.0, -2.0)), dtype=DType.F32):
    return tensor("topk_weights", None, dtype, values)


@pytest.fixture
def call(limits):
    def run(*tensors):
        return forward_call({item.name: item for item in tensors}, LAYER, limits, "notes")

    return run


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
def test_hidden_states_alone_are_routed_by_the_server_and_answered_in_their_type(dtype, call):
    given = hidden(5, dtype)
    made = call(given)
    assert made.hidden is given
    assert (made.layer, made.tokens, made.output_dtype, made.reply) == (3, 5, dtype, "notes")
    assert (made.shared_experts, made.timeout_seconds) == (True, None)
    assert (made.routing, made.chosen, made.weights, made.hidden_scales) == (Routing.SERVER, None, None, None)


@pytest.mark.parametrize(("shape", "columns"), [((2,), 1), ((2, 1), 1), ((2, 2), 2)])
def test_fp8_hidden_states_need_scales_per_token_or_group_and_are_answered_in_bf16(shape, columns, call):
    made = call(hidden(2, DType.F8_E4M3), tensor("hidden_scales", shape, DType.F32))
    assert made.output_dtype is DType.BF16
    assert made.hidden_scales.shape == (2, columns)
    assert made.hidden_scales.offset == 64


@pytest.mark.parametrize("dtype", [DType.I32, DType.I64])
def test_ids_and_weights_mean_the_client_has_routed(dtype, call):
    made = call(hidden(), ids(dtype=dtype), weights())
    assert (made.routing, made.chosen.name, made.weights.name) == (Routing.TOPK, "topk_ids", "topk_weights")


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_router_logits_mean_the_gate_chooses(dtype, call):
    made = call(hidden(), tensor("router_logits", (2, E), dtype))
    assert (made.routing, made.chosen.name, made.weights) == (Routing.LOGITS, "router_logits", None)


def test_nan_in_hidden_states_and_logits_is_left_to_the_ranks(call):
    nan = float("nan")
    made = call(
        tensor("hidden_states", None, DType.F32, [[nan] * H]), tensor("router_logits", None, DType.F32, [[nan] * E])
    )
    assert made.tokens == 1


def test_the_most_tokens_of_a_request_are_accepted(call):
    assert call(hidden(16)).tokens == 16


F8 = hidden(2, DType.F8_E4M3)
REFUSALS = {
    "unknown tensor": ([hidden(), tensor("bias", (1,))], ErrorCode.UNEXPECTED_TENSOR, ["'bias'", "hidden_states"]),
    "nothing": ([], ErrorCode.MISSING_TENSOR, ["hidden_states", "no tensors"]),
    "no hidden states": ([ids(), weights()], ErrorCode.MISSING_TENSOR, ["hidden_states", "topk_ids"]),
    "ids alone": ([hidden(), ids()], ErrorCode.MISSING_TENSOR, ["topk_weights: expected", "beside topk_ids"]),
    "weights alone": ([hidden(), weights()], ErrorCode.MISSING_TENSOR, ["topk_ids: expected", "beside topk_weights"]),
    "both routings": (
        [hidden(), ids(), weights(), tensor("router_logits", (2, E), DType.F32)],
        ErrorCode.UNEXPECTED_TENSOR,
        ["either router_logits or topk_ids", "both"],
    ),
    "integer hidden states": (
        [hidden(2, DType.I32)],
        ErrorCode.WRONG_DTYPE,
        ["hidden_states", "BF16 or F16", "got I32"],
    ),
    "zero tokens": ([hidden(0)], ErrorCode.WRONG_SHAPE, ["hidden_states", "at least one token", "[0, 256]"]),
    "empty list": ([tensor("hidden_states", (0,))], ErrorCode.WRONG_SHAPE, ["at least one token", "[0]"]),
    "scalar": ([tensor("hidden_states", ())], ErrorCode.WRONG_SHAPE, ["[tokens, 256]", "got []"]),
    "one dimension": ([tensor("hidden_states", (H,))], ErrorCode.WRONG_SHAPE, ["[tokens, 256]", "got [256]"]),
    "three dimensions": ([tensor("hidden_states", (1, 1, H))], ErrorCode.WRONG_SHAPE, ["got [1, 1, 256]"]),
    "wrong width": ([tensor("hidden_states", (2, H - 1))], ErrorCode.WRONG_SHAPE, ["[tokens, 256]", "got [2, 255]"]),
    "too many tokens": ([hidden(17)], ErrorCode.TOO_LARGE, ["hidden_states", "at most 16 tokens", "got 17"]),
    "fp8 without scales": ([F8], ErrorCode.MISSING_TENSOR, ["hidden_scales", "F8_E4M3", "got none"]),
    "scales without fp8": (
        [hidden(), tensor("hidden_scales", (2, 1), DType.F32)],
        ErrorCode.UNEXPECTED_TENSOR,
        ["hidden_scales", "beside BF16"],
    ),
    "scales of bf16": ([F8, tensor("hidden_scales", (2, 1))], ErrorCode.WRONG_DTYPE, ["hidden_scales", "F32", "BF16"]),
    "scales of another T": (
        [F8, tensor("hidden_scales", (3, 1), DType.F32)],
        ErrorCode.WRONG_SHAPE,
        ["hidden_scales", "[2] or [2, 1] or [2, 2]", "got [3, 1]"],
    ),
    "scales of other groups": ([F8, tensor("hidden_scales", (2, 4), DType.F32)], ErrorCode.WRONG_SHAPE, ["got [2, 4]"]),
    "logits of f16": (
        [hidden(), tensor("router_logits", (2, E), DType.F16)],
        ErrorCode.WRONG_DTYPE,
        ["router_logits", "F32 or BF16", "F16"],
    ),
    "logits of another E": (
        [hidden(), tensor("router_logits", (2, E + 1), DType.F32)],
        ErrorCode.WRONG_SHAPE,
        ["router_logits", "[2, 8] ([tokens, experts])", "[2, 9]"],
    ),
    "logits of another T": ([hidden(), tensor("router_logits", (1, E), DType.F32)], ErrorCode.WRONG_SHAPE, ["[1, 8]"]),
    "float ids": (
        [hidden(), tensor("topk_ids", (2, K), DType.F32), weights()],
        ErrorCode.WRONG_DTYPE,
        ["topk_ids", "I32 or I64", "got F32"],
    ),
    "bf16 weights": (
        [hidden(), ids(), weights(dtype=DType.BF16)],
        ErrorCode.WRONG_DTYPE,
        ["topk_weights", "F32", "BF16"],
    ),
    "ids of another K": (
        [hidden(), ids([[0, 1, 2]] * 2), weights()],
        ErrorCode.WRONG_SHAPE,
        ["topk_ids", "[2, 2] ([tokens, top_k])", "[2, 3]"],
    ),
    "flat ids": ([hidden(), ids([0, 1, 2, 3]), weights()], ErrorCode.WRONG_SHAPE, ["topk_ids", "got [4]"]),
    "ids of another T": ([hidden(), ids([[0, 1]]), weights()], ErrorCode.WRONG_SHAPE, ["topk_ids", "got [1, 2]"]),
    "weights of another T": ([hidden(), ids(), weights([[1, 1]])], ErrorCode.WRONG_SHAPE, ["topk_weights", "[1, 2]"]),
    "negative id": (
        [hidden(), ids([[0, 1], [-1, 2]]), weights()],
        ErrorCode.OUT_OF_RANGE,
        ["row 1", "[0, 8)", "got -1"],
    ),
    "id of no expert": ([hidden(), ids([[0, 8], [1, 2]]), weights()], ErrorCode.OUT_OF_RANGE, ["row 0", "got 8"]),
    "enormous id": ([hidden(), ids([[0, 2**63 - 1], [1, 2]]), weights()], ErrorCode.OUT_OF_RANGE, [str(2**63 - 1)]),
    "least id": (
        [hidden(), ids([[0, -(2**31)], [1, 2]], DType.I32), weights()],
        ErrorCode.OUT_OF_RANGE,
        [str(-(2**31))],
    ),
    "id twice": ([hidden(), ids([[0, 1], [5, 5]]), weights()], ErrorCode.OUT_OF_RANGE, ["row 1", "got 5 twice"]),
    "NaN weight": (
        [hidden(), ids(), weights([[1, 1], [0, float("nan")]])],
        ErrorCode.NON_FINITE,
        ["topk_weights row 1 column 1", "nan"],
    ),
    "infinite weight": (
        [hidden(), ids(), weights([[float("-inf"), 1], [0, 1]])],
        ErrorCode.NON_FINITE,
        ["topk_weights row 0 column 0", "-inf"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_tensors_that_do_not_fit_the_model_are_refused_by_name(case, call, refused):
    tensors, code, words = REFUSALS[case]
    refused(code, words, call, *tensors)


def test_the_same_id_in_two_rows_is_fine(call):
    assert call(hidden(), ids([[0, 1], [1, 0]]), weights()).routing is Routing.TOPK


def test_an_id_twice_is_found_when_others_stand_between(limits, refused):
    three = dataclasses.replace(limits, spec=dataclasses.replace(limits.spec, top_k=3))
    tensors = {"hidden_states": hidden(1), "topk_ids": ids([[4, 0, 4]]), "topk_weights": weights([[1, 1, 1]])}
    refused(ErrorCode.OUT_OF_RANGE, ["topk_ids row 0", "got 4 twice"], forward_call, tensors, LAYER, three, None)


def test_a_model_whose_width_is_no_multiple_of_the_group_takes_scales_per_token_only(limits, refused):
    narrow = dataclasses.replace(limits, spec=dataclasses.replace(limits.spec, hidden_size=200))
    states = tensor("hidden_states", (2, 200), DType.F8_E4M3)
    scales = tensor("hidden_scales", (2, 2), DType.F32)
    refused(
        ErrorCode.WRONG_SHAPE,
        ["expected shape [2] or [2, 1], got [2, 2]"],
        forward_call,
        {"hidden_states": states, "hidden_scales": scales},
        LAYER,
        narrow,
        None,
    )


def test_a_compressed_body_is_refused_by_its_coding(make_request, refused):
    request = make_request(b"", headers={"content-encoding": "gzip"})
    refused(ErrorCode.UNSUPPORTED_MEDIA_TYPE, ["content-encoding", "'gzip'"], check_uncompressed, request)
    check_uncompressed(make_request(b"", headers={"content-encoding": "identity"}))
