"""Arrays to a body and back, checked with the safetensors library."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from moe_forward.client.errors import TransportFailed
from moe_forward.client.tensors import OutputLike, decode_output, encode_forward

TORCH_FLOATS = [torch.bfloat16, torch.float16, torch.float32]
NUMPY_FLOATS = [np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


def encode(hidden: Any, **others: Any) -> tuple[bytes, OutputLike]:
    names = ("hidden_scales", "topk_ids", "topk_weights", "router_logits")
    return encode_forward(hidden, *(others.get(name) for name in names))


def read(body: bytes) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(body)


@pytest.mark.parametrize("dtype", TORCH_FLOATS, ids=str)
def test_torch_values_go_out_and_come_back_unchanged(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    body, like = encode(hidden)
    sent = read(body)["hidden_states"]
    assert sent.dtype is dtype
    assert torch.equal(sent, hidden)
    back = decode_output(safetensors.torch.save({"output": -hidden}), like)
    assert back.dtype is dtype
    assert back.device == hidden.device
    assert torch.equal(back, -hidden)


@pytest.mark.parametrize("dtype", NUMPY_FLOATS, ids=str)
def test_numpy_values_go_out_and_come_back_unchanged(dtype: np.dtype[Any]) -> None:
    hidden = np.linspace(-3, 3, 24).reshape(3, 8).astype(dtype)
    body, like = encode(hidden)
    sent = read(body)["hidden_states"]
    assert sent.shape == (3, 8)
    assert sent.view(torch.uint8).numpy().tobytes() == hidden.tobytes()
    back = decode_output(safetensors.torch.save({"output": sent}), like)
    assert back.dtype == dtype
    assert back.tobytes() == hidden.tobytes()


def test_what_comes_back_is_writable() -> None:
    body = safetensors.torch.save({"output": torch.zeros(1, 4)})
    array = decode_output(body, OutputLike((1, 4), "float32", None))
    tensor = decode_output(body, OutputLike((1, 4), "float32", torch.device("cpu")))
    array[0, 0] = tensor[0, 0] = 7.0
    assert (array[0, 0], tensor[0, 0].item()) == (7.0, 7.0)


@pytest.mark.parametrize("numpy_input", [False, True])
def test_fp8_goes_out_with_its_scales_and_comes_back_bfloat16(numpy_input: bool) -> None:
    values = torch.tensor([[1.0, -448.0, 0.5, 2.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.25]])
    hidden: Any = values
    if numpy_input:
        hidden, scales = values.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scales.numpy()  # type: ignore
    body, like = encode(hidden, hidden_scales=scales)
    sent = read(body)
    assert sent["hidden_states"].dtype is torch.float8_e4m3fn
    assert torch.equal(sent["hidden_states"].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(sent["hidden_scales"], torch.tensor([0.25]))
    back = decode_output(safetensors.torch.save({"output": torch.ones(1, 4, dtype=torch.bfloat16)}), like)
    assert back.dtype == (np.dtype(ml_dtypes.bfloat16) if numpy_input else torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "sent_as"), [((2, 3), [6]), ((2, 3, 1), [6]), ((2, 3, 2), [6, 2])], ids=["token", "column", "group"]
)
def test_scales_keep_their_granularity_when_batch_dimensions_are_flattened(
    shape: tuple[int, ...], sent_as: list[int]
) -> None:
    hidden = torch.zeros(2, 3, 256).to(torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    sent = read(encode(hidden, hidden_scales=scales)[0])["hidden_scales"]
    assert list(sent.shape) == sent_as
    assert torch.equal(sent.flatten(), scales.flatten())


def test_leading_dimensions_become_rows_and_come_back() -> None:
    hidden = torch.arange(24.0).reshape(2, 3, 4)
    ids = torch.arange(12, dtype=torch.int32).reshape(2, 3, 2)
    body, like = encode(hidden, topk_ids=ids, topk_weights=ids.float())
    sent = read(body)
    assert torch.equal(sent["hidden_states"], hidden.reshape(6, 4))
    assert torch.equal(sent["topk_ids"], ids.reshape(6, 2))
    assert torch.equal(sent["topk_weights"], ids.float().reshape(6, 2))
    back = decode_output(safetensors.torch.save({"output": hidden.reshape(6, 4)}), like)
    assert torch.equal(back, hidden)


def test_one_token_without_a_token_dimension_is_a_row_and_comes_back_so() -> None:
    hidden, logits = torch.arange(4.0), torch.arange(8.0).bfloat16()
    body, like = encode(hidden, router_logits=logits)
    assert read(body)["hidden_states"].shape == (1, 4)
    assert torch.equal(read(body)["router_logits"], logits.reshape(1, 8))
    assert torch.equal(decode_output(safetensors.torch.save({"output": hidden.reshape(1, 4)}), like), hidden)


def test_strided_big_endian_and_gradient_arrays_go_out_as_their_values() -> None:
    wide = np.arange(16, dtype=">f4").reshape(2, 8)
    assert read(encode(wide[:, ::2])[0])["hidden_states"].tolist() == wide[:, ::2].tolist()
    tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    assert read(encode(tensor)[0])["hidden_states"].tolist() == tensor.tolist()


def test_every_tensor_starts_on_a_multiple_of_its_element_size() -> None:
    hidden = torch.zeros(3, 3).to(torch.float8_e4m3fn)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    body, _ = encode(hidden, hidden_scales=torch.ones(3), topk_ids=ids, topk_weights=ids.float())
    start = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(body[8:start])
    sizes = {"I64": 8, "F32": 4, "F8_E4M3": 1}
    assert {(start + entry["data_offsets"][0]) % sizes[entry["dtype"]] for entry in header.values()} == {0}


FP8 = torch.zeros(2, 256).to(torch.float8_e4m3fn)
F32 = torch.zeros(2, 256)
IDS, WEIGHTS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("hidden", "others", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "hidden_states must be a torch tensor or a numpy array, got list"),
        (F32.double(), {}, TypeError, "hidden_states must be bfloat16 or .*, got float64"),
        (np.zeros((2, 4), ml_dtypes.float8_e5m2), {}, TypeError, "hidden_states must be .*, got float8_e5m2"),
        (
            torch.tensor(1.0),
            {},
            ValueError,
            r"hidden_states must be \[..., H\] with at least one token, got shape \[\]",
        ),
        (torch.zeros(0, 4), {}, ValueError, r"at least one token, got shape \[0, 4\]"),
        (FP8, {}, ValueError, "hidden_scales must come with float8_e4m3fn hidden_states"),
        (F32, {"hidden_scales": torch.ones(2)}, ValueError, "hidden_scales only go with float8_e4m3fn .* float32"),
        (FP8, {"hidden_scales": torch.ones(2).half()}, TypeError, "hidden_scales must be float32, got float16"),
        (
            FP8,
            {"hidden_scales": torch.ones(3)},
            ValueError,
            r"hidden_scales must be \[2\], \[2, 1\] or \[2, 2\].*\[3\]",
        ),
        (F32, {"topk_ids": IDS}, ValueError, "topk_ids and topk_weights go together, got no topk_weights"),
        (F32, {"topk_weights": WEIGHTS}, ValueError, "topk_ids and topk_weights go together, got no topk_ids"),
        (F32, {"topk_ids": IDS.short(), "topk_weights": WEIGHTS}, TypeError, "topk_ids must be int32 or int64.*int16"),
        (
            F32,
            {"topk_ids": IDS, "topk_weights": WEIGHTS.half()},
            TypeError,
            "topk_weights must be float32, got float16",
        ),
        (F32, {"topk_ids": IDS[:1], "topk_weights": WEIGHTS}, ValueError, r"topk_ids must be \[2, K\].*shape \[1, 3\]"),
        (F32, {"topk_ids": IDS, "topk_weights": WEIGHTS[:, :2]}, ValueError, "topk_weights must have the 3 columns.*2"),
        (F32, {"topk_ids": IDS, "topk_weights": WEIGHTS, "router_logits": F32}, ValueError, "got both"),
        (F32, {"router_logits": torch.zeros(2)}, ValueError, r"router_logits must be \[2, E\].*got shape \[2\]"),
        (F32, {"router_logits": F32.half()}, TypeError, "router_logits must be float32 or bfloat16, got float16"),
    ],
)
def test_wrong_arguments_are_named(hidden: Any, others: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode(hidden, **others)


def test_scales_per_group_need_a_multiple_of_the_group() -> None:
    with pytest.raises(ValueError, match=r"hidden_scales must be \[2\], \[2, 1\], got shape \[2, 2\]"):
        encode(FP8[:, :200], hidden_scales=torch.ones(2, 2))


GOOD = safetensors.torch.save({"output": torch.zeros(2, 4)})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not safetensors"),
        (GOOD[:-1], "not safetensors"),
        (GOOD + b"\0", "not safetensors"),
        (b"\xff" * 64, "not safetensors"),
        (safetensors.torch.save({"result": torch.zeros(2, 4)}), r"tensor 'output', it holds \['result'\]"),
        (safetensors.torch.save({"output": torch.zeros(1, 4)}), r"output must be F32 \[2, 4\], .* F32 \[1, 4\]"),
        (safetensors.torch.save({"output": torch.zeros(8)}), r"output must be F32 \[2, 4\], .* F32 \[8\]"),
        (safetensors.torch.save({"output": torch.zeros(2, 4).half()}), "output must be F32 .* F16"),
        (safetensors.torch.save({"output": torch.zeros(2, 4).int()}), "output must be F32 .* I32"),
    ],
    ids=["empty", "truncated", "too long", "noise", "other name", "other rows", "flat", "other float", "integers"],
)
def test_a_reply_with_anything_else_is_refused(body: bytes, message: str) -> None:
    like = OutputLike((2, 4), "float32", torch.device("cpu"))
    assert decode_output(GOOD, like).shape == (2, 4)
    with pytest.raises(TransportFailed, match=message):
        decode_output(body, like)


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_comes_back_there() -> None:
    hidden = torch.arange(8.0, device="cuda").reshape(2, 4)
    body, like = encode(hidden)
    assert torch.equal(read(body)["hidden_states"], hidden.cpu())
    back = decode_output(safetensors.torch.save({"output": hidden.cpu() * 2}), like)
    assert back.device == hidden.device
    assert torch.equal(back, hidden * 2)
