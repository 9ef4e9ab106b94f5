"""The supervisor over actors, places and an engine that only pretend: which group it starts after what was lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_forward import group_start, ladder, pool
from moe_forward.errors import StartError
from moe_forward.messages import Announce
from moe_forward.placement import RankPlace
from moe_forward.pool import PoolSetup, Supervisor
from moe_forward.rank_group import Ended
from moe_forward.types import EngineStatus, RankInfo

from .test_rank_gpu import ON_CPU, setup_of

RANKS = 4
SHARES = ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))  # of the 16 experts
LONG_SECONDS = 20.0  # a guard against tests that never end
QUICK_SECONDS = 0.05


class World:
    """What Ray, the engine and the ranks do.

    there: places that Ray has now. refusing: places whose rank ends before it is ready; silent: whose rank never is.
    groups: what was started, by places and missing experts. killed: of how many groups the ranks were killed.
    steps_run: the engine has a step. capacity_bytes: of each rank's GPU.
    """

    def __init__(self) -> None:
        self.status = EngineStatus()
        self.there: set[int] = set(range(RANKS))
        self.refusing: set[int] = set()
        self.silent: set[int] = set()
        self.groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.announced: list[Announce] = []
        self.killed = 0
        self.engines = 0
        self.steps_run = False
        self.capacity_bytes = 0
        self.tell: Callable[[EngineStatus], None] = lambda status: None
        self._ended: Ended | None = None
        self._end: asyncio.Future[None] | None = None

    # As the link

    def announce(self, announce: Announce) -> None:
        self.announced.append(announce)
        if announce.failed:
            self.say(replace(self.status, ready=False, lost=True, reason=f"failed: {announce.failed}"))
        elif announce.generation != self.status.generation:
            if announce.after_steps and self.steps_run:
                self.say(replace(self.status, ready=False))
            else:
                self.take_in(announce)

    def take_in(self, announce: Announce) -> None:
        infos = tuple(RankInfo(rank, "starting", 0.0) for rank in range(announce.ranks))
        lacking = {"lacking_ranks": announce.lacking_ranks, "missing": announce.missing}
        self.say(EngineStatus(False, False, announce.generation, "waiting", infos, announce.restarts, **lacking))

    def say(self, status: EngineStatus) -> None:
        self.status = status
        self.tell(status)

    def lose(self, *places: int) -> None:
        """Ranks at places end, and the engine says so."""
        held = self.groups[-1][0]
        infos = tuple(
            replace(info, state="lost" if held[info.rank] in places else info.state) for info in self.status.ranks
        )
        self.say(replace(self.status, ready=False, lost=True, ranks=infos, reason=f"places {places} are lost"))

    # As the actors

    @property
    def runs(self) -> Collection[asyncio.Future[None]]:
        if self._end is None or self._end.done():
            self._end = asyncio.get_running_loop().create_future()
        return [self._end]

    @property
    def has_engine(self) -> bool:
        return self.engines > 0

    def ended(self) -> Ended | None:
        return self._ended

    def start_engine(self, generation: int) -> None:
        self.engines += 1

    def start_ranks(
        self, generation: int, places: Places, settled: Sequence[RankPlace], missing: tuple[int, ...]
    ) -> None:
        assert generation == self.announced[-1].generation == self.status.generation
        held = tuple(place.bundle for place in settled)
        assert set(held) <= self.there
        assert len(held) == self.announced[-1].ranks
        self.groups.append((held, missing))
        refused = [rank for rank, place in enumerate(held) if place in self.refusing]
        if refused:
            self._ended = Ended(refused[0], f"rank {refused[0]}: no")
        elif not self.silent & set(held):
            infos = tuple(
                replace(info, state="ready", capacity_bytes=self.capacity_bytes) for info in self.status.ranks
            )
            ready = replace(self.status, ready=True, reason="", ranks=infos)
            asyncio.get_running_loop().call_soon(self.say, ready)

    def kill(self, engine: bool) -> None:
        self.killed += 1
        self._ended = None
        if engine:
            self.engines = 0

    def end(self, ended: Ended) -> None:
        """An actor ends; Ray says so, and the engine has not seen it."""
        self._ended = ended
        assert self._end is not None
        self._end.set_result(None)


class Places:
    """As `moe_forward.placement.Places`."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def settled(self, bundles: Iterable[int], deadline: float) -> list[RankPlace]:
        while not set(bundles) <= self._world.there:
            if asyncio.get_running_loop().time() >= deadline:
                raise StartError("no room")
            await asyncio.sleep(0.001)
        return [RankPlace(True, "here", bundle) for bundle in sorted(bundles)]

    async def there(self) -> tuple[int, ...]:
        return tuple(sorted(self._world.there))

    def close(self) -> None:
        pass


@pytest.fixture
def world() -> World:
    return World()


class Service:
    """A supervisor that runs in a task."""

    def __init__(self, world: World, **settings: Any) -> None:
        rank = replace(setup_of(ON_CPU, RANKS, "gloo", "cpu", Path("nowhere")), step_timeout_seconds=LONG_SECONDS)
        setup = PoolSetup(rank, None, Path("nowhere"), **{"max_restarts": 1, "start_timeout_seconds": 1.0, **settings})  # type: ignore[arg-type]
        self.world = world
        self.supervisor = Supervisor(setup, world)  # type: ignore[arg-type]
        world.tell = self.supervisor.on_status
        self._run: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.supervisor.start()
        self._run = asyncio.create_task(self.supervisor.run())

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + LONG_SECONDS
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, self.world.groups
            assert self._run is None or not self._run.done() or self._run.exception() is None
            await asyncio.sleep(0.001)

    async def until_groups(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Wait until so many groups were started and the last one serves; returns it."""
        await self.until(lambda: len(self.world.groups) == count and self.world.status.ready)
        await asyncio.sleep(0.005)  # the supervisor has seen it
        return self.world.groups[-1]

    async def gave_up(self) -> str:
        assert self._run is not None
        await asyncio.wait_for(self._run, LONG_SECONDS)
        return self.world.status.reason

    async def close(self) -> None:
        if self._run is not None:
            self._run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._run


Start = Callable[..., Any]


@pytest.fixture
async def start(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    monkeypatch.setattr(pool, "Actors", lambda setup: world)
    monkeypatch.setattr(pool, "Places", lambda ranks, device: Places(world))
    for module, name in ((pool, "RESTORE_SECONDS"), (ladder, "RESTORE_SECONDS"), (group_start, "PLACE_SECONDS")):
        monkeypatch.setattr(module, name, QUICK_SECONDS)
    monkeypatch.setattr(group_start, "PLACE_POLL_SECONDS", 0.01)
    monkeypatch.setattr(pool, "BLAME_SECONDS", 0.01)
    started = []

    async def run(**settings: Any) -> Service:
        started.append(Service(world, **settings))
        await started[-1].start()
        return started[-1]

    yield run
    for service in started:
        await service.close()


ALL = tuple(range(RANKS))


async def test_a_lost_group_is_killed_and_started_again_and_given_up_in_the_end(world: World, start: Start) -> None:
    service = await start()
    world.lose(1)
    assert await service.until_groups(2) == (ALL, ())
    assert (world.killed, world.status.restarts, world.status.generation) == (1, 1, 2)
    world.lose(2)
    assert await service.gave_up() == "failed: gave up after 1 restarts within an hour: places (2,) are lost"
    assert len(world.groups) == 2


async def test_the_others_go_on_when_one_keeps_being_lost(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade")
    world.lose(1)
    assert await service.until_groups(2) == (ALL, ())
    world.lose(1)
    assert await service.until_groups(3) == ((0, 2, 3), ())
    assert (world.status.lacking_ranks, world.status.missing) == (1, ())
    assert world.status.generation == 3


async def test_experts_are_missing_where_the_others_cannot_hold_all(world: World, start: Start) -> None:
    asked = []

    def fits(setup: Any, ranks: int, capacity_bytes: int) -> bool:
        asked.append((ranks, capacity_bytes))
        return False

    world.capacity_bytes = 80
    service = await start(on_rank_loss="degrade", max_restarts=0, fits=fits)
    world.lose(2)
    assert await service.until_groups(2) == ((0, 1, 3), SHARES[2])
    assert world.status.missing == SHARES[2]
    assert asked == [(3, 80)], "with what the smallest GPU has"


async def test_a_rank_of_a_smaller_group_is_blamed_by_its_place_and_not_by_its_number(
    world: World, start: Start
) -> None:
    service = await start(on_rank_loss="degrade", max_restarts=0)
    world.lose(0)
    assert await service.until_groups(2) == ((1, 2, 3), ())
    world.lose(2)
    assert await service.until_groups(3) == ((1, 3), ())


async def test_a_loss_that_ray_tells_first_is_blamed_on_the_rank_that_the_engine_names(
    world: World, start: Start
) -> None:
    service = await start(on_rank_loss="degrade", max_restarts=0)
    world.end(Ended(0, "rank 0: connection closed by peer"))
    asyncio.get_running_loop().call_later(0.002, world.lose, 3)
    assert await service.until_groups(2) == ((0, 1, 2), ())


async def test_a_loss_that_ray_alone_tells_is_blamed_on_the_rank_that_ended(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade", max_restarts=0)
    world.end(Ended(2, "rank 2: the actor died"))
    assert await service.until_groups(2) == ((0, 1, 3), ())


async def test_a_lost_engine_is_started_again_and_no_rank_is_blamed(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade")
    world.say(EngineStatus(lost=True, reason="the engine is gone"))
    assert await service.until_groups(2) == (ALL, ())
    assert world.engines == 1
    world.say(EngineStatus(lost=True, reason="the engine is gone"))
    assert "gave up" in await service.gave_up()


async def test_a_group_goes_on_without_a_place_that_is_gone_and_takes_it_back_between_steps(
    world: World, start: Start
) -> None:
    service = await start(on_rank_loss="degrade", max_restarts=3)
    world.there -= {3}
    world.lose(3)
    assert await service.until_groups(2) == ((0, 1, 2), ())
    killed = world.killed
    world.steps_run = True
    world.there |= {3}
    await service.until(lambda: world.announced[-1].after_steps)
    await asyncio.sleep(2 * QUICK_SECONDS)
    assert world.killed == killed, "a step runs"
    world.take_in(world.announced[-1])
    assert await service.until_groups(3) == (ALL, ())
    assert (world.killed, world.status.lacking_ranks) == (killed + 1, 0)


async def test_a_smaller_group_is_left_alone_while_its_place_is_gone(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade")
    world.there -= {0}
    world.lose(0)
    assert await service.until_groups(2) == ((1, 2, 3), ())
    announced, killed = len(world.announced), world.killed
    await asyncio.sleep(5 * QUICK_SECONDS)
    assert (len(world.announced), world.killed, world.status.ready) == (announced, killed, True)


async def test_a_place_that_goes_while_its_rank_starts_is_done_without(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade")
    world.silent = {1}
    world.lose(1)
    await service.until(lambda: len(world.groups) == 2)
    world.silent = set()
    world.there -= {1}
    assert await service.until_groups(3) == ((0, 2, 3), ())


async def test_without_any_place_the_service_waits_for_them(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade")
    world.there.clear()
    world.lose(0)
    await asyncio.sleep(4 * QUICK_SECONDS)
    assert len(world.groups) == 1
    world.there |= set(ALL)
    assert await service.until_groups(2) == (ALL, ())


async def test_a_rank_that_does_not_start_again_is_done_without(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade", max_restarts=3)
    world.refusing = {2}
    world.lose(0)
    assert await service.until_groups(3) == ((0, 1, 3), ())
    assert world.groups[1] == (ALL, ())


async def test_a_larger_group_that_does_not_start_gives_way_to_the_smaller_one(world: World, start: Start) -> None:
    service = await start(on_rank_loss="degrade", max_restarts=0)
    world.refusing = {1}
    world.lose(1)
    assert await service.until_groups(2) == ((0, 2, 3), ())
    await service.until(lambda: len(world.groups) == 4)
    assert world.groups[2:] == [(ALL, ()), ((0, 2, 3), ())]
    world.refusing = set()
    await service.until(lambda: len(world.groups) == 5 and world.status.ready)
    assert world.groups[4] == (ALL, ())


async def test_a_service_that_never_was_complete_does_not_start(world: World, start: Start) -> None:
    world.there -= {3}
    with pytest.raises(StartError, match="no room"):
        await start(on_rank_loss="degrade", start_timeout_seconds=2 * QUICK_SECONDS)
    assert world.groups == []


async def test_the_reason_of_a_rank_that_keeps_the_service_from_starting_is_its_own(world: World, start: Start) -> None:
    world.refusing = {1}
    with pytest.raises(StartError, match=r"^rank 1: no$"):
        await start(on_rank_loss="degrade")
