"""Signals between front ends, engine and ranks: one datagram a message over AF_UNIX SOCK_SEQPACKET.

SEQPACKET keeps message boundaries, carries a slab's descriptor (SCM_RIGHTS) and tells within milliseconds when the
process at the other end is gone. Bytes of tensors never travel here; `moe_forward.datagrams` says what a datagram
holds.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from moe_forward.datagrams import DECODERS, Decoders, pack, pack_together, read
from moe_forward.errors import ChannelClosed
from moe_forward.messages import Message, Several

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 192 * 1024
"""Longest datagram: below the kernel's default socket buffer limit (net.core.wmem_max, 208 KiB)."""

# As plain numbers: `socket` has them as enums, whose `|` and `&` took 4 us of each message.
_CUT_OFF = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_NO_SIGNAL = int(socket.MSG_NOSIGNAL)
_ONE_FD_SPACE = socket.CMSG_SPACE(4)
_PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def listen(path: Path) -> socket.socket:
    """Bind a listening socket at `path`, replacing what a dead process left there."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(1024)
    return listener


def connect(path: Path) -> socket.socket:
    """Connect to the engine at `path`; raises OSError when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def same_user(sock: socket.socket) -> bool:
    """Tell whether the process at the other end runs as our own user."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return bool(_PEER_CREDENTIALS.unpack(raw)[1] == os.getuid())


class _Receiver:
    """Reads datagrams into one buffer, with the descriptors they carry."""

    def __init__(self, sock: socket.socket, decoders: Decoders = DECODERS) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE_BYTES)
        self._sock = sock
        self._decoders = decoders
        self._buffer = memoryview(bytearray(MAX_MESSAGE_BYTES))

    def receive(self) -> tuple[Message, list[int]]:
        """Return the next message and its descriptors (the caller closes them); raises ChannelClosed at the end."""
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into([self._buffer], _ONE_FD_SPACE, _CLOSE_ON_EXEC)
        except ConnectionError as error:
            raise ChannelClosed(str(error)) from error
        fds = _descriptors(ancillary) if ancillary else []
        try:
            if size == 0:
                raise ChannelClosed("the other end is gone")
            if flags & _CUT_OFF:
                raise ChannelClosed("a message was longer than the limit")
            return read(self._buffer[:size], self._decoders), fds
        except ChannelClosed:
            for fd in fds:
                os.close(fd)
            raise


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _send(sock: socket.socket, data: bytes, fd: int | None) -> None:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    if fd is None:
        sock.send(data, _NO_SIGNAL)
    else:
        socket.send_fds(sock, [data], [fd], _NO_SIGNAL)


class BlockingChannel:
    """A channel for a loop that does one thing at a time (a rank). Another thread may send too: datagrams are whole."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._receiver = _Receiver(sock)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    def ready(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        return bool(self._readable.poll(0))

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for the next message and its descriptors; raises ChannelClosed when the other end is gone."""
        return self._receiver.receive()

    def send(self, message: Message) -> None:
        """Send one message; raises ChannelClosed when the other end is gone."""
        try:
            _send(self._sock, pack(message), None)
        except ConnectionError as error:
            raise ChannelClosed(str(error)) from error

    def hang_up(self) -> None:
        """End the connection, so that a thread that waits on it gets ChannelClosed; `close` is still to be called."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on several channels."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close our end."""
        self._sock.close()


class AsyncChannel:
    """A channel on an asyncio loop (front end, engine): never blocks, keeps order, calls back.

    on_message: called with each message and the descriptors it carried (the callee closes them).
    on_close: called once when the other end is gone; not after `close`.
    on_rest: called after the messages of each datagram; tells whether to look for another at once, before other
        channels have their turn. decoders: how to read them.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[AsyncChannel, Message, list[int]], None],
        on_close: Callable[[AsyncChannel], None],
        on_rest: Callable[[], bool] = lambda: True,
        decoders: Decoders = DECODERS,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._receiver = _Receiver(sock, decoders)
        self._on_message = on_message
        self._on_close = on_close
        self._on_rest = on_rest
        self._posted: list[Message] = []
        self._pending: deque[tuple[bytes, int | None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message, fd: int | None = None) -> None:
        """Send one message, or queue it while the socket is full; silently dropped once the other end is gone.

        fd: a descriptor to pass along; a copy is kept until it is sent, so the caller may close its own.
        """
        self.send_packed(pack(message), fd)

    def send_packed(self, data: bytes, fd: int | None = None) -> None:
        """Send a message that was packed once for several peers, as `send` does."""
        if self._posted:
            self._send_posted()
        if self._closed:
            return
        if not self._pending:
            try:
                _send(self._sock, data, fd)
                return
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._writable)
            except ConnectionError:
                return  # the reader sees the end next and calls on_close
        self._pending.append((data, None if fd is None else os.dup(fd)))

    def send_all(self, messages: Iterable[Message]) -> None:
        """Send messages together, in order, as `send` would one by one."""
        for data in pack_together(messages, MAX_MESSAGE_BYTES):
            self.send_packed(data)

    def post(self, message: Message) -> None:
        """Send one message together with those that are posted in the same turn of the loop."""
        if not self._posted:
            self._loop.call_soon(self._send_posted)
        self._posted.append(message)

    def _send_posted(self) -> None:
        posted, self._posted = self._posted, []
        self.send_all(posted)

    def close(self) -> None:
        """Close our end and forget what is queued."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        for _, fd in self._pending:
            if fd is not None:
                os.close(fd)
        self._pending.clear()
        self._sock.close()

    def _readable(self) -> None:
        left = 64  # then let other sockets have their turn
        while left and self._take_datagram() and not self._closed:
            left -= 1

    def _take_datagram(self) -> bool:
        """Pass the messages of the next datagram on; whether to look for another at once.

        To find none costs a system call and an exception. Where another waits, the loop calls again in its next turn.
        """
        try:
            message, fds = self._receiver.receive()
        except BlockingIOError:
            return False
        except ChannelClosed as error:
            log.info("a channel ended: %s", error)
            self.close()
            self._on_close(self)
            return False
        if type(message) is Several:
            for one in message.messages:
                self._on_message(self, one, fds)
                fds = []
        else:
            self._on_message(self, message, fds)
        return self._on_rest()

    def _writable(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self._pending:
                data, fd = self._pending[0]
                _send(self._sock, data, fd)
                self._pending.popleft()
                if fd is not None:
                    os.close(fd)
            self._loop.remove_writer(self._sock)
