"""A real server around the application, and HTTP as it goes over the wire."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import uvicorn

from moe_forward.api import server_settings


class Served:
    """A real uvicorn on a free port of 127.0.0.1, in a thread of its own."""

    def __init__(
        self,
        front: Any,
        wait: Callable[..., None],
        send_buffer_bytes: int | None = None,
        tls: ssl.SSLContext | None = None,
        loop: Literal["uvloop", "asyncio"] = "uvloop",
    ) -> None:
        self.front = front
        self._socket = socket.socket()
        if send_buffer_bytes is not None:  # accepted connections inherit it
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(1024)
        self.address = self._socket.getsockname()
        self.url = f"http{'' if tls is None else 's'}://127.0.0.1:{self.address[1]}"
        settings = server_settings(front.app, front.config, tls)
        settings.loop = loop
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        wait(lambda: self._server.started)

    def connect(self, receive_buffer_bytes: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.settimeout(10.0)
        connection.connect(self.address)
        return connection

    def close(self) -> None:
        self.front.link.gate.set()
        self._server.should_exit = True
        self._thread.join(10.0)
        assert not self._thread.is_alive()


@pytest.fixture
def serve(kit: Any) -> Iterator[Callable[..., Served]]:
    running: list[Served] = []

    def start(
        front: Any, send_buffer_bytes: int | None = None, tls: ssl.SSLContext | None = None, **how: Any
    ) -> Served:
        running.append(Served(front, kit.wait, send_buffer_bytes, tls, **how))
        return running[-1]

    yield start
    for served in running:
        served.close()


class Wire:
    """Requests and replies as bytes on a socket."""

    @staticmethod
    def request(body: bytes, length: int | None = None) -> bytes:
        """A request as it goes over the wire, the announced length being the body's or another."""
        lines = [
            "POST /v1/moe/forward?layer=1 HTTP/1.1",
            "Host: front",
            "Content-Type: application/vnd.safetensors",
            f"Content-Length: {len(body) if length is None else length}",
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    @staticmethod
    def reply(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
        """Read exactly one reply: (status, headers, body)."""
        data = b""
        while b"\r\n\r\n" not in data:
            received = connection.recv(65536)
            assert received, "closed before a reply"
            data += received
        head, _, body = data.partition(b"\r\n\r\n")
        status_line, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers["content-length"]):
            received = connection.recv(65536)
            assert received, "closed inside a reply"
            body += received
        return int(status_line.split()[1]), headers, body

    @staticmethod
    def closed(connection: socket.socket) -> bool:
        """Whether the server closes the connection."""
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def wire() -> type[Wire]:
    return Wire
