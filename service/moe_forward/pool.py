"""Ray's part: it places and starts the engine and the ranks, tells when one dies, and carries no step.

The supervisor lives in the process that started the service. When a rank or the engine is lost it kills what is left
of the group (its collectives cannot finish), and starts the next generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import selectors
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_forward.batcher import BatchLimits
from moe_forward.channel import listen
from moe_forward.devices import cuda_index
from moe_forward.engine import run_engine
from moe_forward.errors import StartError
from moe_forward.link import EngineLink
from moe_forward.messages import Announce
from moe_forward.rank_process import run_rank
from moe_forward.rank_setup import RankSetup
from moe_forward.types import EngineStatus

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum; no tensor ever passes through it


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """How to start engine and ranks.

    rank: the setup of each rank; rank number, generation and rendezvous are filled in here.
    runtime_folder: private to this service. max_restarts: times a lost group is started again.
    start_timeout_seconds: until every rank is ready.
    """

    rank: RankSetup
    limits: BatchLimits
    runtime_folder: Path
    max_restarts: int
    start_timeout_seconds: float


def start_ray(ranks: int, device: str) -> None:
    """Start a Ray of our own, without dashboard; `runtime_folder` made its token and keeps it on loopback.

    device: cpu or cuda; on cuda each rank has a GPU of its own and sees the others, to reach their memory.
    """
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"  # read by the processes that Ray starts
    ray.init(
        address="local",
        num_cpus=ranks + 1,  # places for actors, not cores
        num_gpus=ranks if device == "cuda" else 0,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        configure_logging=False,
    )


def stop_ray() -> None:
    """End Ray and every actor in it."""
    ray.shutdown()


class EngineProcess:
    """What the engine's actor does."""

    def run(self, socket_path: Path, limits: BatchLimits, step_timeout_seconds: float) -> None:
        """Serve until killed."""
        # epoll rounds timeouts up to a millisecond, select does not; the engine has few sockets and short waits.
        loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        loop.run_until_complete(run_engine(listen(socket_path), limits, step_timeout_seconds))


class RankProcess:
    """What a rank's actor does."""

    def run(self, setup: RankSetup) -> None:
        """Serve steps until the engine hangs up or this process is killed."""
        if setup.device == "cuda":
            (gpu,) = ray.get_gpu_ids()
            setup = replace(setup, device=f"cuda:{cuda_index(str(gpu), os.environ.get('CUDA_VISIBLE_DEVICES'))}")
        run_rank(setup)


# Ray must not restart them by itself: the supervisor replaces a group as a whole.
EngineActor: Any = ray.remote(num_cpus=1, max_restarts=0)(EngineProcess)
RankActor: Any = ray.remote(num_cpus=1, max_restarts=0)(RankProcess)


class Supervisor:
    """Starts the engine and a rank group, and starts them again when they are lost.

    setup: what to start. link: the connection through which the engine is told and heard.
    """

    def __init__(self, setup: PoolSetup, link: EngineLink) -> None:
        self._setup = setup
        self._link = link
        self._generation = 0
        self._restarts = 0
        self._engine: Any = None
        self._ranks: list[Any] = []
        self._runs: list[asyncio.Future[None]] = []
        self._group: Any = None
        self._changed = asyncio.Event()

    def on_status(self, status: EngineStatus) -> None:
        """Take note of a new engine status."""
        self._changed.set()

    async def start(self) -> None:
        """Start everything and return when it is ready.

        Raises: StartError with the reason when a rank or the engine fails, or at the start deadline.
        """
        a_rank = {"CPU": 1.0, "GPU": 1.0} if self._setup.rank.device == "cuda" else {"CPU": 1.0}
        bundles = [{"CPU": 1.0}, *[a_rank] * self._setup.rank.ranks]
        self._group = placement_group(bundles, strategy="PACK")
        deadline = asyncio.get_running_loop().time() + self._setup.start_timeout_seconds
        self._start_engine()
        self._start_ranks()
        await self._until_ready(deadline)

    async def run(self) -> None:
        """Watch over the group for ever: when a part of it is lost, replace the whole."""
        reason = await self._until_lost()
        while True:
            log.error("the rank group is lost: %s", reason)
            if self._restarts >= self._setup.max_restarts:
                self._kill(engine=False)
                self._announce(failed=f"gave up after {self._restarts} restarts: {reason}")
                return
            self._restarts += 1
            self._kill(engine=self._engine_died())
            if self._engine is None:
                self._start_engine()
            self._start_ranks()
            deadline = asyncio.get_running_loop().time() + self._setup.start_timeout_seconds
            try:
                await self._until_ready(deadline)
            except StartError as error:  # it may hang for ever: it is lost, whatever the engine says
                reason = f"rank group {self._generation} did not start: {error}"
            else:
                log.info("rank group %d is ready", self._generation)
                reason = await self._until_lost()

    async def close(self) -> None:
        """Kill the ranks and the engine."""
        self._kill(engine=True)
        if self._group is not None:
            remove_placement_group(self._group)

    def _start_engine(self) -> None:
        path = self._setup.rank.socket_path
        path.unlink(missing_ok=True)
        self._engine = EngineActor.options(scheduling_strategy=self._place(0)).remote()
        run = self._engine.run.remote(path, self._setup.limits, self._setup.rank.step_timeout_seconds)
        self._runs = [asyncio.wrap_future(run.future())]

    def _start_ranks(self) -> None:
        self._generation += 1
        self._announce()
        for rank in range(self._setup.rank.ranks):
            setup = replace(
                self._setup.rank,
                rank=rank,
                generation=self._generation,
                rendezvous=self._setup.runtime_folder / f"group-{self._generation}",
            )
            gpus = 1 if setup.device == "cuda" else 0
            actor = RankActor.options(num_gpus=gpus, scheduling_strategy=self._place(rank + 1)).remote()
            self._ranks.append(actor)
            self._runs.append(asyncio.wrap_future(actor.run.remote(setup).future()))

    def _place(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)

    def _announce(self, failed: str = "") -> None:
        self._link.announce(Announce(self._generation, self._setup.rank.ranks, self._restarts, failed))

    def _engine_died(self) -> bool:
        # The closed socket tells within milliseconds, Ray up to seconds later.
        hung_up = self._link.status.lost and self._link.status.generation == 0
        return hung_up or self._runs[0].done()

    def _kill(self, engine: bool) -> None:
        """Kill every rank, and the engine if asked, and forget them."""
        for actor in self._ranks + ([self._engine] if engine and self._engine is not None else []):
            ray.kill(actor, no_restart=True)
        for run in self._runs[0 if engine else 1 :]:
            run.cancel()
        self._ranks = []
        self._runs = [] if engine else self._runs[:1]
        if engine:
            self._engine = None

    async def _until_ready(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            status = self._link.status
            if status.ready and status.generation == self._generation:
                return
            ended = self._ended()
            if ended is not None:
                raise StartError(ended)
            if loop.time() >= deadline:
                seconds = self._setup.start_timeout_seconds
                raise StartError(f"not ready after {seconds:g} s (start_timeout_seconds): {status.reason}")
            await self._change(deadline - loop.time())

    async def _until_lost(self) -> str:
        while True:
            ended = self._ended()
            if ended is not None:
                return ended
            status = self._link.status
            if status.lost and status.generation in (0, self._generation):
                return status.reason
            await self._change(None)

    async def _change(self, timeout_seconds: float | None) -> None:
        """Wait until an actor's run ends or the engine reports something, at most `timeout_seconds`."""
        changed = asyncio.ensure_future(self._changed.wait())
        waited: list[asyncio.Future[Any]] = [changed, *self._runs]
        try:
            await asyncio.wait(waited, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await changed
        self._changed.clear()

    def _ended(self) -> str | None:
        """Return why an actor's run has ended, or None while all of them go on."""
        for index, run in enumerate(self._runs):
            if run.done():
                who = "the engine" if index == 0 else f"rank {index - 1}"
                error = run.exception()
                return f"{who} ended" if error is None else f"{who}: {_cause(error)}"
        return None


def _cause(error: BaseException) -> str:
    """Return what went wrong inside an actor in one line."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
