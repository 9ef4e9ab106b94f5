from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from moe_forward.api.body import (
    ClientDisconnected,
    check_content_encoding,
    content_length,
    header_map,
    query_fields,
    receive_body,
)
from moe_forward.errors import ErrorCode, ForwardError


def receiver(*messages: dict[str, Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Gives the messages in turn, then waits for ever."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_headers_are_lower_case_and_repeated_ones_joined() -> None:
    raw = [(b"X-Moe-Layer", b"1"), (b"x-moe-layer", b"2"), (b"accept", b"*/*")]
    assert header_map(raw) == {"x-moe-layer": "1, 2", "accept": "*/*"}


def test_query_keeps_order_blank_values_and_repeats() -> None:
    assert query_fields(b"layer=1&a=&layer=%32") == (("layer", "1"), ("a", ""), ("layer", "2"))


def test_query_with_too_many_fields_is_refused() -> None:
    with pytest.raises(ForwardError, match="32 fields") as caught:
        query_fields(b"&".join(b"a=1" for _ in range(33)))
    assert caught.value.code is ErrorCode.INVALID_PARAMETER


@pytest.mark.parametrize("value", ["gzip", "br", "identity, gzip", ""])
def test_compressed_body_is_refused(value: str) -> None:
    with pytest.raises(ForwardError, match="Content-Encoding") as caught:
        check_content_encoding({"content-encoding": value})
    assert caught.value.code is ErrorCode.UNSUPPORTED_MEDIA_TYPE


def test_identity_encoding_is_accepted() -> None:
    check_content_encoding({"content-encoding": "Identity"})
    check_content_encoding({})


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, ErrorCode.LENGTH_REQUIRED),
        ({"transfer-encoding": "chunked"}, ErrorCode.LENGTH_REQUIRED),
        ({"transfer-encoding": "chunked", "content-length": "5"}, ErrorCode.LENGTH_REQUIRED),
        ({"content-length": "101"}, ErrorCode.TOO_LARGE),
        ({"content-length": "9" * 5000}, ErrorCode.TOO_LARGE),
        ({"content-length": "0"}, ErrorCode.MALFORMED_BODY),
        ({"content-length": "-5"}, ErrorCode.MALFORMED_BODY),
        ({"content-length": "5, 5"}, ErrorCode.MALFORMED_BODY),
        ({"content-length": "\u0665"}, ErrorCode.MALFORMED_BODY),
        ({"content-length": ""}, ErrorCode.MALFORMED_BODY),
    ],
)
def test_unusable_content_length_is_refused(headers: dict[str, str], code: ErrorCode) -> None:
    with pytest.raises(ForwardError) as caught:
        content_length(headers, 100)
    assert caught.value.code is code


def test_content_length_up_to_the_limit_is_taken() -> None:
    assert content_length({"content-length": "100"}, 100) == 100


async def test_body_arrives_in_pieces() -> None:
    target = bytearray(6)
    await receive_body(receiver(part(b"ab", True), part(b"", True), part(b"cdef", False)), memoryview(target), 1.0)
    assert bytes(target) == b"abcdef"


async def test_body_ending_in_an_empty_message_is_complete() -> None:
    target = bytearray(2)
    await receive_body(receiver(part(b"ab", True), part(b"", False)), memoryview(target), 1.0)
    assert bytes(target) == b"ab"


@pytest.mark.parametrize("pieces", [[(b"abc", False)], [(b"abcd", True), (b"e", False)], [(b"abcde", True)]])
async def test_body_of_another_length_is_malformed_and_stays_in_bounds(pieces: list[tuple[bytes, bool]]) -> None:
    memory = bytearray(8)
    with pytest.raises(ForwardError, match="expected 4 bytes as Content-Length says") as caught:
        await receive_body(receiver(*(part(*piece) for piece in pieces)), memoryview(memory)[:4], 1.0)
    assert caught.value.code is ErrorCode.MALFORMED_BODY
    assert memory[4:] == bytes(4)


async def test_slow_body_times_out_and_says_how_far_it_came() -> None:
    with pytest.raises(ForwardError, match=r"expected 4 bytes within 0\.01 s, got 3") as caught:
        await receive_body(receiver(part(b"abc", True)), memoryview(bytearray(4)), 0.01)
    assert caught.value.code is ErrorCode.BODY_TIMEOUT


async def test_disconnect_ends_the_body() -> None:
    with pytest.raises(ClientDisconnected):
        await receive_body(receiver(part(b"abc", True), {"type": "http.disconnect"}), memoryview(bytearray(4)), 1.0)
