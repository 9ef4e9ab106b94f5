from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import httpx
import numpy as np
import pytest

from moe_forward.errors import ErrorCode
from moe_forward.types import DType, Routing

FORWARD = "/v1/moe/forward"
INFER = "/v2/models/tiny/infer"


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
async def test_safetensors_goes_in_and_comes_out(client: Any, front: Any, kit: Any, dtype: Any) -> None:
    states = kit.states(5, dtype=dtype)
    reply = await client.post(f"{FORWARD}?layer=2", content=kit.body(hidden_states=states), headers=kit.headers)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == kit.content_type
    assert np.array_equal(kit.output(reply.content), states * 2)
    request = front.link.requests[0]
    assert (request.layer, request.tokens, request.routing, request.shared_experts) == (2, 5, Routing.SERVER, True)
    assert request.output.columns == kit.hidden
    front.check_idle()


async def test_the_engine_gets_tensors_where_they_lie_in_the_body(client: Any, front: Any, kit: Any) -> None:
    states, weights = kit.states(3), np.full((3, 4), 0.25, np.float32)
    ids = np.tile(np.arange(4, dtype=np.int64), (3, 1))
    front.link.gate.clear()
    body = kit.body(hidden_states=states, topk_ids=ids, topk_weights=weights)
    call = asyncio.ensure_future(
        client.post(f"{FORWARD}?layer=1&shared_experts=false", content=body, headers=kit.headers)
    )
    await kit.until(lambda: front.link.inflight == 1)
    request = front.link.requests[0]
    assert (request.routing, request.shared_experts, request.hidden_scales) == (Routing.TOPK, False, None)
    assert request.chosen.columns == request.weights.columns == 4
    assert request.chosen.dtype is DType.I64
    for ref, array in ((request.hidden, states), (request.chosen, ids), (request.weights, weights)):
        assert bytes(front.link.slab.view(ref.offset, array.nbytes)) == array.tobytes()
    front.link.gate.set()
    assert (await call).status_code == 200
    front.check_idle()


async def test_json_is_converted_and_answered_in_json(client: Any, front: Any, kit: Any) -> None:
    states = kit.states(2)
    reply = await client.post(FORWARD, json={"hidden_states": states.tolist(), "layer": 3})
    assert reply.status_code == 200
    assert np.array_equal(np.array(reply.json()["output"], np.float32), states * 2)
    front.check_idle()


async def test_protocol_request_with_binary_tensors(client: Any, front: Any, kit: Any) -> None:
    states = kit.states(4)
    tensor = {
        "name": "hidden_states",
        "datatype": "FP32",
        "shape": [4, kit.hidden],
        "parameters": {"binary_data_size": states.nbytes},
    }
    head = json.dumps({"id": "7", "inputs": [tensor], "parameters": {"layer": 1, "binary_data_output": True}}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    for path in (INFER, "/v2/models/tiny/versions/1/infer"):
        reply = await client.post(path, content=head + states.tobytes(), headers=headers)
        assert reply.status_code == 200
        size = int(reply.headers["inference-header-content-length"])
        assert json.loads(reply.content[:size])["parameters"]["batch_tokens"] == 11
        assert np.array_equal(np.frombuffer(reply.content[size:], np.float32).reshape(4, -1), states * 2)
    assert front.requests(200, "/v2/models/{model}/infer") == 2
    front.check_idle()


@pytest.mark.parametrize(
    ("content", "headers", "settings", "status", "code"),
    [
        (b"x" * 64, {"content-type": "text/plain"}, {}, 415, "unsupported_media_type"),
        (b"x" * 64, {}, {}, 415, "unsupported_media_type"),
        (b"x" * 64, {"content-encoding": "gzip"}, {}, 415, "unsupported_media_type"),
        (b"x" * 2048, {}, {"max_body_bytes": 1024}, 413, "too_large"),
        (b"x" * 2048, {"content-type": "application/json"}, {"max_json_bytes": 1024}, 413, "too_large"),
        (b"", {}, {}, 400, "malformed_body"),
        (b"x" * 64, {}, {}, 400, "malformed_body"),
    ],
)
async def test_refusals(
    make_front: Any, kit: Any, content: bytes, headers: Any, settings: Any, status: int, code: str
) -> None:
    front = make_front(**settings)
    if status == 415 and not headers:
        headers = {"content-type": ""}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front.app), base_url="http://front") as client:
        reply = await client.post(f"{FORWARD}?layer=1", content=content, headers={**kit.headers, **headers})
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert front.requests(status) == 1
    assert front.link.requests == []
    front.check_idle()


async def test_refusals_before_the_body_read_nothing_of_it(make_front: Any, kit: Any) -> None:
    front = make_front(max_body_bytes=1024)
    body = [part(b"x", True)]
    for headers, expected in (
        ({"content_length": "4096"}, 413),
        ({"transfer_encoding": "chunked"}, 411),
        ({"content_length": "64", "content_encoding": "br"}, 415),
    ):
        status, _ = await kit.drive(front, body, content_type=kit.content_type, **headers)
        assert status == expected
    assert len(body) == 1
    front.check_idle()


@pytest.mark.parametrize("length", ["20", "22"])
async def test_a_content_length_that_lies_is_malformed(front: Any, kit: Any, length: str) -> None:
    messages = [part(b"x" * 10, True), part(b"x" * 11, False)]
    status, body = await kit.drive(front, messages, content_type=kit.content_type, content_length=length)
    assert status == 400
    assert json.loads(body)["code"] == "malformed_body"
    front.check_idle()


async def test_large_json_part_of_a_protocol_request_is_refused(make_front: Any) -> None:
    front = make_front(max_json_bytes=1024)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front.app), base_url="http://front") as client:
        for headers in ({}, {"inference-header-content-length": "2000"}):
            reply = await client.post(INFER, content=b"{" * 2048, headers=headers)
            assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    front.check_idle()


async def test_full_memory_is_429_with_retry_after(client: Any, front: Any, kit: Any) -> None:
    taken = front.link.slab.allocate(front.link.slab.nbytes - 256)
    reply = await client.post(f"{FORWARD}?layer=1", content=kit.body(hidden_states=kit.states(9)), headers=kit.headers)
    assert (reply.status_code, reply.json()["code"]) == (429, "queue_full")
    assert reply.headers["retry-after"] == "1"
    assert front.metric("rejected_total", reason="queue_full") == 1
    front.link.slab.free(taken)
    front.check_idle()


async def test_not_ready_is_503_with_the_reason(client: Any, front: Any, kit: Any) -> None:
    front.link.status = dataclasses.replace(front.link.status, ready=False, lost=True, reason="rank 1 died")
    reply = await client.post(f"{FORWARD}?layer=1", content=b"x", headers=kit.headers)
    assert (reply.status_code, reply.json()["code"]) == (503, "rank_lost")
    assert "rank 1 died" in reply.json()["error"]
    assert front.metric("rejected_total", reason="unavailable") == 1


@pytest.mark.parametrize(
    ("code", "status", "retry_after"),
    [
        (ErrorCode.NON_FINITE, 422, None),
        (ErrorCode.QUEUE_FULL, 429, "3"),
        (ErrorCode.RANK_LOST, 503, "3"),
        (ErrorCode.DEADLINE_EXCEEDED, 504, "3"),
    ],
)
async def test_what_the_engine_refuses_is_passed_on(
    client: Any, front: Any, kit: Any, code: ErrorCode, status: int, retry_after: str | None
) -> None:
    front.link.refusal = (code, "the engine's sentence", None if retry_after is None else 2.5)
    reply = await client.post(f"{FORWARD}?layer=1", content=kit.body(hidden_states=kit.states(1)), headers=kit.headers)
    assert reply.status_code == status
    assert reply.json()["error"] == "the engine's sentence"
    assert reply.headers.get("retry-after") == retry_after
    front.check_idle()
