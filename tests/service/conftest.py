"""An engine with fake ranks: what the tests of engine and link share. Ranks are threads that double each row."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moe_forward.batcher import BatchLimits
from moe_forward.channel import BlockingChannel, connect, listen
from moe_forward.engine import run_engine
from moe_forward.errors import ChannelClosed
from moe_forward.link import EngineLink
from moe_forward.messages import Announce, AttachSlab, DetachSlab, Heartbeat, RankHello
from moe_forward.remote_channel import RemoteChannel
from moe_forward.slab import Extent, Slab, map_slab
from moe_forward.types import (
    PHASES,
    DType,
    EngineStatus,
    ForwardRequest,
    ForwardResult,
    RankInfo,
    Routing,
    Step,
    StepReport,
    StepResult,
    TensorRef,
    token_range,
)

HANG_SECONDS = 20.0  # a guard against tests that never end, not a measurement
COLUMNS = 8
ROW_BYTES = 4 * COLUMNS

OnStep = Callable[["FakeRank", Step], StepResult | None]
"""What a fake rank does in a step instead of its work; None: it says nothing."""


class FakeRank:
    """A rank of its own thread: output = 2 * hidden.

    on_step: see `OnStep`; None does the work and answers. steps: what it was sent. slabs: what it has mapped.
    """

    def __init__(self, path: Path, rank: int, ranks: int, generation: int, on_step: OnStep | None = None) -> None:
        self.rank, self.ranks, self.generation = rank, ranks, generation
        self.steps: list[Step] = []
        self.slabs: dict[int, mmap.mmap] = {}
        self.detached: list[int] = []
        self.hung_up = threading.Event()
        self._on_step = on_step
        self._channel = self._call_engine(path)
        with contextlib.suppress(ChannelClosed):  # an engine that hung up is seen by the thread
            info = RankInfo(rank, "ready", 0.0, pid=1, node="n", device="cpu", experts=(0, 1))
            self._channel.send(RankHello(generation, info, "fake exchange", "fake experts"))  # before any `beat`
        self._thread = threading.Thread(target=self._run, name=f"rank {rank} of generation {generation}")
        self._thread.start()

    def kill(self) -> None:
        """Die: the engine sees the end of the socket."""
        self._channel.hang_up()

    def join(self) -> None:
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive(), "a fake rank does not end"
        self._channel.close()

    def work(self, step: Step) -> StepResult:
        """Double this rank's rows and return what a rank says of it."""
        mine = token_range(self.rank, self.ranks, step.tokens)
        start = 0
        for request in step.requests:
            first, last = max(mine.start - start, 0), min(mine.stop - start, request.tokens)
            if first < last:
                source, target = (
                    np.frombuffer(
                        self.slabs[request.front], np.float32, (last - first) * COLUMNS, ref.offset + first * ROW_BYTES
                    )
                    for ref in (request.hidden, request.output)
                )
                target[:] = 2 * source
            start += request.tokens
        return self.result(step)

    def result(self, step: Step, non_finite: tuple[int, ...] = (), error: str = "") -> StepResult:
        seconds = (0.001,) * len(PHASES)
        return StepResult(step.step, step.generation, self.rank, seconds, 7, 0, non_finite, error)

    def has_more(self) -> bool:
        """Whether the engine has sent something that waits behind the step it does."""
        return self._channel.ready()

    def say(self, result: StepResult) -> None:
        self._channel.send(result)

    def beat(self) -> None:
        """Give a sign of life."""
        self._channel.send(Heartbeat(self.generation, self.rank))

    def _call_engine(self, path: Path) -> BlockingChannel | RemoteChannel:
        return BlockingChannel(connect(path))

    def _run(self) -> None:
        with contextlib.suppress(ChannelClosed):
            while True:
                message, fds = self._channel.receive()
                if isinstance(message, AttachSlab):
                    self.slabs[message.front] = map_slab(fds[0], message.slab_bytes)
                elif isinstance(message, DetachSlab):
                    del self.slabs[message.front]
                    self.detached.append(message.front)
                elif isinstance(message, Step):
                    self.steps.append(message)
                    result = self.work(message) if self._on_step is None else self._on_step(self, message)
                    if result is not None:
                        self._channel.send(result)
                for fd in fds:
                    os.close(fd)
        self.hung_up.set()


class Front:
    """A front end: a slab, a link, and requests whose rows say who they are."""

    def __init__(self, path: Path, silence_seconds: float | None = None) -> None:
        self.slab = Slab(1 << 20)
        self.link = EngineLink(path, self.slab, silence_seconds=silence_seconds)
        self.reports: list[StepReport] = []
        self.statuses: list[EngineStatus] = []
        self._changed = asyncio.Event()
        self.link.on_report = self._on_report
        self.link.on_status = self._on_status
        self._rng = np.random.default_rng(0)

    def request(
        self, tokens: int = 2, layer: int = 3, timeout_seconds: float = 30.0, client: int = 0
    ) -> ForwardRequest:
        """Fill a new extent with random rows and describe it; the output follows the input."""
        extent = self.slab.allocate(2 * tokens * ROW_BYTES)
        assert extent is not None
        hidden = TensorRef(extent.offset, DType.F32, COLUMNS)
        output = TensorRef(extent.offset + tokens * ROW_BYTES, DType.F32, COLUMNS)
        number = self.link.next_request()
        deadline = time.monotonic() + timeout_seconds
        request = ForwardRequest(
            0, number, layer, tokens, deadline, True, hidden, None, Routing.SERVER, None, None, output, client
        )
        self.rows(request, hidden)[:] = self._rng.standard_normal((tokens, COLUMNS), np.float32)
        self.rows(request, output)[:] = np.nan
        return request

    def rows(self, request: ForwardRequest, ref: TensorRef) -> npt.NDArray[np.float32]:
        view = self.slab.view(ref.offset, request.tokens * ROW_BYTES)
        return np.frombuffer(view, np.float32).reshape(request.tokens, COLUMNS)

    def is_doubled(self, request: ForwardRequest) -> bool:
        return bool((self.rows(request, request.output) == 2 * self.rows(request, request.hidden)).all())

    def free_when_done(self, request: ForwardRequest) -> None:
        extent = Extent(request.hidden.offset, 2 * request.tokens * ROW_BYTES)
        self.link.release_when_done(request.request, lambda: self.slab.free(extent))

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        try:
            return await asyncio.wait_for(self.link.forward(request), HANG_SECONDS)
        except asyncio.CancelledError:
            self.link.cancel(request.request)
            raise

    def send(self, request: ForwardRequest) -> asyncio.Task[ForwardResult]:
        return asyncio.create_task(self.forward(request))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at again whenever the engine says something."""

        async def wait() -> None:
            while not condition():
                self._changed.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.01)

        await asyncio.wait_for(wait(), HANG_SECONDS)

    async def until_ready(self, generation: int) -> None:
        await self.until(lambda: self.link.status.ready and self.link.status.generation == generation)

    def _on_report(self, report: StepReport) -> None:
        self.reports.append(report)
        self._changed.set()

    def _on_status(self, status: EngineStatus) -> None:
        self.statuses.append(status)
        self._changed.set()


class Pool:
    """An engine in this loop, its front ends and its fake ranks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "engine.sock"
        self.limits = BatchLimits(64, 16, 0.0, 8, 1000)
        self.step_timeout_seconds = 60.0
        self.silence_seconds: float | None = None
        self.ranks: list[FakeRank] = []
        self.fronts: list[Front] = []
        self._engine: asyncio.Task[None] | None = None

    def start_engine(self) -> None:
        serving = run_engine(listen(self.path), self.limits, self.step_timeout_seconds, self.silence_seconds)
        self._engine = asyncio.create_task(serving)

    async def stop_engine(self) -> None:
        if self._engine is not None:
            self._engine.cancel()
            await asyncio.gather(self._engine, return_exceptions=True)
            self._engine = None

    async def add_front(self, silence_seconds: float | None = None) -> Front:
        front = Front(self.path, silence_seconds)
        self.fronts.append(front)
        seen = len(front.statuses)
        front.link.start()
        await front.until(lambda: len(front.statuses) > seen)
        return front

    def add_rank(self, rank: int, ranks: int, generation: int = 1, on_step: OnStep | None = None) -> FakeRank:
        self.ranks.append(FakeRank(self.path, rank, ranks, generation, on_step))
        return self.ranks[-1]

    async def start(self, *on_step: OnStep | None) -> Front:
        """Start an engine, a front end and a ready group of one rank for each of `on_step`."""
        self.start_engine()
        front = await self.add_front()
        await self.add_group(front, 1, *on_step)
        return front

    async def announce(self, front: Front, group: Announce) -> None:
        """Announce a group and wait until the engine has heard it: it hangs up on ranks that come before."""
        front.link.announce(group)
        await front.until(lambda: front.link.status.generation == group.generation)

    async def add_group(self, front: Front, generation: int, *on_step: OnStep | None) -> list[FakeRank]:
        """Announce a group and start its ranks."""
        await self.announce(front, Announce(generation, len(on_step), generation - 1))
        group = [self.add_rank(rank, len(on_step), generation, behaviour) for rank, behaviour in enumerate(on_step)]
        await front.until_ready(generation)
        return group

    async def close(self) -> None:
        for front in self.fronts:
            await front.link.close()
            front.slab.close()
        await self.stop_engine()
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            await asyncio.to_thread(rank.join)


class Gate:
    """Holds ranks inside a step until it is opened; `entered` counts who came."""

    def __init__(self) -> None:
        self.entered = 0
        self._lock = threading.Lock()
        self._open = threading.Event()

    def __call__(self, rank: FakeRank, step: Step) -> StepResult:
        with self._lock:
            self.entered += 1
        assert self._open.wait(HANG_SECONDS)
        return rank.work(step)

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes only."""
    with tempfile.TemporaryDirectory(prefix="moe-") as name:
        yield Path(name)


@pytest.fixture
async def pool(socket_folder: Path) -> AsyncIterator[Pool]:
    made = Pool(socket_folder)
    yield made
    await made.close()


@pytest.fixture
def make_pool(socket_folder: Path) -> Callable[[], Pool]:
    """A pool for a loop that the test runs itself."""
    return lambda: Pool(socket_folder)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()
