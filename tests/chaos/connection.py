"""A client's connection: HTTP/1.1 as bytes, so that a test knows how far a request came."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

MAX_HEAD_BYTES = 1 << 16
CROSSED_SECONDS = 0.02
"""A kept connection that ends so soon after a request was sent, without a byte of a reply, was closed while that was on
its way: either side may close a connection that rests, and HTTP clients send such a request again (RFC 9112, 9.3.1)."""


class Unconnected(Exception):
    """Nobody took the connection, or a kept one was closed before the request came: it cannot have been received."""


class Cut(Exception):
    """The connection ended before the reply did."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """One connection to host:port, made when it is needed and kept while the service keeps it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, head: bytes, body: bytes = b"") -> Reply:
        """Send a request and return its reply. head: with the empty line behind.

        Raises: Unconnected; Cut.
        """
        kept = self._streams
        reader, writer = await self._connected()
        sent = time.monotonic()
        try:
            writer.write(head)
            writer.write(body)
            reply = await _reply(reader)
        except (
            ConnectionError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            TimeoutError,
            OSError,
        ) as error:
            self.close()
            crossed = kept == (reader, writer) and time.monotonic() - sent < CROSSED_SECONDS
            if crossed and not getattr(error, "partial", b""):
                raise Unconnected("the kept connection was closed") from error
            raise Cut(f"{type(error).__name__}: {error}") from error
        except BaseException:  # given up in the middle: what follows on it cannot be told from the rest of this reply
            self.close()
            raise
        if reply.headers.get("connection", "").lower() == "close":
            self.close()
        return reply

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the socket with it
                self._streams[1].transport.abort()
        self._streams = None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and (self._streams[0].at_eof() or self._streams[1].is_closing()):
            self.close()  # the service closed it while it rested
        if self._streams is None:
            try:
                self._streams = await asyncio.open_connection(*self._address, limit=MAX_HEAD_BYTES)
            except OSError as error:
                raise Unconnected(str(error)) from error
        return self._streams


def post_head(path: str, headers: Mapping[str, str], length: int) -> bytes:
    """Return the head of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: chaos", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def get_head(path: str) -> bytes:
    """Return the head of a GET."""
    return f"GET {path} HTTP/1.1\r\nHost: chaos\r\n\r\n".encode()


async def _reply(reader: asyncio.StreamReader) -> Reply:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:-2]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    body = await reader.readexactly(int(headers["content-length"]))
    return Reply(int(head[0].split(" ")[1]), headers, body)
