"""Requests that must be refused, each with its status and a word of the sentence that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save

from .forwards import SAFETENSORS, Forward, Sent, as_oip_binary, as_oip_json

OWN = "/v1/moe/forward?layer=1"
INFER = "/v2/models/tiny/infer"
HIDDEN = torch.ones(3, 256)
IDS = torch.arange(12).view(3, 4)
WEIGHTS = torch.full((3, 4), 0.25)
FP8 = HIDDEN.to(torch.float8_e4m3fn)


def own(body: bytes, path: str = OWN, **headers: str) -> Sent:
    return Sent(
        path, {"content-type": SAFETENSORS, **{key.replace("_", "-"): value for key, value in headers.items()}}, body
    )


def tensors(**named: torch.Tensor) -> Sent:
    return own(save({name: tensor.contiguous() for name, tensor in named.items()}))


def hidden(**named: torch.Tensor) -> Sent:
    return tensors(hidden_states=HIDDEN, **named)


def ids(values: list[int], dtype: torch.dtype = torch.int64) -> Sent:
    changed = IDS.clone()
    changed[1] = torch.tensor(values)
    return hidden(topk_ids=changed.to(dtype), topk_weights=WEIGHTS)


def header(document: Any, data: bytes = b"", length: int | None = None) -> Sent:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return own((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def as_text(body: str, path: str = OWN) -> Sent:
    return Sent(path, {"content-type": "application/json"}, body.encode())


def spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[1, 2] = value
    return changed


def oip(change: Callable[[dict[str, Any]], None]) -> Sent:
    sent = as_oip_json(Forward(1, HIDDEN))
    document = json.loads(sent.body)
    change(document)
    return Sent(sent.path, sent.headers, json.dumps(document).encode())


def binary(**headers: str) -> Sent:
    sent = as_oip_binary(Forward(1, HIDDEN))
    return Sent(
        sent.path, {**sent.headers, **{key.replace("_", "-"): value for key, value in headers.items()}}, sent.body
    )


GOOD = save({"hidden_states": HIDDEN})
NESTED = '{"hidden_states": ' + "[" * 100_000 + "]" * 100_000 + "}"
SPAN = {"dtype": "F32", "shape": [1, 256], "data_offsets": [0, 1024]}

CASES: dict[str, tuple[Sent, int, str]] = {
    # bodies and their lengths
    "truncated": (own(GOOD[:-5]), 400, "data_offsets"),
    "truncated header": (own(GOOD[:40]), 400, "header"),
    "seven bytes": (own(b"1234567"), 400, "at least 8 bytes"),
    "empty": (own(b""), 400, "0 bytes"),
    "longer than its header says": (own(GOOD + b"1234"), 400, "body"),
    "header length beyond the body": (header({}, length=1 << 40), 400, "header"),
    "header length of 2^64 - 1": (header({}, length=(1 << 64) - 1), 400, "header"),
    "header no JSON": (header(b"{hello"), 400, "JSON"),
    "header no object": (header([1, 2]), 400, "object"),
    "header with a key twice": (header(b'{"a": 1, "a": 2}'), 400, "once"),
    "offsets overlap": (header({"hidden_states": SPAN, "topk_ids": SPAN}, bytes(2048)), 400, "overlap"),
    "offsets leave a hole": (
        header({"hidden_states": SPAN | {"data_offsets": [8, 1032]}}, bytes(1032)),
        400,
        "hole",
    ),
    "offsets lie about the shape": (header({"hidden_states": SPAN | {"shape": [2, 256]}}, bytes(1024)), 400, "2048"),
    "offsets backwards": (header({"hidden_states": SPAN | {"data_offsets": [1024, 0]}}, bytes(1024)), 400, "ascending"),
    "shape negative": (header({"hidden_states": SPAN | {"shape": [-1, 256]}}, bytes(1024)), 400, "shape"),
    "shape whose product overflows": (
        header({"hidden_states": SPAN | {"shape": [1 << 39, 1 << 39]}}, bytes(1024)),
        400,
        "hidden_states",
    ),
    "dtype unknown": (header({"hidden_states": SPAN | {"dtype": "F64"}}, bytes(1024)), 400, "dtype"),
    "random bytes": (own(bytes(range(256)) * 40), 400, "header"),
    # tensors
    "no tensor": (tensors(), 400, "hidden_states"),
    "hidden_states missing": (tensors(router_logits=torch.zeros(3, 32)), 400, "hidden_states"),
    "extra tensor": (hidden(attention_mask=torch.ones(3)), 400, "attention_mask"),
    "topk_weights missing": (hidden(topk_ids=IDS), 400, "topk_weights"),
    "topk_ids missing": (hidden(topk_weights=WEIGHTS), 400, "topk_ids"),
    "both kinds of routing": (
        hidden(topk_ids=IDS, topk_weights=WEIGHTS, router_logits=torch.zeros(3, 32)),
        400,
        "router_logits",
    ),
    "hidden_states int32": (tensors(hidden_states=HIDDEN.int()), 400, "hidden_states"),
    "topk_ids float": (hidden(topk_ids=IDS.float(), topk_weights=WEIGHTS), 400, "topk_ids"),
    "topk_weights f16": (hidden(topk_ids=IDS, topk_weights=WEIGHTS.half()), 400, "topk_weights"),
    "router_logits f16": (hidden(router_logits=torch.zeros(3, 32).half()), 400, "router_logits"),
    "hidden_scales bf16": (
        tensors(hidden_states=FP8, hidden_scales=torch.ones(3).bfloat16()),
        400,
        "hidden_scales",
    ),
    "one channel too few": (tensors(hidden_states=HIDDEN[:, :255]), 400, "256"),
    "hidden_states of rank 1": (tensors(hidden_states=HIDDEN[0]), 400, "hidden_states"),
    "hidden_states of rank 3": (tensors(hidden_states=HIDDEN[None]), 400, "hidden_states"),
    "top_k of 3": (hidden(topk_ids=IDS[:, :3], topk_weights=WEIGHTS[:, :3]), 400, "top_k"),
    "a row of ids too few": (hidden(topk_ids=IDS[:2], topk_weights=WEIGHTS[:2]), 400, "topk_ids"),
    "31 router logits": (hidden(router_logits=torch.zeros(3, 31)), 400, "experts"),
    "fp8 without scales": (tensors(hidden_states=FP8), 400, "hidden_scales"),
    "scales of three groups": (tensors(hidden_states=FP8, hidden_scales=torch.ones(3, 3)), 400, "hidden_scales"),
    "scales beside f32": (hidden(hidden_scales=torch.ones(3)), 400, "hidden_scales"),
    "no tokens": (tensors(hidden_states=HIDDEN[:0]), 400, "at least one token"),
    "too many tokens": (tensors(hidden_states=torch.zeros(4097, 256).half()), 413, "4096"),
    # values
    "id negative": (ids([0, 1, 2, -1]), 400, "row 1"),
    "id negative in int32": (ids([0, 1, 2, -1], torch.int32), 400, "row 1"),
    "id too large": (ids([0, 1, 2, 32]), 400, "32"),
    "id beyond int32": (ids([0, 1, 2, 1 << 40]), 400, "row 1"),
    "id twice": (ids([5, 6, 5, 7]), 400, "twice"),
    "weight NaN": (hidden(topk_ids=IDS, topk_weights=spoiled(WEIGHTS, torch.nan)), 422, "topk_weights row 1"),
    "weight Inf": (hidden(topk_ids=IDS, topk_weights=spoiled(WEIGHTS, torch.inf)), 422, "topk_weights row 1"),
    "hidden NaN": (tensors(hidden_states=spoiled(HIDDEN, torch.nan)), 422, "NaN"),
    "hidden Inf in bf16": (tensors(hidden_states=spoiled(HIDDEN, torch.inf).bfloat16()), 422, "Inf"),
    "hidden -Inf in f16": (tensors(hidden_states=spoiled(HIDDEN, -torch.inf).half()), 422, "Inf"),
    "hidden NaN in fp8": (
        tensors(hidden_states=spoiled(HIDDEN, torch.nan).to(torch.float8_e4m3fn), hidden_scales=torch.ones(3)),
        422,
        "NaN",
    ),
    "scale Inf": (tensors(hidden_states=FP8, hidden_scales=torch.tensor([1, torch.inf, 1])), 422, "hidden_scales"),
    "logit NaN": (hidden(router_logits=spoiled(torch.zeros(3, 32), torch.nan)), 422, "router_logits"),
    # parameters
    "no layer": (own(GOOD, "/v1/moe/forward"), 400, "layer"),
    "layer no number": (own(GOOD, "/v1/moe/forward?layer=one"), 400, "layer"),
    "layer dense": (own(GOOD, "/v1/moe/forward?layer=0"), 404, "1, 2, 3"),
    "layer unknown": (own(GOOD, "/v1/moe/forward?layer=61"), 404, "layer"),
    "two layers": (own(GOOD, OWN + "&layer=2"), 400, "layer"),
    "layers that disagree": (own(GOOD, x_moe_layer="2"), 400, "layer"),
    "shared_experts maybe": (own(GOOD, OWN + "&shared_experts=maybe"), 400, "shared_experts"),
    "timeout of 0": (own(GOOD, OWN + "&timeout_ms=0"), 400, "timeout_ms"),
    "parameter unknown": (own(GOOD, OWN + "&expert=3"), 400, "expert"),
    "deadline that passes": (own(GOOD, OWN + "&timeout_ms=0.001"), 504, "deadline"),
    # content types
    "text": (Sent(OWN, {"content-type": "text/plain"}, GOOD), 415, "safetensors"),
    "no content type": (Sent(OWN, {}, GOOD), 415, "content-type"),
    "gzip": (own(GOOD, content_encoding="gzip"), 415, "gzip"),
    # JSON
    "JSON nested deep": (as_text(NESTED), 400, "nested"),
    "JSON no JSON": (as_text("{'hidden_states': 1}"), 400, "JSON"),
    "JSON no object": (as_text("[1]"), 400, "object"),
    "JSON not UTF-8": (Sent(OWN, {"content-type": "application/json"}, b'{"\xff": 1}'), 400, "UTF-8"),
    "JSON ragged": (as_text('{"hidden_states": [[1, 2], [3]]}'), 400, "row 1"),
    "JSON with text": (as_text('{"hidden_states": [["1"]]}'), 400, "hidden_states"),
    "JSON with NaN": (as_text(json.dumps({"hidden_states": [[float("nan")] * 256]})), 422, "hidden_states"),
    "JSON with a key twice": (as_text('{"layer": 1, "layer": 2}'), 400, "once"),
    "JSON with an endless number": (as_text('{"layer": 1' + "0" * 5000 + "}"), 400, "number"),
    "JSON above 1 MiB": (as_text('{"hidden_states": "' + "x" * (1 << 20) + '"}'), 413, "1048576"),
    # Open Inference Protocol
    "model unknown": (as_oip_json(Forward(1, HIDDEN), model="big"), 404, "big"),
    "version unknown": (Sent("/v2/models/tiny/versions/9/infer", {}, as_oip_json(Forward(1, HIDDEN)).body), 404, "9"),
    "inputs missing": (oip(lambda document: document.pop("inputs")), 400, "inputs"),
    "inputs no list": (oip(lambda document: document.update(inputs={})), 400, "inputs"),
    "datatype unknown": (oip(lambda document: document["inputs"][0].update(datatype="FP64")), 400, "datatype"),
    "data of another shape": (oip(lambda document: document["inputs"][0].update(shape=[2, 256])), 400, "shape"),
    "output unknown": (oip(lambda document: document.update(outputs=[{"name": "logits"}])), 400, "output"),
    "shared memory": (
        oip(lambda document: document["inputs"][0].update(parameters={"shared_memory_region": "a"})),
        400,
        "shared memory",
    ),
    "parameter unknown in OIP": (oip(lambda document: document["parameters"].update(priority=1)), 400, "priority"),
    "JSON length beyond the body": (binary(inference_header_content_length="99999"), 400, "header"),
    "JSON length negative": (binary(inference_header_content_length="-1"), 400, "header"),
    "JSON length too short": (binary(inference_header_content_length="20"), 400, "JSON"),
    "binary_data_size lies": (
        Sent(INFER, binary().headers, binary().body.replace(b'"binary_data_size": 3072', b'"binary_data_size": 3073')),
        400,
        "binary_data_size",
    ),
}
