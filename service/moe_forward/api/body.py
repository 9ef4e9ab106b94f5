"""A request's headers and body: what is refused before a byte is read, and the way of the bytes into the slab."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import parse_qsl

from starlette.types import Receive

from moe_forward.errors import ErrorCode, ForwardError

LENGTH_DIGITS = 19
QUERY_FIELDS = 32


class ClientDisconnected(Exception):
    """The client closed the connection before its request was answered."""


def header_map(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers by lower-case name; repeated ones joined by ", " (RFC 9110 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw:
        name, value = _header_name(raw_name), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


@lru_cache(maxsize=256)
def _header_name(raw: bytes) -> str:
    return raw.decode("latin-1").lower()


@lru_cache(maxsize=256)
def query_fields(query_string: bytes) -> tuple[tuple[str, str], ...]:
    """Return the query's fields in order; remembered, since a client sends the same ones again and again.

    Raises: ForwardError INVALID_PARAMETER for more fields than any call has.
    """
    try:
        return tuple(parse_qsl(query_string.decode("latin-1"), keep_blank_values=True, max_num_fields=QUERY_FIELDS))
    except ValueError as error:
        raise ForwardError(
            ErrorCode.INVALID_PARAMETER, f"the query has more than the {QUERY_FIELDS} fields allowed"
        ) from error


def check_content_encoding(headers: dict[str, str]) -> None:
    """Refuse a compressed body: tensors go into shared memory as they come.

    Raises: ForwardError UNSUPPORTED_MEDIA_TYPE.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ForwardError(
            ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"Content-Encoding: expected none or identity, got {encoding!r}"
        )


def content_length(headers: dict[str, str], limit_bytes: int) -> int:
    """Return the announced size of the body.

    limit_bytes: size of a body at most.
    Raises: ForwardError LENGTH_REQUIRED, TOO_LARGE, or MALFORMED_BODY for no number or an empty body.
    """
    if "transfer-encoding" in headers or "content-length" not in headers:
        raise ForwardError(
            ErrorCode.LENGTH_REQUIRED, "Content-Length: expected the size of the body, got none (chunked transfer?)"
        )
    text = headers["content-length"].strip()
    if not (text.isascii() and text.isdigit()):
        raise ForwardError(ErrorCode.MALFORMED_BODY, f"Content-Length: expected a number of bytes, got {text[:40]!r}")
    if len(text) > LENGTH_DIGITS or int(text) > limit_bytes:
        raise ForwardError(ErrorCode.TOO_LARGE, f"the body: expected at most {limit_bytes} bytes, got {text[:40]}")
    if int(text) == 0:
        raise ForwardError(ErrorCode.MALFORMED_BODY, "the body: expected tensors, got 0 bytes")
    return int(text)


async def receive_body(receive: Receive, target: memoryview, timeout_seconds: float) -> None:
    """Copy the body into `target` while it arrives.

    target: [Content-Length] bytes. timeout_seconds: for the whole body.
    Raises: ForwardError BODY_TIMEOUT, or MALFORMED_BODY when the body has another length; ClientDisconnected.
    """
    filled = 0

    async def fill() -> None:
        nonlocal filled
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            end = filled + len(chunk)
            if end > len(target) or (not more and end < len(target)):
                raise ForwardError(
                    ErrorCode.MALFORMED_BODY,
                    f"the body: expected {len(target)} bytes as Content-Length says, got "
                    f"{'at least ' if more else ''}{end}",
                )
            target[filled:end] = chunk
            filled = end

    try:
        await asyncio.wait_for(fill(), timeout_seconds)
    except asyncio.TimeoutError as error:
        raise body_too_slow(len(target), timeout_seconds, filled) from error


def body_too_slow(nbytes: int, timeout_seconds: float, got: int) -> ForwardError:
    """Return the refusal of a body of which only `got` of `nbytes` bytes came in time."""
    return ForwardError(
        ErrorCode.BODY_TIMEOUT, f"the body: expected {nbytes} bytes within {timeout_seconds:g} s, got {got}"
    )


async def disconnected(receive: Receive) -> None:
    """Return when the client closes the connection; only to be called after the whole body has come."""
    while (await receive())["type"] != "http.disconnect":
        pass
