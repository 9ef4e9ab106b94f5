"""The way of a reply out of the slab.

uvicorn and uvloop keep a pointer to what they were given after `send` has returned, for as long as the client reads
slowly. A view of the slab would by then show another client's request, so only copies are handed over, a chunk at a
time: the slab's part is free as soon as the last chunk is copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from starlette.types import Send

from moe_forward.api.body import ClientDisconnected

CHUNK_BYTES = 256 * 1024


async def send_reply(
    send: Send,
    status: int,
    headers: Iterable[tuple[str, str]],
    head: bytes,
    body: memoryview | bytes,
    release: Callable[[], None],
    chunk_timeout_seconds: float,
) -> None:
    """Send `head` and `body` as one reply of known length.

    release: called once nothing of `body` is needed any more, before the last chunk is sent.
    chunk_timeout_seconds: longest time the client may take to make room for one more chunk.
    Raises: ClientDisconnected when it takes longer; the reply is then incomplete and the server closes the connection.
    """
    length = len(head) + len(body)
    raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    raw_headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw_headers})
    chunk = b"".join((head, body[:CHUNK_BYTES]))
    for start in range(CHUNK_BYTES, len(body), CHUNK_BYTES):
        message = {"type": "http.response.body", "body": chunk, "more_body": True}
        try:
            await asyncio.wait_for(send(message), chunk_timeout_seconds)
        except asyncio.TimeoutError as error:
            raise ClientDisconnected from error
        chunk = bytes(body[start : start + CHUNK_BYTES])
    release()
    await send({"type": "http.response.body", "body": chunk, "more_body": False})
