"""A small model, and builders of requests and refusals that every wire test shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import pytest

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import GateSpec, ModelSpec
from moe_forward.wire import ReplyNotes, WireLimits, WireRequest, oip


@pytest.fixture(scope="session")
def limits() -> WireLimits:
    spec = ModelSpec(
        name="tiny",
        hidden_size=256,
        intermediate_size=128,
        num_experts=8,
        top_k=2,
        shared_intermediate_size=0,
        layers=tuple(range(3, 20)),
        group_size=128,
        gate=GateSpec("softmax"),
    )
    return WireLimits(spec, max_request_tokens=16, max_timeout_seconds=60.0, max_json_values=1 << 19)


@pytest.fixture(scope="session")
def notes() -> ReplyNotes:
    return ReplyNotes(request_id="r-17", batch_tokens=24, queue_seconds=0.000125, step_seconds=0.0031)


@pytest.fixture(scope="session")
def make_request() -> Callable[..., WireRequest]:
    """Build a request; layer 3 is asked for in the query unless another query is given."""

    def build(
        body: bytes | bytearray,
        query: Sequence[tuple[str, str]] = (("layer", "3"),),
        headers: Mapping[str, str] | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> WireRequest:
        return WireRequest(headers or {}, query, memoryview(body), model, version)

    return build


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Call something that must be refused with `code`, in a sentence holding all of `words`."""

    def check(code: ErrorCode, words: Sequence[str], function: Callable[..., object], *args: object) -> str:
        with pytest.raises(ForwardError) as caught:
            function(*args)
        message = caught.value.message
        assert caught.value.code is code, message
        for word in words:
            assert word in message
        assert len(message) < 600
        message.encode("utf-8")  # a reply must be able to carry it
        return message

    return check


@pytest.fixture
def decode_oip(make_request, limits):
    """Decode a message with `data` behind it, with the header that the protocol asks for then."""

    def run(message, data=None, headers=None, **kwargs):
        text = message if isinstance(message, bytes) else json.dumps({"parameters": {"layer": 3}} | message).encode()
        if data is not None:
            headers = {oip.HEADER_LENGTH: str(len(text))} | (headers or {})
        body = bytearray(text + (data or b""))
        kwargs = {"query": (), "model": "tiny"} | kwargs
        return oip.decode(make_request(body, headers=headers, **kwargs), limits)

    return run
