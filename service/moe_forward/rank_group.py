"""Ray's actors: the engine, and one rank group at a time with its gateway; started at their places, watched, killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray

from moe_forward.actors import EngineActor, GatewayActor
from moe_forward.batcher import BatchLimits
from moe_forward.cluster import SEE_ALL_GPUS
from moe_forward.exchange import Meeting
from moe_forward.handshake import Address, new_secret
from moe_forward.placement import Places, RankPlace, this_address, this_node
from moe_forward.rank_actor import RankActor
from moe_forward.rank_setup import LOOPBACK, RankSetup, all_experts_fit, resized

ENGINE, GATEWAY, RANK = "the engine", "the gateway", "rank "


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """How to start engine and ranks.

    rank: the setup of each rank; rank number, generation and rendezvous are filled in here.
    runtime_folder: private to this service. max_restarts: times in an hour that a lost group is started again.
    start_timeout_seconds: until every rank is ready.
    joined: Ray is not our own. remote_ranks_port: where ranks of other hosts find the gateway; 0: a free one.
    on_rank_loss: what follows when `max_restarts` is exceeded: give up, or go on with fewer ranks.
    fits: whether all experts fit on so many ranks with so many bytes each, 0 where that is not known.
    """

    rank: RankSetup
    limits: BatchLimits
    runtime_folder: Path
    max_restarts: int
    start_timeout_seconds: float
    joined: bool = False
    remote_ranks_port: int = 0
    on_rank_loss: Literal["fail", "degrade"] = "fail"
    fits: Callable[[RankSetup, int, int], bool] = all_experts_fit


class Ended(NamedTuple):
    """An actor's run that ended. rank: None for the engine and the gateway."""

    rank: int | None
    reason: str


class Actors:
    """The living actors of a service."""

    def __init__(self, setup: PoolSetup) -> None:
        self._setup = setup
        self._secret = new_secret()
        self._engine: Any = None
        self._group: list[Any] = []  # of the current generation
        self._runs: dict[str, asyncio.Future[None]] = {}

    @property
    def runs(self) -> Collection[asyncio.Future[None]]:
        """What ends when an actor does."""
        return self._runs.values()

    @property
    def has_engine(self) -> bool:
        """Whether the engine was started and, as far as Ray knows, lives."""
        return self._engine is not None and not self._runs[ENGINE].done()

    def ended(self) -> Ended | None:
        """Return why an actor's run has ended, or None while all of them go on."""
        for who, run in self._runs.items():
            if run.done():
                error = run.exception()
                rank = int(who.removeprefix(RANK)) if who.startswith(RANK) else None
                return Ended(rank, f"{who} ended" if error is None else f"{who}: {_cause(error)}")
        return None

    def start_engine(self, generation: int) -> None:
        """Start the engine. generation: of the rank group that comes next."""
        path = self._setup.rank.socket_path
        path.unlink(missing_ok=True)
        self._engine = EngineActor.options(name=f"engine-{generation}", scheduling_strategy=this_node()).remote()
        rank = self._setup.rank
        times = (rank.step_timeout_seconds, rank.silence_seconds, rank.poll_seconds)
        run = self._engine.run.remote(path, self._setup.limits, *times)
        self._runs = {ENGINE: asyncio.wrap_future(run.future())}

    def start_ranks(
        self, generation: int, places: Places, settled: Sequence[RankPlace], missing: tuple[int, ...]
    ) -> None:
        """Start a rank at each place, and a gateway where some are on other hosts. missing: experts nobody holds."""
        setup = replace(resized(self._setup.rank, len(settled), missing), generation=generation)
        if all(place.here for place in settled):
            setup = replace(setup, rendezvous=self._setup.runtime_folder / f"group-{generation}")
            hosts, gateway, gateway_port = [LOOPBACK] * len(settled), None, None
        else:
            one_host = len({place.address for place in settled}) == 1
            hosts = [LOOPBACK if one_host else place.address for place in settled]
            setup = replace(setup, rendezvous=Meeting(hosts[0], 0))
            gateway, gateway_port = self._start_gateway(setup)
        actors = [self._rank_actor(generation, places, rank, place) for rank, place in enumerate(settled)]
        meeting_port = actors[0].meet.remote(hosts[0]) if isinstance(setup.rendezvous, Meeting) else None
        for rank, (actor, place) in enumerate(zip(actors, settled, strict=True)):
            mine = replace(setup, rank=rank, host=hosts[rank], gateway=None if place.here else gateway)
            # Ray hands the ports to a rank when they are known.
            run = actor.run.remote(mine, None if place.here else gateway_port, meeting_port)
            self._runs[f"{RANK}{rank}"] = asyncio.wrap_future(run.future())

    def kill(self, engine: bool) -> None:
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

    def _start_gateway(self, setup: RankSetup) -> tuple[Address, Any]:
        """Start the gateway; returns its address without the port, and the port when it is known."""
        address = Address(this_address(), self._setup.remote_ranks_port, self._secret)
        name = f"gateway-{setup.generation}"
        actor = GatewayActor.options(name=name, scheduling_strategy=this_node()).remote()
        self._group.append(actor)
        port = actor.listen.remote(address.host, address.port)
        run = actor.run.remote(address, port, setup.socket_path, setup.ranks)
        self._runs[GATEWAY] = asyncio.wrap_future(run.future())
        return address, port

    def _rank_actor(self, generation: int, places: Places, rank: int, place: RankPlace) -> Any:
        on_gpu = self._setup.rank.device == "cuda"
        actor = RankActor.options(
            name=f"rank-{rank}-of-group-{generation}",
            num_gpus=1 if on_gpu else 0,
            scheduling_strategy=places.strategy(place),
            # Each rank sees the other GPUs of its host, to reach their memory; our own Ray has it from this process.
            runtime_env={"env_vars": {SEE_ALL_GPUS: "1"}} if on_gpu and self._setup.joined else None,
        ).remote()
        self._group.append(actor)
        return actor


def _cause(error: BaseException) -> str:
    """Return what went wrong inside an actor in one line."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
