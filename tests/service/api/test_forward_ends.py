"""How a forward can end other than by its reply, and what is told of it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import httpx
import numpy as np
import pytest

from moe_forward.logs import extra_fields

FORWARD = "/v1/moe/forward"
INFER = "/v2/models/tiny/infer"


def fields_of(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Fields of the only request line; without those that are None."""
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    assert len(lines) == 1
    return extra_fields(lines[0])


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_bug_is_500_and_leaks_neither_memory_nor_words(
    client: Any, front: Any, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    front.link.crash = True
    reply = await client.post(f"{FORWARD}?layer=1", content=kit.body(hidden_states=kit.states(1)), headers=kit.headers)
    assert (reply.status_code, reply.json()["code"]) == (500, "internal")
    assert "a bug" not in reply.text
    assert any(record.exc_info and "a bug" in str(record.exc_info[1]) for record in caplog.records)
    front.check_idle()


async def test_deadline_answers_504_but_the_bytes_stay_until_the_engine_is_done(
    client: Any, front: Any, kit: Any
) -> None:
    front.link.gate.clear()
    reply = await client.post(
        f"{FORWARD}?layer=1&timeout_ms=20", content=kit.body(hidden_states=kit.states(1)), headers=kit.headers
    )
    assert (reply.status_code, reply.json()["code"]) == (504, "deadline_exceeded")
    await kit.until(lambda: front.link.cancelled == [1])
    assert front.link.slab.taken_bytes > 0
    assert front.metric("rejected_total", reason="deadline") == 1
    front.link.gate.set()
    await kit.until(lambda: front.link.slab.taken_bytes == 0)
    front.check_idle()


async def test_the_deadline_is_on_the_monotonic_clock_and_has_a_default(make_front: Any, kit: Any) -> None:
    front = make_front(default_timeout_seconds=5.0)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front.app), base_url="http://front") as client:
        for query in ("", "&timeout_ms=60000"):
            body = kit.body(hidden_states=kit.states(1))
            assert (await client.post(f"{FORWARD}?layer=1{query}", content=body, headers=kit.headers)).is_success
    default, named = (request.deadline_seconds - time.monotonic() for request in front.link.requests)
    assert 0 < default <= 5.0
    assert 5.0 < named <= 60.0


async def test_a_client_that_leaves_while_waiting_cancels_its_forward(front: Any, kit: Any) -> None:
    front.link.gate.clear()
    body = kit.body(hidden_states=kit.states(1))
    messages = [part(body, False), {"type": "http.disconnect"}]
    status, _ = await kit.drive(front, messages, content_type=kit.content_type, content_length=str(len(body)))
    assert status == 0
    assert front.requests(499) == 1
    await kit.until(lambda: front.link.cancelled == [1])
    assert front.link.slab.taken_bytes > 0
    front.link.gate.set()
    await kit.until(lambda: front.link.slab.taken_bytes == 0)
    front.check_idle()


async def test_a_client_that_leaves_during_its_body_frees_the_memory(front: Any, kit: Any) -> None:
    messages = [part(b"abc", True), {"type": "http.disconnect"}]
    status, _ = await kit.drive(front, messages, content_type=kit.content_type, content_length="1000")
    assert status == 0
    assert front.requests(499) == 1
    front.check_idle()


async def test_a_cancelled_handler_keeps_the_memory_until_the_engine_is_done(front: Any, kit: Any) -> None:
    front.link.gate.clear()
    body = kit.body(hidden_states=kit.states(1))
    handler = asyncio.ensure_future(
        kit.drive(front, [part(body, False)], content_type=kit.content_type, content_length=str(len(body)))
    )
    await kit.until(lambda: front.link.inflight == 1)
    handler.cancel()
    await asyncio.gather(handler, return_exceptions=True)
    assert handler.cancelled()
    assert front.link.slab.taken_bytes > 0
    assert front.requests(499) == 1
    front.link.gate.set()
    await kit.until(lambda: front.link.slab.taken_bytes == 0)


async def test_requests_in_flight_finish_while_draining(client: Any, front: Any, kit: Any) -> None:
    front.link.gate.clear()
    states = kit.states(2)
    body = kit.body(hidden_states=states)
    call = asyncio.ensure_future(client.post(f"{FORWARD}?layer=1", content=body, headers=kit.headers))
    await kit.until(lambda: front.link.inflight == 1)
    drained = await client.post("/v1/drain", headers={"authorization": f"Bearer {kit.token}"})
    assert drained.json()["inflight_requests"] == 1
    front.link.gate.set()
    reply = await call
    assert np.array_equal(kit.output(reply.content), states * 2)
    front.check_idle()


async def test_an_answered_request_is_logged_and_measured(
    client: Any, front: Any, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = kit.body(hidden_states=kit.states(3))
    await client.post(f"{FORWARD}?layer=2", content=body, headers={**kit.headers, "x-request-id": "r-1"})
    fields = fields_of(caplog)
    expected = {
        "route": FORWARD,
        "request_id": "r-1",
        "model": "tiny",
        "status": 200,
        "encoding": "safetensors",
        "layer": 2,
        "tokens": 3,
        "body_bytes": len(body),
        "queue_seconds": 0.001,
        "step_seconds": 0.002,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["duration_seconds"] > 0
    assert "code" not in fields
    route = {"model": "tiny", "route": FORWARD}
    assert front.metric("requests_total", **route, code="200") == 1
    assert front.metric("request_duration_seconds_count", **route) == 1
    assert front.metric("queue_duration_seconds_sum", model="tiny") == 0.001
    assert front.metric("tokens_total", model="tiny") == 3
    assert front.metric("request_body_bytes_sum", encoding="safetensors") == len(body)
    for name in ("decode", "encode"):
        assert front.metric(f"{name}_duration_seconds_count", encoding="safetensors") == 1


async def test_a_refused_request_is_logged_without_what_the_client_sent(
    client: Any, front: Any, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await client.post(f"{FORWARD}?layer=99", content=kit.body(hidden_states=kit.states(1)), headers=kit.headers)
    fields = fields_of(caplog)
    assert (fields["status"], fields["code"]) == (404, "layer_not_found")
    assert "error" not in fields
    assert front.metric("tokens_total", model="tiny") == 0
