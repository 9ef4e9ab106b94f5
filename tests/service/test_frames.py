"""Messages and rows over TCP: what is sent arrives, and what is no message ends the connection."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from moe_forward.datagrams import pack
from moe_forward.errors import ChannelClosed
from moe_forward.frames import MAX_FRAME_BYTES, FramedSocket, views, word_sum
from moe_forward.messages import Cancel, DetachSlab, Message, StepResult
from moe_forward.segments import Window


@pytest.fixture
def pair() -> Iterator[tuple[FramedSocket, socket.socket]]:
    """A connection over loopback: one end framed, the other raw."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        raw = socket.create_connection(listener.getsockname(), 20.0)
        sock, _ = listener.accept()
    framed = FramedSocket(sock)
    yield framed, raw
    framed.close()
    raw.close()


def frame(data: bytes) -> bytes:
    return struct.pack("<IQ", len(data), word_sum([memoryview(data)])) + data


def test_messages_and_rows_arrive_as_sent_and_in_order(pair: tuple[FramedSocket, socket.socket]) -> None:
    framed, raw = pair
    other = FramedSocket(raw)
    rows = [memoryview(bytes([n]) * size) for n, size in enumerate((1, 5_000_000, 0, 77))]
    sent: list[Message] = [Cancel(7), StepResult(1, 2, 3, (), 4, error="broken"), DetachSlab(0)]

    def send() -> None:
        other.send(sent[0], rows)
        for message in sent[1:]:
            other.send(message)

    sender = threading.Thread(target=send)
    sender.start()
    received = [framed.receive()]
    into = [memoryview(bytearray(len(part))) for part in rows]
    framed.receive_rows(into)
    received += [framed.receive(), framed.receive()]
    sender.join(20.0)
    assert received == sent
    assert into == rows


@pytest.mark.parametrize("nbytes", [0, MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_an_announced_length_out_of_bounds_ends_it(pair: tuple[FramedSocket, socket.socket], nbytes: int) -> None:
    framed, raw = pair
    raw.sendall(struct.pack("<IQ", nbytes, 0) + b"x" * 10)
    with pytest.raises(ChannelClosed, match=f"{nbytes} bytes was announced"):
        framed.receive()


@pytest.mark.parametrize("data", [b"\xff", b"\x03ab", b"\x09{}", b'\x09{"request": 1, "more": 2}', b"\x09\xff{"])
def test_what_is_no_message_ends_it(pair: tuple[FramedSocket, socket.socket], data: bytes) -> None:
    framed, raw = pair
    raw.sendall(frame(data))
    with pytest.raises(ChannelClosed, match="could not be read"):
        framed.receive()


@pytest.mark.parametrize("part", [0, 2, 12, 14])
def test_an_end_in_the_middle_of_a_message_is_an_end(pair: tuple[FramedSocket, socket.socket], part: int) -> None:
    framed, raw = pair
    data = pack(Cancel(7))
    raw.sendall(frame(data)[:part])
    raw.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed, match="gone"):
        framed.receive()


def test_a_flipped_bit_of_a_message_ends_it(pair: tuple[FramedSocket, socket.socket]) -> None:
    framed, raw = pair
    data = bytearray(frame(pack(Cancel(7))))
    data[-1] ^= 1
    raw.sendall(data)
    with pytest.raises(ChannelClosed, match="damaged"):
        framed.receive()


@pytest.mark.parametrize("place", [0, 1234, 5000, 5001, -9, -1])
def test_a_flipped_bit_of_rows_or_of_their_sum_ends_it(pair: tuple[FramedSocket, socket.socket], place: int) -> None:
    framed, raw = pair
    rows = [memoryview(bytes(range(250)) * 20), memoryview(b""), memoryview(b"seven b")]
    data = bytearray(b"".join(rows) + struct.pack("<Q", word_sum(rows)))
    into = [memoryview(bytearray(len(part))) for part in rows]
    raw.sendall(data)
    framed.receive_rows(into)
    assert into == rows
    data[place] ^= 0x40
    raw.sendall(data)
    with pytest.raises(ChannelClosed, match="damaged"):
        framed.receive_rows(into)


def test_an_end_in_the_middle_of_rows_is_an_end(pair: tuple[FramedSocket, socket.socket]) -> None:
    framed, raw = pair
    raw.sendall(b"x" * 99)
    raw.close()
    with pytest.raises(ChannelClosed, match="gone"):
        framed.receive_rows([memoryview(bytearray(100))])


def test_sending_to_who_is_gone_is_an_end(pair: tuple[FramedSocket, socket.socket]) -> None:
    framed, raw = pair
    raw.close()
    rows = [memoryview(bytes(64 << 20))]  # more than socket buffers hold
    with pytest.raises(ChannelClosed):
        framed.send(Cancel(1), rows)


def test_bytes_outside_of_a_memory_are_never_touched() -> None:
    memories = {3: memoryview(bytearray(100))}
    (whole,) = views(memories, [Window(3, 0, 100)])
    assert len(whole) == 100
    for outside in (Window(3, 1, 100), Window(3, 1 << 60, 1), Window(4, 0, 1)):
        with pytest.raises(ChannelClosed, match=rf"front end {outside.front}, which has"):
            views(memories, [outside])
