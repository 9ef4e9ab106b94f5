"""Both clients behind one call, a scripted transport, and a small real server on the loopback."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from moe_forward.client import AsyncClient, Client

Handler = Callable[[httpx.Request], httpx.Response]


class Runner:
    """Runs `use(client)` with one kind of client, over a handler or against a URL."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, target: Handler | str, use: Callable[[Any], Any], **options: Any) -> Any:
        if not isinstance(target, str):
            options["transport"] = httpx.MockTransport(target)
        url = target if isinstance(target, str) else "http://moe.test"
        if self.kind == "blocking":
            with Client(url, **options) as client:
                return use(client)

        async def main() -> Any:
            async with AsyncClient(url, **options) as client:
                return await use(client)

        return asyncio.run(main())


@pytest.fixture(params=["blocking", "asyncio"])
def run(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


class Script:
    """A transport handler that gives scripted answers in turn, the last one for ever, and keeps the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append(request)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def hidden() -> np.ndarray[Any, Any]:
    return np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def output_reply(hidden: np.ndarray[Any, Any]) -> httpx.Response:
    """The right answer to a forward of `hidden`: twice its values."""
    return httpx.Response(200, headers={"content-type": "application/vnd.safetensors"}, content=save_output(hidden * 2))


def save_output(output: np.ndarray[Any, Any]) -> bytes:
    return save({"output": output})


@pytest.fixture
def refusal() -> Callable[..., httpx.Response]:
    def build(status: int, code: str, sentence: str, **headers: str) -> httpx.Response:
        body = json.dumps({"error": sentence, "code": code, "request_id": "r-1"})
        return httpx.Response(status, headers={"content-type": "application/json", **headers}, content=body.encode())

    return build


class Server(ThreadingHTTPServer):
    """Answers each POST by the next of `behaviours` (the last one for ever) and counts connections and requests."""

    daemon_threads = True

    def __init__(self, behaviours: list[Callable[[BaseHTTPRequestHandler], None]]) -> None:
        super().__init__(("127.0.0.1", 0), _ServerHandler)
        self.behaviours = behaviours
        self.connections = 0
        self.served = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _ServerHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        behaviour = self.server.behaviours[min(self.server.served, len(self.server.behaviours) - 1)]
        self.server.served += 1
        behaviour(self)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(*behaviours: Callable[[BaseHTTPRequestHandler], None]) -> Server:
        server = Server(list(behaviours))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()
