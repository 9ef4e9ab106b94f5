"""A scripted service on a real socket, a load against it, and event loops whose time only passes in them."""

from __future__ import annotations

import asyncio
import json
import selectors
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

import pytest
import safetensors.torch
import torch

from moe_forward.bench.report import Report
from moe_forward.bench.run import bench

T = TypeVar("T")
PLACEMENT = {"model": "tiny", "hidden_size": 8, "num_experts": 6, "top_k": 2, "layers": [3, 4]}


class Refusal(NamedTuple):
    """A reply without an output. code: None for a page that a proxy might send."""

    status: int
    code: str | None = None
    headers: str = ""

    def message(self) -> bytes:
        body = b"<h1>no</h1>" if self.code is None else json.dumps({"error": "x", "code": self.code}).encode()
        head = f"HTTP/1.1 {self.status} No\r\n{self.headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


@dataclass
class Script:
    """How the service behaves, and what it saw.

    refusals: answers in turn before outputs. always: the first of them for ever. delay_seconds: before each answer.
    reply: makes whole replies instead. tell: Server-Timing's value.
    """

    refusals: list[Refusal] = field(default_factory=list)
    always: bool = False
    placement: Any = field(default_factory=lambda: PLACEMENT)
    placement_status: int = 200
    delay_seconds: float = 0.002
    reply: Callable[[int], bytes] | None = None
    tell: str = "queue;dur=0.5, step;dur=1.25"
    url: str = ""
    paths: Counter[str] = field(default_factory=Counter)
    heads: list[str] = field(default_factory=list)
    bodies: dict[bytes, int] = field(default_factory=dict)
    inflight: int = 0
    most_inflight: int = 0
    forwards: int = 0
    connections: int = 0

    def queries(self, name: str) -> Counter[str]:
        """What forwards had as one parameter."""
        found: Counter[str] = Counter()
        for path, times in self.paths.items():
            for value in parse_qs(urlsplit(path).query).get(name, ["absent"]):
                found[value] += times
        return found

    def tensors(self) -> list[dict[str, torch.Tensor]]:
        return [safetensors.torch.load(body) for body in self.bodies]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(lines.get("content-length", "0")))
                method, path, _ = head.split(" ", 2)
                writer.write(self.placement_reply() if method == "GET" else await self.forward(path, head, body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.transport.abort()

    def placement_reply(self) -> bytes:
        body = json.dumps(self.placement).encode()
        head = f"HTTP/1.1 {self.placement_status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        return head.encode() + b"\r\n\r\n" + body

    async def forward(self, path: str, head: str, body: bytes) -> bytes:
        self.forwards += 1
        self.paths[path] += 1
        self.heads.append(head)
        self.bodies[body] = self.bodies.get(body, 0) + 1
        self.inflight += 1
        self.most_inflight = max(self.most_inflight, self.inflight)
        await asyncio.sleep(self.delay_seconds)
        self.inflight -= 1
        if self.refusals:
            return (self.refusals[0] if self.always else self.refusals.pop(0)).message()
        if self.reply is not None:
            return self.reply(self.forwards)
        return output(bytes(len(body)), self.tell)


def output(body: bytes, tell: str = "") -> bytes:
    """A reply that holds an output."""
    timing = f"Server-Timing: {tell}\r\n" if tell else ""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.safetensors\r\n{timing}Content-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@pytest.fixture
def service() -> Iterator[Script]:
    """A scripted service that listens on loopback."""
    script = Script()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    ended = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(script.serve, "127.0.0.1", 0, limit=1 << 20)
        script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await ended.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next turn

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10.0)
    yield script
    loop.call_soon_threadsafe(ended.set)
    thread.join(10.0)
    assert not thread.is_alive()


@pytest.fixture
def load(service: Script) -> Callable[..., Report]:
    """Load the scripted service for a moment."""

    def run(**options: Any) -> Report:
        settings: dict[str, Any] = {"tokens": [2], "concurrency": [3], "seconds": 0.15, "warmup_seconds": 0.0}
        return bench(service.url, **({"self_check": False} | settings | options))

    return run


@pytest.fixture
def refusal() -> type[Refusal]:
    return Refusal


@pytest.fixture
def as_output() -> Callable[..., bytes]:
    return output


class _Skip(selectors.SelectSelector):
    """Takes waiting as time that has passed."""

    skipped_seconds = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.skipped_seconds += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is that of its timers."""

    def __init__(self) -> None:
        self._skip = _Skip()
        super().__init__(self._skip)

    def time(self) -> float:
        return self._skip.skipped_seconds


class VirtualClock:
    """The clock of a virtual loop."""

    @staticmethod
    def now_ns() -> int:
        return round(asyncio.get_running_loop().time() * 1e9)

    async def sleep_until(self, moment_ns: int) -> None:
        await asyncio.sleep(max(0.0, (moment_ns - self.now_ns()) / 1e9))


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def virtually() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Run a coroutine in time that takes none."""

    def run(work: Coroutine[Any, Any, T]) -> T:
        loop = VirtualLoop()
        try:
            return loop.run_until_complete(work)
        finally:
            loop.close()

    return run
