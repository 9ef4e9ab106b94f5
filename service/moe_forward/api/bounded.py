"""What a client may hold of a connection without a request being served: uvicorn's, with limits.

uvicorn with httptools has no limit of its own on the size of headers, on the time they take, on connections that send
nothing, nor on the rest of a refused body, and answers what is no HTTP in plain text.
"""

from __future__ import annotations

import asyncio
import http
import logging
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moe_forward.api.errors import render
from moe_forward.api.request_id import new_request_id
from moe_forward.errors import ErrorCode, ForwardError

log = logging.getLogger(__name__)

LINGER_SECONDS = 1.0


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


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, held to `limits`, with errors of one form. Further arguments are uvicorn's."""

    def __init__(self, limits: ConnectionLimits, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True  # waiting for a request's headers, or receiving them
        self._head_started = False
        self._heads = self._messages = 0
        self._part_bytes = self._read_bytes = 0
        self._refusal: ForwardError | None = None  # why nothing more is read from this connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse one connection too many; start the clock of the first request's headers."""
        super().connection_made(transport)
        if len(self.connections) <= self._limits.connections:
            self._allow(self._limits.header_seconds)
            return
        limit = f"expected at most {self._limits.connections} open connections (max_connections), got one more"
        self._refusal = ForwardError(ErrorCode.TOO_MANY_CONNECTIONS, limit)
        log.warning("a connection is refused: %s", limit)
        self._write(self._refusal)
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes | memoryview) -> None:
        """Parse, and bound what comes before the end of a request's headers."""
        if self._refusal is not None:
            return
        heads, messages, unfinished = self._heads, self._messages, self._head_started
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

    def on_message_complete(self) -> None:
        """Wait for the next request."""
        super().on_message_complete()
        self._messages += 1
        self._in_head = True
        self._stop_clock()

    def on_response_complete(self) -> None:
        """Bound the rest of a body whose request is answered already."""
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
