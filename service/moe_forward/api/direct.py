"""A request on a connection of ours: its body goes from the socket into the slab, its reply from there to the socket.

uvicorn hands a body over in four copies: out of the loop's buffer, out of the parser, into the request's buffer and out
of it. Here the socket is read into the memory that the route names, and only what came in the same read as the headers
is copied, once. A reply is written to the socket from where it lies, as far as the socket takes it at once; the rest is
copied first, since the loop keeps pointers to what it has yet to send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from moe_forward.api.body import ClientDisconnected, body_too_slow, receive_body
from moe_forward.api.buffers import Buffers
from moe_forward.api.peer import Headers
from moe_forward.api.reply import CHUNK_BYTES

PIECE_BYTES = 64 * 1024
"""Of a reply, copied whenever the socket is full and much is left; a rest of `CHUNK_BYTES` is copied at once, so that
its memory is free."""

if TYPE_CHECKING:
    from moe_forward.api.connections import Connection


class DirectBody:
    """A body that the parser does not see: its bytes wait in a kept buffer until they have a target.

    length: bytes of it. got: bytes that came. unwanted: the request ended without it, so bytes are thrown away.
    """

    __slots__ = ("_buffers", "_kept", "_start", "_target", "arrived", "got", "length", "unwanted")

    def __init__(self, length: int, buffers: Buffers) -> None:
        self.length = length
        self.got = 0
        self.unwanted = False
        self.arrived: asyncio.Future[None] | None = None
        self._buffers = buffers
        self._kept: bytearray | None = None
        self._start = 0
        self._target: memoryview | None = None

    @property
    def complete(self) -> bool:
        """Whether all of it came."""
        return self.got == self.length

    def begin(self, start: int, end: int) -> None:
        """Take what came with the headers: bytes [start, end) of the current buffer, which is kept for it."""
        if start < end:
            self._kept, self._start, self.got = self._buffers.keep(), start, end - start

    def begin_with(self, data: bytes) -> None:
        """Take what came with the headers, where other things came in the same read."""
        self._kept, self._start, self.got = bytearray(data), 0, len(data)

    def room(self) -> memoryview | None:
        """Return where the next bytes go, or None while there is no room for any."""
        if self.unwanted:
            return memoryview(self._buffers.current)[: self.length - self.got]
        if self._target is not None:
            return self._target[self.got :]
        if self._kept is None:
            return None
        end = self._start + self.got
        return memoryview(self._kept)[end : self._start + self.length] if end < len(self._kept) else None

    def came(self) -> None:
        """The last byte is here."""
        if self.arrived is not None and not self.arrived.done():
            self.arrived.set_result(None)

    def fails(self, error: Exception) -> None:
        """No more bytes come, or not in time."""
        if self.arrived is not None and not self.arrived.done():
            self.arrived.set_exception(error)

    def aim(self, target: memoryview) -> None:
        """Copy what waits to `target`, and have the rest put there."""
        if self._kept is not None:
            target[: self.got] = memoryview(self._kept)[self._start : self._start + self.got]
            self._let_go()
        self._target = target

    def turn_away(self) -> None:
        """Write nothing more to the target: it is about to be used for something else, or not needed."""
        self._target = None
        self.unwanted = True
        self._let_go()

    def _let_go(self) -> None:
        if self._kept is not None:
            self._buffers.give_back(self._kept)
            self._kept = None


class DirectPeer:
    """The client of one request on a `Connection`. body: None where the server's own way has it."""

    __slots__ = ("_body", "_connection", "_cycle", "_on_gone", "notes")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle, notes: dict[object, Any]) -> None:
        self.notes = notes
        self._connection = connection
        self._cycle = cycle
        self._body: DirectBody | None = None
        self._on_gone: Callable[[], None] | None = None

    def takes(self, body: DirectBody) -> None:
        """Have the body come this way."""
        self._body = body

    def answered(self) -> None:
        """The reply is written; what comes of the body is not wanted any more."""
        # The scope names the peer, the peer the cycle, and the cycle the scope: a ring that only the garbage collector
        # would find, which stops the process to look for it.
        self._cycle.scope.pop("extensions", None)
        if self._body is not None:
            self._body.turn_away()

    def gone(self) -> None:
        """The connection is lost."""
        self._cycle.disconnected = True  # the server says so only to the last of several requests
        if self._body is not None:
            self._body.fails(ClientDisconnected())
        if self._on_gone is not None:
            on_gone, self._on_gone = self._on_gone, None
            on_gone()

    async def receive_body(self, target: memoryview, timeout_seconds: float) -> None:
        """See `Peer`."""
        body, cycle = self._body, self._cycle
        if body is None:
            await receive_body(cycle.receive, target, timeout_seconds)  # type: ignore[arg-type]  # its own types
            return
        if cycle.disconnected:
            raise ClientDisconnected
        body.aim(target)
        try:
            if not body.complete:
                await self._arrival(body, timeout_seconds)
        finally:
            body.turn_away()

    async def _arrival(self, body: DirectBody, timeout_seconds: float) -> None:
        loop, cycle = self._connection.loop, self._cycle
        body.arrived = loop.create_future()
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            cycle.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        cycle.flow.resume_reading()
        timer = loop.call_later(
            timeout_seconds, lambda: body.fails(body_too_slow(body.length, timeout_seconds, body.got))
        )
        try:
            await body.arrived
        finally:
            timer.cancel()

    def watch(self, on_gone: Callable[[], None]) -> None:
        """See `Peer`."""
        if self._cycle.disconnected:
            on_gone()
        else:
            self._on_gone = on_gone
            self._cycle.flow.resume_reading()  # the end of a connection is something to read

    def unwatch(self) -> None:
        """See `Peer`."""
        self._on_gone = None

    async def send_reply(
        self,
        status: int,
        headers: Headers,
        head: bytes,
        body: memoryview | bytes,
        release: Callable[[], None],
        chunk_timeout_seconds: float,
    ) -> None:
        """See `Peer`."""
        cycle, transport = self._cycle, self._cycle.transport
        if cycle.flow.write_paused:
            await self._room(chunk_timeout_seconds)
        if cycle.disconnected:
            release()
            return
        first = self._head(status, headers, len(head) + len(body)) + head
        if cycle.scope["method"] == "HEAD":
            body = b""
        sent = self._connection.write_now(first, body)
        if sent < len(first):
            transport.write(first[sent:])
            sent = len(first)
        start = sent - len(first)
        while len(body) - start > CHUNK_BYTES:
            # The loop is given a piece to have it tell when the socket has room again.
            transport.write(bytes(body[start : start + PIECE_BYTES]))
            start += PIECE_BYTES
            await self._room(chunk_timeout_seconds)
            if cycle.disconnected:
                release()
                return
            start += self._connection.write_now(b"", body[start:])
        last = bytes(body[start:])
        release()
        if last:
            transport.write(last)
        self._complete()

    def _head(self, status: int, headers: Headers, length: int) -> bytes:
        cycle, closes = self._cycle, False
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        lines = ""
        for name, value in headers:
            lines += f"{name}: {value}\r\n"
            if name == "connection":  # nothing but close is ever said
                cycle.keep_alive, closes = False, True
        if not (cycle.keep_alive or closes):
            lines += "connection: close\r\n"
        return STATUS_LINE[status] + f"{lines}content-length: {length}\r\n\r\n".encode("latin-1")

    async def _room(self, timeout_seconds: float) -> None:
        """Wait until the socket has taken what was sent (under TLS: most of it)."""
        flow = self._cycle.flow
        if not flow.write_paused or self._cycle.disconnected:
            return
        try:
            await asyncio.wait_for(flow.drain(), timeout_seconds)
        except asyncio.TimeoutError as error:
            self._cycle.disconnected = True
            self._cycle.transport.abort()  # a close would wait for the client, too
            raise ClientDisconnected from error

    def _complete(self) -> None:
        """Note the reply as the server notes one that it sent itself."""
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
