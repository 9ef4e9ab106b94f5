"""HTTP/1.1 for the load alone: one connection, one request at a time, bytes that were prepared before.

A general client costs half a millisecond a request, more than a service may take. Here a request is two buffers
handed to the socket, a reply's head is parsed, and of a body whose length is known the bytes are only counted.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from typing import NamedTuple, cast

import httptools

from moe_forward.bench.target import Target
from moe_forward.client.replies import parse_retry_after

BUFFER_BYTES = 256 * 1024
IDLE_SECONDS = 4.0
"""A connection that rested longer is opened anew, before uvicorn's default of 5 seconds ends it under a request."""
MEDIA_TYPE = b"application/vnd.safetensors"


class Request(NamedTuple):
    """One request as bytes. reply_bytes: what the body of its reply has at least."""

    tokens: int
    head: bytes
    body: bytes
    reply_bytes: int


class Answer(NamedTuple):
    """What became of a request.

    status: HTTP, 0 where no reply came. code: slug of an error, empty for an output.
    ended_ns: when its last byte was here, on the monotonic clock. received_bytes: of the body.
    queue_ns, step_ns: what the server says in Server-Timing, None where it does not.
    retry_after_seconds: None where the server does not say.
    """

    status: int
    code: str
    ended_ns: int
    received_bytes: int = 0
    queue_ns: int | None = None
    step_ns: int | None = None
    retry_after_seconds: float | None = None


class Sender:
    """One caller's way to the service: a connection that is opened when there is something to send.

    trust: for https. buffer: what is received goes here; senders of one event loop may share it.
    timeout_seconds: for a whole request, connecting included.
    """

    def __init__(
        self, target: Target, trust: ssl.SSLContext | None, buffer: memoryview, timeout_seconds: float
    ) -> None:
        self._target = target
        self._trust = trust
        self._buffer = buffer
        self._timeout_seconds = timeout_seconds
        self._connection: _Connection | None = None
        self._used_seconds = 0.0

    async def ask(self, request: Request) -> Answer:
        """Send, and return what became of it; nothing is raised."""
        loop = asyncio.get_running_loop()
        until_seconds = loop.time() + self._timeout_seconds
        connection = self._connection
        if connection is None or connection.closed or loop.time() - self._used_seconds > IDLE_SECONDS:
            self.close()
            try:
                connection = self._connection = await self._connect(loop)
            except asyncio.TimeoutError:
                return _failed("timeout")
            except ssl.SSLError:
                return _failed("tls_failed")
            except OSError:
                return _failed("connect_failed")
        answer: Answer = await connection.ask(request, loop, until_seconds)
        self._used_seconds = loop.time()
        return answer

    def close(self) -> None:
        """Give the connection up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> _Connection:
        address = self._target.host, self._target.port
        connecting = loop.create_connection(lambda: _Connection(self._buffer), *address, ssl=self._trust)
        connection: _Connection
        _, connection = await asyncio.wait_for(connecting, self._timeout_seconds)
        return connection


class _Connection(asyncio.BufferedProtocol):
    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._expect(0)

    @property
    def closed(self) -> bool:
        return self._transport is None

    async def ask(self, request: Request, loop: asyncio.AbstractEventLoop, until_seconds: float) -> Answer:
        assert self._transport is not None
        self._expect(request.reply_bytes)
        waiting: asyncio.Future[Answer] = loop.create_future()
        self._waiting = waiting
        timer = loop.call_at(until_seconds, self._fail, "timeout")
        self._transport.writelines((request.head, request.body))
        try:
            return await waiting
        finally:
            timer.cancel()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def _expect(self, reply_bytes: int) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._reply_bytes = reply_bytes
        self._status = self._received = 0
        self._length: int | None = None  # of the body of an output, whose bytes are only counted
        self._counting = self._keep_alive = False
        self._headers: dict[bytes, bytes] = {}
        self._error_body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail("tls_failed" if isinstance(error, ssl.SSLError) else "connection_lost")

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._waiting is None or self._waiting.done():
            self.close()  # bytes that nobody asked for: what follows on this connection could not be told from them
            return
        if self._counting:
            self._received += nbytes
        else:
            try:
                self._parser.feed_data(self._buffer[:nbytes])
            except httptools.HttpParserError:
                self._fail("bad_reply")
                return
        if self._counting and self._length is not None and self._received >= self._length:
            self._finish()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._keep_alive = self._parser.should_keep_alive()
        length = self._headers.get(b"content-length")
        if self._status == 200 and length is not None:
            self._length = int(length)
            self._counting = True

    def on_body(self, data: bytes) -> None:
        self._received += len(data)
        if self._status != 200:
            self._error_body.append(data)

    def on_message_complete(self) -> None:
        if not self._counting:
            self._finish()

    def _finish(self) -> None:
        ended_ns = time.monotonic_ns()
        transport = self._transport
        # A reply before the end of the request leaves the rest of it on the connection.
        if transport is not None and (not self._keep_alive or transport.get_write_buffer_size()):
            self.close()
        queue_ns, step_ns = server_timing(self._headers.get(b"server-timing", b""))
        wait = self._headers.get(b"retry-after")
        retry_after = None if wait is None else parse_retry_after(wait.decode("latin-1"))
        self._resolve(Answer(self._status, self._code(), ended_ns, self._received, queue_ns, step_ns, retry_after))

    def _code(self) -> str:
        if self._status == 200:
            whole = self._received >= self._reply_bytes and self._received == (self._length or self._received)
            return "" if whole and self._headers.get(b"content-type", b"").startswith(MEDIA_TYPE) else "bad_reply"
        try:
            code = json.loads(b"".join(self._error_body))["code"]
        except (ValueError, KeyError, TypeError):
            code = None  # a proxy in between answers with a page of its own
        return code if isinstance(code, str) and code else f"http_{self._status}"

    def _fail(self, code: str) -> None:
        self.close()
        self._resolve(_failed(code, self._received))

    def _resolve(self, answer: Answer) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)


def _failed(code: str, received_bytes: int = 0) -> Answer:
    return Answer(0, code, time.monotonic_ns(), received_bytes)


def server_timing(value: bytes) -> tuple[int | None, int | None]:
    """Read the durations `queue` and `step` in nanoseconds; None for one that is not there.

    value: of a Server-Timing header, whose durations are milliseconds (https://www.w3.org/TR/server-timing).
    """
    found: dict[bytes, int] = {}
    for metric in value.split(b","):
        name, *parameters = metric.split(b";")
        for parameter in parameters:
            key, _, text = parameter.partition(b"=")
            if key.strip().lower() == b"dur":
                try:
                    found[name.strip()] = round(float(text) * 1e6)
                except ValueError:
                    continue  # a proxy's entry of some other form tells nothing about queue and step
    return found.get(b"queue"), found.get(b"step")
