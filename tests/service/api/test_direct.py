from __future__ import annotations

from moe_forward.api.buffers import BUFFER_BYTES, Buffers
from moe_forward.api.direct import DirectBody


def arrive(room: memoryview, data: bytes) -> int:
    """What an event loop does: write into the room there is."""
    count = min(len(room), len(data))
    room[:count] = data[:count]
    return count


def test_what_came_with_the_headers_is_followed_by_what_goes_to_the_target() -> None:
    buffers = Buffers()
    buffers.current[:9] = b"head:abcd"
    body = DirectBody(10, buffers)
    body.begin(5, 9)
    target = memoryview(bytearray(10))
    body.aim(target)
    room = body.room()
    assert room is not None
    assert len(room) == 6  # never more than the body: what follows it is another request
    body.got += arrive(room, b"efghijkl")
    assert body.complete
    assert bytes(target) == b"abcdefghij"


def test_a_body_without_a_target_has_room_for_a_buffer_only() -> None:
    buffers = Buffers()
    body = DirectBody(1 << 30, buffers)
    assert body.room() is None
    body.begin(BUFFER_BYTES - 2, BUFFER_BYTES - 1)
    room = body.room()
    assert room is not None
    body.got += arrive(room, b"xyz")
    assert body.got == 2
    assert body.room() is None


def test_a_target_is_out_of_reach_once_it_is_turned_away_from() -> None:
    buffers = Buffers()
    body = DirectBody(100, buffers)
    target = memoryview(bytearray(100))
    body.aim(target)
    body.turn_away()
    room = body.room()
    assert room is not None
    arrive(room, b"x" * 100)
    assert bytes(target) == bytes(100)


def test_buffers_that_waited_are_used_again() -> None:
    buffers = Buffers()
    first = buffers.current
    body = DirectBody(4, buffers)
    body.begin(0, 4)
    assert buffers.current is not first
    body.aim(memoryview(bytearray(4)))
    buffers.keep()
    assert buffers.current is first
