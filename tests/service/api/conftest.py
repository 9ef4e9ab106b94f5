"""A fake engine that doubles the hidden states, and an application over it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from moe_forward.api import create_app
from moe_forward.config import Config
from moe_forward.errors import ErrorCode
from moe_forward.metrics import Metrics
from moe_forward.slab import Slab
from moe_forward.types import (
    DType,
    EngineStatus,
    ForwardRequest,
    ForwardResult,
    GateSpec,
    ModelSpec,
    RankInfo,
    StepReport,
)

HIDDEN = 256
FORWARD = "/v1/moe/forward"
TOKEN = "correct horse"
RANKS = tuple(
    RankInfo(rank, "ready", 1000.0 + rank, 41 + rank, "node-a", f"cpu:{rank}", (rank * 8, rank * 8 + 8), 4096, 0.5)
    for rank in range(2)
)
READY = EngineStatus(ready=True, generation=3, reason="", ranks=RANKS, backend="gloo", kernel="reference")


class FakeLink:
    """Answers like the real link: output = 2 x hidden, computed from and into the slab's bytes.

    gate: while cleared, no request is answered. refusal: what requests are answered with instead of an output.
    """

    def __init__(self, slab_bytes: int) -> None:
        self.slab = Slab(slab_bytes)
        self.front = 0
        self.status = READY
        self.on_report: Callable[[StepReport], None] = lambda report: None
        self.on_status: Callable[[EngineStatus], None] = lambda status: None
        self.gate = threading.Event()
        self.gate.set()
        self.refusal: tuple[ErrorCode, str, float | None] | None = None
        self.crash = False
        self.requests: list[ForwardRequest] = []
        self.cancelled: list[int] = []
        self._tasks: dict[int, asyncio.Task[ForwardResult]] = {}

    @property
    def inflight(self) -> int:
        return len(self._tasks)

    def next_request(self) -> int:
        return len(self.requests) + 1

    def forward(self, request: ForwardRequest) -> asyncio.Future[ForwardResult]:
        self.requests.append(request)
        if self.crash:
            raise RuntimeError("a bug")
        answer: asyncio.Future[ForwardResult] = asyncio.get_running_loop().create_future()

        def answered(task: asyncio.Task[ForwardResult]) -> None:
            self._tasks.pop(request.request)
            if not answer.done():
                answer.set_result(task.result())

        task = self._tasks[request.request] = asyncio.ensure_future(self._compute(request))
        task.add_done_callback(answered)
        return answer

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)

    def release_when_done(self, request: int, callback: Callable[[], None]) -> None:
        if request in self._tasks:
            self._tasks[request].add_done_callback(lambda _: callback())
        else:
            callback()

    async def _compute(self, request: ForwardRequest) -> ForwardResult:
        while not self.gate.is_set():
            await asyncio.sleep(0.002)
        answer = ForwardResult(self.front, request.request, None, "", None, 0.001, 0.002, request.tokens + 7, 2)
        if self.refusal is not None:
            code, message, wait = self.refusal
            return answer._replace(code=code, message=message, retry_after_seconds=wait)
        kind = {DType.F16: np.float16, DType.F32: np.float32}
        count = request.tokens * HIDDEN
        raw = self.slab.view(request.hidden.offset, count * request.hidden.dtype.itemsize)
        doubled = (np.frombuffer(raw, kind[request.hidden.dtype]) * 2).astype(kind[request.output.dtype])
        self.slab.view(request.output.offset, doubled.nbytes)[:] = doubled.tobytes()
        return answer


class Front:
    """One application with everything around it. metric: value of a series, 0 where it has none."""

    def __init__(self, model_name: str = "tiny", **settings: Any) -> None:
        self.config = Config(**{"slab_bytes": 4 << 20, **settings})
        gate = GateSpec("deepseek_v3", num_groups=2, top_groups=1)
        self.spec = ModelSpec(model_name, HIDDEN, 128, 16, 4, 128, (1, 2, 3), 128, gate)
        self.link = FakeLink(self.config.slab_bytes)
        self.registry = CollectorRegistry()
        self.app: FastAPI = create_app(self.config, self.spec, self.link, Metrics(self.registry), TOKEN)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"moe_forward_{name}", labels) or 0.0

    def requests(self, code: int, route: str = "/v1/moe/forward") -> float:
        return self.metric("requests_total", model="tiny", route=route, code=str(code))

    def check_idle(self) -> None:
        """Nothing is in flight and every byte of the slab is free."""
        assert self.link.slab.taken_bytes == 0
        assert self.metric("inflight_requests", model="tiny") == 0
        assert self.app.state.availability.inflight == 0


async def drive(front: Front, messages: list[dict[str, Any]], **headers: str) -> tuple[int, bytes]:
    """Call the route as no HTTP library would; returns (status, body), status 0 where no reply came."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": FORWARD,
        "raw_path": FORWARD.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"layer=1",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await front.app(scope, receive, send)
    status = sent[0]["status"] if sent else 0
    return status, b"".join(message["body"] for message in sent[1:])


def tensor_body(**tensors: np.ndarray) -> bytes:
    """A safetensors file, written independently of the service."""
    names = {np.float32: "F32", np.float16: "F16", np.int64: "I64"}
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        kind = names[array.dtype.type]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read_output(body: bytes) -> np.ndarray:
    """The `output` tensor of a safetensors reply."""
    size = int.from_bytes(body[:8], "little")
    entry = json.loads(body[8 : 8 + size])["output"]
    kind = {"F32": np.float32, "F16": np.float16}[entry["dtype"]]
    start, end = entry["data_offsets"]
    output: np.ndarray = np.frombuffer(body[8 + size :][start:end], kind).reshape(entry["shape"])
    return output


class Kit:
    """Helpers that tests reach through one fixture."""

    content_type = "application/vnd.safetensors"
    headers = {"content-type": content_type}  # noqa: RUF012
    token = TOKEN
    hidden = HIDDEN
    ready = READY
    body = staticmethod(tensor_body)
    output = staticmethod(read_output)
    drive = staticmethod(drive)

    @staticmethod
    def states(tokens: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((tokens, HIDDEN)).astype(dtype)

    @staticmethod
    async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition did not come true"
            await asyncio.sleep(0.002)

    @staticmethod
    def wait(condition: Callable[[], bool], seconds: float = 5.0) -> None:
        asyncio.run(Kit.until(condition, seconds))


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def make_front() -> Callable[..., Front]:
    return Front


@pytest.fixture
def front() -> Front:
    return Front()


@pytest.fixture
async def client(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(front.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        yield client
