"""One HTTP connection: bodies of tensor calls go past the parser (`moe_forward.api.direct`), and so do heads that came
before (`moe_forward.api.heads`).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from moe_forward.api.bounded import BoundedConnection, ConnectionLimits
from moe_forward.api.buffers import Buffers
from moe_forward.api.direct import DirectBody, DirectPeer
from moe_forward.api.heads import Head, Heads
from moe_forward.api.peer import EXTENSION

_OF_CONNECTION = frozenset(("server", "client", "scheme", "state", "extensions"))
"""Parts of a scope that a head says nothing of."""


class _Flow(FlowControl):
    """uvicorn's flow control, which does not read on while there is no room for what would come."""

    def __init__(self, transport: asyncio.Transport, has_room: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_room = has_room

    def resume_reading(self) -> None:
        """Read on, if there is room."""
        if self._has_room():
            super().resume_reading()


class Connection(BoundedConnection):
    """See the module.

    limits: see `BoundedConnection`. buffers: to read into. heads: parsed before. takes_body: see `server_settings`.
    Further arguments are uvicorn's.
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
        super().__init__(limits, *arguments, **options)
        self._buffers = buffers
        self._known_heads = heads
        self._takes_body = takes_body
        self._socket: int | None = None  # to write to past the loop; None under TLS
        self._peers: deque[DirectPeer | None] = deque()  # of the requests not yet answered, in order
        self._body: DirectBody | None = None  # being received
        self._awaits_body: tuple[DirectPeer, int] | None = None
        self._parser_is_new = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find out how to write past the loop."""
        super().connection_made(transport)
        if self._refusal is not None:
            return
        self.flow = _Flow(transport, self._has_room)
        if transport.get_extra_info("sslcontext") is None:
            self._socket = transport.get_extra_info("socket").fileno()
            transport.set_write_buffer_limits(0)  # "paused" is "not all is sent", after which one may write past it

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits for the client."""
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

    def data_received(self, data: bytes | memoryview) -> None:
        """Parse; where the parser stands is not a head's start any more."""
        self._parser_is_new = False
        super().data_received(data)

    def write_now(self, first: bytes, second: memoryview | bytes) -> int:
        """Write to the socket what it takes at once, without a copy; returns how many bytes of both that were."""
        if self._socket is None or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return 0
        try:
            return os.writev(self._socket, (first, second))
        except OSError:  # it is full, or broken: the loop finds out by itself
            return 0

    def on_headers_complete(self) -> None:
        """Have the body of a tensor call go past the parser."""
        super().on_headers_complete()
        if not self._takes_body(self.scope["path"]):
            self._peers.append(None)
            return
        self._passes_body(DirectPeer(self, self.cycle, {}), self.scope, _body_length(self.headers))

    def on_body(self, body: bytes) -> None:
        """Hand a part of a body over in uvicorn's way; the rest of it then goes the same way."""
        self._awaits_body = None
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Let go of the request."""
        peer = self._peers.popleft()
        if peer is not None:
            peer.answered()
        super().on_response_complete()


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
