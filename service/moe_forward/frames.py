"""Messages and rows between two hosts: over TCP, each message a frame, the rows it speaks of right behind it.

A frame is the message's length in 4 bytes and its sum in 8, little endian, and the datagram that
`moe_forward.datagrams` makes of it. How many bytes of rows follow, both ends know from the messages
(`moe_forward.segments`); they go from memory to memory without a copy in between, and their sum in 8 bytes behind them.
TCP's own sum has 16 bits, and a flipped bit of a row that passed it would be an answer. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_forward.datagrams import pack, read
from moe_forward.errors import ChannelClosed
from moe_forward.messages import Message
from moe_forward.segments import Window

MAX_FRAME_BYTES = 192 * 1024
"""Longest message; what is announced as longer is no message of ours."""

SILENCE_SECONDS = 5.0
"""A peer is gone whose kernel does not answer for so long: a cable, a switch, a host without power say no goodbye.

So is one that reads nothing for so long while more is sent to it than the sockets hold.
"""

_HEAD = struct.Struct("<IQ")
_SUM = struct.Struct("<Q")
_PROBE_SECONDS = 1


class FramedSocket:
    """A connection between hosts.

    sock: connected and trusted (`moe_forward.handshake`); it is ours from now on. silence_seconds: see
        `SILENCE_SECONDS`.
    """

    def __init__(self, sock: socket.socket, silence_seconds: float = SILENCE_SECONDS) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Idle, the kernel probes the peer every second; the user timeout bounds unanswered probes and unanswered data.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * silence_seconds))
        self._sock = sock
        self._buffer = bytearray(MAX_FRAME_BYTES)

    def send(self, message: Message, rows: Sequence[memoryview] = ()) -> None:
        """Send a message and the rows that follow it; raises ChannelClosed when the other end is gone."""
        data = pack(message)
        if len(data) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(data)} bytes exceeds {MAX_FRAME_BYTES}")
        parts = [memoryview(_HEAD.pack(len(data), word_sum([memoryview(data)])) + data), *rows]
        if any(rows):
            parts.append(memoryview(_SUM.pack(word_sum(rows))))
        try:
            for part in parts[:-1]:
                self._sock.sendall(part, socket.MSG_NOSIGNAL | socket.MSG_MORE)
            self._sock.sendall(parts[-1], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> Message:
        """Wait for the next message; `receive_rows` takes what follows it.

        Raises: ChannelClosed when the other end is gone, or what arrives is damaged or no message.
        """
        buffer = memoryview(self._buffer)
        self._fill(buffer[: _HEAD.size])
        nbytes, expected = _HEAD.unpack_from(buffer)
        if not 1 <= nbytes <= MAX_FRAME_BYTES:
            raise ChannelClosed(f"a message of {nbytes} bytes was announced, expected 1 to {MAX_FRAME_BYTES}")
        self._fill(buffer[:nbytes])
        if word_sum([buffer[:nbytes]]) != expected:
            raise ChannelClosed("a message was damaged on its way between hosts")
        return read(buffer[:nbytes])

    def receive_rows(self, rows: Sequence[memoryview]) -> None:
        """Fill `rows` with what follows a message.

        Raises: ChannelClosed when the other end is gone, or they were damaged.
        """
        for part in rows:
            self._fill(part)
        if any(rows):
            expected = bytearray(_SUM.size)
            self._fill(memoryview(expected))
            if _SUM.pack(word_sum(rows)) != expected:
                raise ChannelClosed("rows were damaged on their way between hosts")

    def hang_up(self) -> None:
        """End the connection, so that a thread that waits on it gets ChannelClosed; `close` is still to be called."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close our end."""
        self._sock.close()

    def _fill(self, part: memoryview) -> None:
        while part:
            try:
                nbytes = self._sock.recv_into(part)
            except OSError as error:  # also no route to the host, or no answer for too long
                raise ChannelClosed(str(error)) from error
            if nbytes == 0:
                raise ChannelClosed("the other end is gone")
            part = part[nbytes:]


def word_sum(parts: Iterable[memoryview]) -> int:
    """Return the sum of the parts' 64-bit words, modulo 2^64: every flipped bit shows, at the speed of memory."""
    total = 0
    for part in parts:
        whole = len(part) - len(part) % 8
        total += int(np.frombuffer(part[:whole], "<u8").sum(dtype=np.uint64)) + int.from_bytes(part[whole:], "little")
    return total % (1 << 64)


def views(memories: Mapping[int, memoryview], windows: Iterable[Window]) -> list[memoryview]:
    """Return the bytes that a peer speaks of. memories: front end -> its slab, or the mirror of it.

    Raises: ChannelClosed for bytes that are not there.
    """
    found = []
    for front, offset, nbytes in windows:
        memory = memories.get(front)
        if memory is None or offset + nbytes > len(memory):
            size = "no memory" if memory is None else f"{len(memory)} bytes"
            raise ChannelClosed(f"bytes [{offset}, {offset + nbytes}) of front end {front}, which has {size} here")
        found.append(memory[offset : offset + nbytes])
    return found
