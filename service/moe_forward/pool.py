"""Ray's part: it places and starts the engine and the ranks, tells when one dies, and carries no step.

The supervisor lives in the process that started the service. When a rank or the engine is lost it kills what is left
of the group (its collectives cannot finish), and starts the next generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from moe_forward.actors import EngineActor, GatewayActor, RankActor
from moe_forward.batcher import BatchLimits
from moe_forward.cluster import SEE_ALL_GPUS
from moe_forward.errors import StartError
from moe_forward.exchange import Meeting
from moe_forward.handshake import Address, new_secret
from moe_forward.link import EngineLink
from moe_forward.messages import Announce
from moe_forward.placement import Places, RankPlace, this_address, this_node
from moe_forward.rank_setup import LOOPBACK, RankSetup
from moe_forward.types import EngineStatus

log = logging.getLogger(__name__)

ENGINE, GATEWAY = "the engine", "the gateway"


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """How to start engine and ranks.

    rank: the setup of each rank; rank number, generation and rendezvous are filled in here.
    runtime_folder: private to this service. max_restarts: times a lost group is started again.
    start_timeout_seconds: until every rank is ready.
    joined: Ray is not our own. remote_ranks_port: where ranks of other hosts find the gateway; 0: a free one.
    """

    rank: RankSetup
    limits: BatchLimits
    runtime_folder: Path
    max_restarts: int
    start_timeout_seconds: float
    joined: bool = False
    remote_ranks_port: int = 0


class Supervisor:
    """Starts the engine and a rank group, and starts them again when they are lost.

    setup: what to start. link: the connection through which the engine is told and heard.
    """

    def __init__(self, setup: PoolSetup, link: EngineLink) -> None:
        self._setup = setup
        self._link = link
        self._secret = new_secret()
        self._generation = 0
        self._restarts = 0
        self._engine: Any = None
        self._group: list[Any] = []  # the actors of the current generation
        self._runs: dict[str, asyncio.Future[None]] = {}
        self._places: Places | None = None
        self._changed = asyncio.Event()

    def on_status(self, status: EngineStatus) -> None:
        """Take note of a new engine status."""
        self._changed.set()

    async def start(self) -> None:
        """Start everything and return when it is ready.

        Raises: StartError with the reason when a rank or the engine fails, or at the start deadline.
        """
        self._places = Places(self._setup.rank.ranks, self._setup.rank.device)
        self._start_engine()
        await self._start_group(self._places)

    async def run(self) -> None:
        """Watch over the group for ever: when a part of it is lost, replace the whole."""
        assert self._places is not None
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
            try:
                await self._start_group(self._places)
            except StartError as error:  # it may hang for ever: it is lost, whatever the engine says
                reason = f"rank group {self._generation} did not start: {error}"
            else:
                log.info("rank group %d is ready", self._generation)
                reason = await self._until_lost()

    async def close(self) -> None:
        """Kill the ranks and the engine."""
        self._kill(engine=True)
        if self._places is not None:
            self._places.close()

    def _start_engine(self) -> None:
        path = self._setup.rank.socket_path
        path.unlink(missing_ok=True)
        name = f"engine-{self._generation + 1}"
        self._engine = EngineActor.options(name=name, scheduling_strategy=this_node()).remote()
        run = self._engine.run.remote(path, self._setup.limits, self._setup.rank.step_timeout_seconds)
        self._runs = {ENGINE: asyncio.wrap_future(run.future())}

    async def _start_group(self, places: Places) -> None:
        """Start the next generation and return when it is ready."""
        self._generation += 1
        self._announce()
        deadline = asyncio.get_running_loop().time() + self._setup.start_timeout_seconds
        self._start_ranks(places, await places.settled(deadline))
        await self._until_ready(deadline)

    def _start_ranks(self, places: Places, settled: list[RankPlace]) -> None:
        """Start a rank at each place, and a gateway where some are on other hosts."""
        setup = replace(self._setup.rank, generation=self._generation)
        if all(place.here for place in settled):
            setup = replace(setup, rendezvous=self._setup.runtime_folder / f"group-{self._generation}")
            hosts, gateway, gateway_port = [LOOPBACK] * len(settled), None, None
        else:
            one_host = len({place.address for place in settled}) == 1
            hosts = [LOOPBACK if one_host else place.address for place in settled]
            setup = replace(setup, rendezvous=Meeting(hosts[0], 0))
            gateway, gateway_port = self._start_gateway()
        actors = [self._rank_actor(places, rank, place) for rank, place in enumerate(settled)]
        meeting_port = actors[0].meet.remote(hosts[0]) if isinstance(setup.rendezvous, Meeting) else None
        for rank, (actor, place) in enumerate(zip(actors, settled, strict=True)):
            mine = replace(setup, rank=rank, host=hosts[rank], gateway=None if place.here else gateway)
            # Ray hands the ports to a rank when they are known.
            run = actor.run.remote(mine, None if place.here else gateway_port, meeting_port)
            self._runs[f"rank {rank}"] = asyncio.wrap_future(run.future())

    def _start_gateway(self) -> tuple[Address, Any]:
        """Start the gateway; returns its address without the port, and the port when it is known."""
        address = Address(this_address(), self._setup.remote_ranks_port, self._secret)
        name = f"gateway-{self._generation}"
        actor = GatewayActor.options(name=name, scheduling_strategy=this_node()).remote()
        self._group.append(actor)
        port = actor.listen.remote(address.host, address.port)
        run = actor.run.remote(address, port, self._setup.rank.socket_path, self._setup.rank.ranks)
        self._runs[GATEWAY] = asyncio.wrap_future(run.future())
        return address, port

    def _rank_actor(self, places: Places, rank: int, place: RankPlace) -> Any:
        on_gpu = self._setup.rank.device == "cuda"
        actor = RankActor.options(
            name=f"rank-{rank}-of-group-{self._generation}",
            num_gpus=1 if on_gpu else 0,
            scheduling_strategy=places.strategy(place),
            # Each rank sees the other GPUs of its host, to reach their memory; our own Ray has it from this process.
            runtime_env={"env_vars": {SEE_ALL_GPUS: "1"}} if on_gpu and self._setup.joined else None,
        ).remote()
        self._group.append(actor)
        return actor

    def _announce(self, failed: str = "") -> None:
        self._link.announce(Announce(self._generation, self._setup.rank.ranks, self._restarts, failed))

    def _engine_died(self) -> bool:
        # The closed socket tells within milliseconds, Ray up to seconds later.
        hung_up = self._link.status.lost and self._link.status.generation == 0
        return hung_up or self._runs[ENGINE].done()

    def _kill(self, engine: bool) -> None:
        """Kill the group, and the engine if asked, and forget them."""
        for actor in self._group + ([self._engine] if engine and self._engine is not None else []):
            ray.kill(actor, no_restart=True)
        kept = {} if engine else {who: run for who, run in self._runs.items() if who == ENGINE}
        for who, run in self._runs.items():
            if who not in kept:
                run.cancel()
        self._group = []
        self._runs = kept
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
        waited: list[asyncio.Future[Any]] = [changed, *self._runs.values()]
        try:
            await asyncio.wait(waited, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await changed
        self._changed.clear()

    def _ended(self) -> str | None:
        """Return why an actor's run has ended, or None while all of them go on."""
        for who, run in self._runs.items():
            if run.done():
                error = run.exception()
                return f"{who} ended" if error is None else f"{who}: {_cause(error)}"
        return None


def _cause(error: BaseException) -> str:
    """Return what went wrong inside an actor in one line."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
