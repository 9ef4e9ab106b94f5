from __future__ import annotations

import asyncio
from typing import Any

import pytest

from moe_forward.api.body import ClientDisconnected
from moe_forward.api.reply import CHUNK_BYTES, send_reply


class Sink:
    """Keeps what is sent; stops taking after `room` messages."""

    def __init__(self, room: int = 1000) -> None:
        self.messages: list[dict[str, Any]] = []
        self.released_at: int | None = None
        self._room = room

    async def send(self, message: Any) -> None:
        if len(self.messages) >= self._room:
            await asyncio.Event().wait()
        self.messages.append(message)

    def release(self) -> None:
        self.released_at = len(self.messages)


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 17])
async def test_reply_is_head_and_body_in_chunks_of_owned_bytes(nbytes: int) -> None:
    memory = bytearray(index % 251 for index in range(nbytes))
    expected = b"head" + bytes(memory)
    sink = Sink()
    await send_reply(sink.send, 200, [("x-a", "b")], b"head", memoryview(memory), sink.release, 1.0)
    memory[:] = bytes(nbytes)  # what the next request would do to the slab
    start, *parts = sink.messages
    assert (b"content-length", str(nbytes + 4).encode()) in start["headers"]
    assert (b"x-a", b"b") in start["headers"]
    assert b"".join(message["body"] for message in parts) == expected
    assert all(type(message["body"]) is bytes for message in parts)
    assert all(len(message["body"]) <= CHUNK_BYTES + 4 for message in parts)
    assert [message["more_body"] for message in parts] == [True] * (len(parts) - 1) + [False]


async def test_memory_is_released_before_the_last_chunk_and_after_all_others() -> None:
    sink = Sink()
    await send_reply(sink.send, 200, (), b"", memoryview(bytes(3 * CHUNK_BYTES)), sink.release, 1.0)
    assert sink.released_at == len(sink.messages) - 1 == 3


async def test_a_reader_that_stops_reading_is_given_up() -> None:
    sink = Sink(room=2)
    with pytest.raises(ClientDisconnected):
        await send_reply(sink.send, 200, (), b"", memoryview(bytes(4 * CHUNK_BYTES)), sink.release, 0.01)
    assert sink.released_at is None  # the caller releases
