"""One HTTP connection: uvicorn's, with bounds on what a client may hold without a request, errors of one form, and
bodies of tensor calls that go past the parser (`moe_forward.api.direct`).

uvicorn with httptools has no limit of its own on the size of headers, on the time they take, on connections that send
nothing, nor on the rest of a refused body, and answers what is no HTTP in plain text.
"""

from __future__ import annotations

import asyncio
import http
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from moe_forward.api.buffers import Buffers
from moe_forward.api.direct import DirectBody, DirectPeer
from moe_forward.api.errors import render
from moe_forward.api.heads import Head, Heads
from moe_forward.api.peer import EXTENSION
from moe_forward.api.request_id import new_request_id
from moe_forward.errors import ErrorCode, ForwardError

log = logging.getLogger(__name__)

LINGER_SECONDS = 1.0
_OF_CONNECTION = frozenset(("server", "client", "scheme", "state", "extensions"))
"""Parts of a scope that a head says nothing of."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a client may take without a request being served.

    connections: open ones. header_bytes: request line and headers of a request.
    header_seconds: from the connection, or a further request's first byte, to the end of its headers.
    body_seconds: for the rest of a body that was answered before it had come.
    """

    connections: int
    header_bytes: int
    header_seconds: float
    body_seconds: float


class _Flow(FlowControl):
    """uvicorn's flow control, which does not read on while there is no room for what would come."""

    def __init__(self, transport: asyncio.Transport, has_room: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_room = has_room

    def resume_reading(self) -> None:
        """Read on, if there is room."""
        if self._has_room():
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """uvicorn's connection, held to `limits`.

    buffers: to read into. heads: parsed before. takes_body: see `server_settings`. Further arguments are uvicorn's.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        buffers: Buffers,
        heads: Heads,
        takes_body: Callable[[str], bool],
        *arguments: Any,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._buffers = buffers
        self._known_heads = heads
        self._takes_body = takes_body
        self._socket: int | None = None  # to write to past the loop; None under TLS
        self._peers: deque[DirectPeer | None] = deque()  # of the requests not yet answered, in order
        self._body: DirectBody | None = None  # being received
        self._awaits_body: tuple[DirectPeer, int] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parser_is_new = True
        self._in_head = True  # waiting for a request's headers, or receiving them
        self._head_started = False
        self._heads = self._messages = 0
        self._part_bytes = self._read_bytes = 0
        self._refusal: ForwardError | None = None  # why nothing more is read from this connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse one connection too many; start the clock of the first request's headers."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self._has_room)
        if transport.get_extra_info("sslcontext") is None:
            self._socket = transport.get_extra_info("socket").fileno()
            transport.set_write_buffer_limits(0)  # "paused" is "not all is sent", after which one may write past it
        if len(self.connections) <= self._limits.connections:
            self._allow(self._limits.header_seconds)
            return
        limit = f"expected at most {self._limits.connections} open connections (max_connections), got one more"
        self._refusal = ForwardError(ErrorCode.TOO_MANY_CONNECTIONS, limit)
        log.warning("a connection is refused: %s", limit)
        self._write(self._refusal)
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock; tell whoever waits for the client."""
        self._stop_clock()
        super().connection_lost(exc)
        for peer in self._peers:
            if peer is not None:
                peer.gone()

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        """Return where the next bytes belong."""
        if self._body is None:
            return self._buffers.current
        room = self._body.room()
        if room is None:
            raise RuntimeError("a connection was read from that has no room for a body yet")
        return room

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what came, unless it is part of a body that has its own way."""
        body = self._body
        if body is None:
            self._parse(nbytes)
            return
        body.got += nbytes
        if body.complete:
            self._body_came(body)
        elif body.room() is None:
            self.flow.pause_reading()

    def _has_room(self) -> bool:
        return self._body is None or self._body.room() is not None

    def _parse(self, end: int) -> None:
        """Parse the first `end` bytes of the current buffer, a request's headers apart from what follows them."""
        buffer = self._buffers.current
        data = memoryview(buffer)
        start = 0
        while start < end and self._refusal is None:
            mark = buffer.find(b"\r\n\r\n", start, end) if self._in_head else -1
            stop = end if mark < 0 else mark + 4
            if mark >= 0 and self._parser_is_new:
                self._take_head(bytes(data[start:stop]))
            else:
                self.data_received(data[start:stop])
            start = stop
            if self._awaits_body is not None:
                start = self._begin_body(buffer, start, end)

    def _take_head(self, text: bytes) -> None:
        """Begin the request of a whole head, which a parser would read from its start."""
        head = self._known_heads.find(text)
        if head is not None:
            self._begin_request(head)
            return
        self.data_received(text)
        if self._awaits_body is not None:
            peer, length = self._awaits_body
            cycle = self.cycle
            scope: dict[str, Any] = {name: value for name, value in self.scope.items() if name not in _OF_CONNECTION}
            known = Head(scope, length, cycle.keep_alive, cycle.waiting_for_100_continue, peer.notes)
            self._known_heads.keep(text, known)

    def _begin_request(self, head: Head) -> None:
        """Do what the server does when its parser has come to the end of a head."""
        self._unset_keepalive_if_required()
        self._stop_clock()
        self._in_head = False
        before = self.cycle
        scope: Any = head.scope.copy()
        scope["server"], scope["client"], scope["scheme"] = self.server, self.client, self.scheme
        scope["state"] = self.app_state.copy()
        cycle = self.cycle = RequestResponseCycle(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            head.expects_continue,
            head.keep_alive,
            self.on_response_complete,
        )
        self._passes_body(DirectPeer(self, cycle, head.notes), scope, head.body_bytes)
        self.scope = scope
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _passes_body(self, peer: DirectPeer, scope: Any, length: int) -> None:
        """Have the body of a request, if it has one, go to `peer` by itself."""
        self._peers.append(peer)
        scope["extensions"] = {EXTENSION: peer}
        if length:
            self._awaits_body = (peer, length)

    def _begin_body(self, buffer: bytearray, start: int, end: int) -> int:
        """Have the body of which [start, end) of `buffer` is the first part, and may be more, go past the parser.

        Returns: where what follows the body starts.
        """
        assert self._awaits_body is not None
        peer, length = self._awaits_body
        self._awaits_body = None
        body = self._body = DirectBody(length, self._buffers)
        peer.takes(body)
        if end - start > length:
            body.begin_with(bytes(memoryview(buffer)[start : start + length]))
        else:
            body.begin(start, end)
        if body.complete:
            self._body_came(body)
        elif body.room() is None:
            self.flow.pause_reading()
        return min(end, start + length)

    def _body_came(self, body: DirectBody) -> None:
        """Go on with the next request; the parser would go on with this one's body."""
        self._body = None
        if not self._parser_is_new:
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn makes it
            self._parser_is_new = True
        self.on_message_complete()
        body.came()

    def write_now(self, first: bytes, second: memoryview | bytes) -> int:
        """Write to the socket what it takes at once, without a copy; returns how many bytes of both that were."""
        if self._socket is None or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return 0
        try:
            return os.writev(self._socket, (first, second))
        except OSError:  # it is full, or broken: the loop finds out by itself
            return 0

    def data_received(self, data: bytes | memoryview) -> None:
        """Parse, and bound what comes before the end of a request's headers."""
        if self._refusal is not None:
            return
        heads, messages, unfinished = self._heads, self._messages, self._head_started
        self._parser_is_new = False
        super().data_received(data)  # type: ignore[arg-type]  # the parser takes either
        if self._in_head and self._timer is None and (self._head_started or self._messages == messages):
            self._allow(self._limits.header_seconds)
        # The parser tells of a header when it is complete. One that never is counts by the reads it takes; the read
        # in which a head begins or ends may hold other things.
        if unfinished and self._head_started and self._heads == heads and self._refusal is None:
            self._read_bytes += len(data)
            if self._read_bytes > self._limits.header_bytes:
                self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        """Begin to count a request's headers."""
        super().on_message_begin()
        self._heads += 1
        self._head_started = True
        self._part_bytes = self._read_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count a part of the request line."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, with what stands between and after name and value."""
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        """Stop the clock of the headers: from here on the request is served."""
        super().on_headers_complete()
        self._in_head = self._head_started = False
        self._stop_clock()
        if not self._takes_body(self.scope["path"]):
            self._peers.append(None)
            return
        self._passes_body(DirectPeer(self, self.cycle, {}), self.scope, _body_length(self.headers))

    def on_body(self, body: bytes) -> None:
        """Hand a part of a body over in uvicorn's way; the rest of it then goes the same way."""
        self._awaits_body = None
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request."""
        super().on_message_complete()
        self._messages += 1
        self._in_head = True
        self._stop_clock()

    def on_response_complete(self) -> None:
        """Bound the rest of a body whose request is answered already."""
        peer = self._peers.popleft()
        if peer is not None:
            peer.answered()
        super().on_response_complete()
        if not self._in_head and self.cycle.response_complete:
            self._allow(self._limits.body_seconds)

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused, or what was refused inside of it. msg: uvicorn's own sentence."""
        self._refuse(
            self._refusal or ForwardError(ErrorCode.MALFORMED_REQUEST, "the request: expected HTTP/1.1, got none")
        )

    def _count(self, nbytes: int) -> None:
        self._part_bytes += nbytes
        if self._part_bytes > self._limits.header_bytes:
            self._refusal = self._too_large()
            raise self._refusal  # the parser ends, and has `send_400_response` called

    def _too_large(self) -> ForwardError:
        limit = f"expected at most {self._limits.header_bytes} bytes (max_header_bytes), got more"
        return ForwardError(ErrorCode.HEADERS_TOO_LARGE, f"the request line and headers: {limit}")

    def _refuse(self, error: ForwardError) -> None:
        """Read no more; answer `error` where that cannot be taken for the reply to another request."""
        self._refusal = error
        self._stop_clock()
        cycle = self.cycle
        serving = cycle is not None and not cycle.response_complete
        if self._in_head and serving:
            cycle.keep_alive = False  # the last reply that is due closes the connection
        elif self._in_head:
            self._answer(error)
        elif serving and not cycle.response_started and not self.pipeline:  # its own body is what is broken
            self._answer(error)
            cycle.disconnected = True
            cycle.message_event.set()
        else:
            self.transport.close()

    def _answer(self, error: ForwardError) -> None:
        """Write `error`, and close when the client has had time to read it: what it still sends would reset it."""
        self._write(error)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _write(self, error: ForwardError) -> None:
        request = new_request_id()
        rendered = render(error, request)
        headers = [*rendered.headers, ("x-request-id", request), ("content-length", str(len(rendered.body)))]
        status = f"HTTP/1.1 {rendered.status} {http.HTTPStatus(rendered.status).phrase}"
        head = "\r\n".join([status, *(f"{name}: {value}" for name, value in headers), "", ""])
        self.transport.write(head.encode("latin-1") + rendered.body)

    def _allow(self, seconds: float) -> None:
        self._stop_clock()
        self._timer = self.loop.call_later(seconds, self._too_slow, seconds)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self, seconds: float) -> None:
        self._timer = None
        if self._in_head and self._head_started:
            sentence = f"the request line and headers: expected all of them within {seconds:g} s"
            self._refuse(ForwardError(ErrorCode.HEADER_TIMEOUT, sentence))
        elif self.cycle is None or self.cycle.response_complete:  # no request, or the rest of one that was answered
            self.transport.close()


def _body_length(headers: list[tuple[bytes, bytes]]) -> int:
    """Return the size of a body that is sent as it is, 0 for none or another way to send it.

    headers: as the parser took them, which refuses sizes that are no numbers or contradict each other.
    """
    length = 0
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name in (b"transfer-encoding", b"upgrade"):
            return 0
    return length
