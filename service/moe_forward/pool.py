"""The supervisor: it has Ray place and start the engine and the ranks, notices when one is lost, and carries no step.

It lives in the process that started the service. When a rank or the engine is lost it kills what is left of the group
(its collectives cannot finish), and starts the next generation in the layout that the `ladder` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import Any

from moe_forward.group_start import GroupStart, Loss, NotStarted, places_of
from moe_forward.ladder import RESTORE_SECONDS, Ladder, Layout
from moe_forward.link import EngineLink
from moe_forward.messages import Announce
from moe_forward.placement import Places, RankPlace
from moe_forward.rank_group import Actors, PoolSetup
from moe_forward.rank_setup import resized
from moe_forward.types import EngineStatus

__all__ = ["PoolSetup", "Supervisor"]

log = logging.getLogger(__name__)

BLAME_SECONDS = 0.2
"""How much later than Ray the engine may tell which rank was lost first: others fail because of it."""


class Supervisor:
    """Starts the engine and a rank group, and starts them again when they are lost.

    setup: what to start. link: the connection through which the engine is told and heard.
    """

    def __init__(self, setup: PoolSetup, link: EngineLink) -> None:
        self._setup = setup
        self._link = link
        self._actors = Actors(setup)
        self._degrades = setup.on_rank_loss == "degrade"
        ranks, experts = setup.rank.ranks, setup.rank.spec.num_experts
        self._ladder = Ladder(ranks, experts, setup.max_restarts, self._degrades, self._all_experts_fit)
        self._capacity_bytes = 0  # of the smallest rank
        self._generation = 0
        self._restarts = 0
        self._places: Places | None = None
        self._settled: list[RankPlace] = []
        self._changed = asyncio.Event()

    def on_status(self, status: EngineStatus) -> None:
        """Take note of a new engine status."""
        self._changed.set()

    async def start(self) -> None:
        """Start everything and return when it is ready.

        Raises: StartError with the reason when a rank or the engine fails, or at the start deadline.
        """
        self._places = Places(self._setup.rank.ranks, self._setup.rank.device)
        self._actors.start_engine(1)
        self._next_generation()
        await self._start_group(self._places, patient=True)

    async def run(self) -> None:
        """Replace the group whenever a part of it is lost, or a larger one can be had; returns when it is given up."""
        assert self._places is not None
        while True:
            loss = await self._until_lost(self._places)
            if loss is None:
                await self._replace_after_steps()
                loss = await self._restarted(self._places)
            while loss is not None:
                log.error("the rank group is lost: %s", loss.reason)
                if self._next_layout(loss) is None:
                    self._actors.kill(engine=False)
                    limit = self._setup.max_restarts
                    self._announce(failed=f"gave up after {limit} restarts within an hour: {loss.reason}")
                    return
                self._actors.kill(engine=self._engine_died())
                if not self._actors.has_engine:
                    self._actors.start_engine(self._generation + 1)
                self._next_generation()
                loss = await self._restarted(self._places)

    async def close(self) -> None:
        """Kill the ranks and the engine."""
        self._actors.kill(engine=True)
        if self._places is not None:
            self._places.close()

    def _next_layout(self, loss: Loss) -> Layout | None:
        now = asyncio.get_running_loop().time()
        if loss.there is not None and (layout := self._ladder.gone(loss.there, now)) is not None:
            return layout
        return self._ladder.lost(loss.places, now) if loss.started else self._ladder.refused(loss.places, now)

    def _next_generation(self, after_steps: bool = False) -> None:
        self._restarts += self._generation > 0
        self._generation += 1
        self._announce(after_steps=after_steps)

    async def _restarted(self, places: Places) -> Loss | None:
        """Start the group that was announced; returns why it is lost where it did not come up."""
        layout = self._ladder.layout
        if not self._ladder.complete:
            setup = resized(self._setup.rank, len(layout.places), layout.missing)
            log.warning(
                "going on with %d of %d ranks, exchange %s, without %d experts",
                *(setup.ranks, self._setup.rank.ranks, setup.exchange, len(setup.missing)),
            )
        try:
            await self._start_group(places, patient=not self._degrades)
        except NotStarted as error:  # it may hang for ever: it is lost, whatever the engine says
            return replace(error.loss, reason=f"rank group {self._generation} did not start: {error}")
        log.info("rank group %d is ready", self._generation)
        return None

    async def _start_group(self, places: Places, patient: bool) -> None:
        """Start the generation that was announced and return when it is ready. patient: see `GroupStart`."""
        timeout_seconds = self._setup.start_timeout_seconds
        start = GroupStart(
            actors=self._actors,
            places=places,
            link=self._link,
            generation=self._generation,
            layout=self._ladder.layout,
            patient=patient,
            deadline=asyncio.get_running_loop().time() + timeout_seconds,
            timeout_seconds=timeout_seconds,
            change=self._change,
        )
        self._settled = await start.settle()
        self._actors.start_ranks(self._generation, places, self._settled, start.layout.missing)
        await start.until_ready(self._settled)
        self._capacity_bytes = min(info.capacity_bytes for info in self._link.status.ranks)
        self._ladder.started()

    async def _until_lost(self, places: Places) -> Loss | None:
        """Wait until the group is lost, and return why; or None when the ladder has a larger one to try."""
        loop = asyncio.get_running_loop()
        look_again = loop.time() + RESTORE_SECONDS
        while True:
            loss = self._loss()
            if loss is not None:
                if not self._link.status.lost:
                    await asyncio.sleep(BLAME_SECONDS)
                return self._loss() or loss
            if self._ladder.complete:
                await self._change(None)
            elif loop.time() < look_again:
                await self._change(look_again - loop.time())
            else:
                look_again += RESTORE_SECONDS
                if self._ladder.better(await places.there(), loop.time()) is not None:
                    return None

    async def _replace_after_steps(self) -> None:
        """Announce a larger group, and kill the present one when its steps are done, or when it is lost."""
        log.info("replacing the rank group by one of %d ranks", len(self._ladder.layout.places))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._setup.rank.step_timeout_seconds
        last = self._generation
        self._next_generation(after_steps=True)
        while self._link.status.generation == last and self._loss(last) is None and loop.time() < deadline:
            await self._change(deadline - loop.time())
        self._actors.kill(engine=self._engine_died())
        if not self._actors.has_engine:
            self._actors.start_engine(self._generation)
        self._announce()

    def _loss(self, generation: int | None = None) -> Loss | None:
        """Return why a generation is lost, the present one unless another is named."""
        status = self._link.status
        if status.lost and status.generation in (0, generation or self._generation):
            lost = [info.rank for info in status.ranks if info.state == "lost"]
            return Loss(status.reason, places_of(lost, self._settled))
        ended = self._actors.ended()
        if ended is None:
            return None
        return Loss(ended.reason, places_of(() if ended.rank is None else (ended.rank,), self._settled))

    def _all_experts_fit(self, ranks: int) -> bool:
        return self._setup.fits(self._setup.rank, ranks, self._capacity_bytes)

    def _announce(self, failed: str = "", after_steps: bool = False) -> None:
        layout = self._ladder.layout
        ranks, lacking = len(layout.places), self._setup.rank.ranks - len(layout.places)
        self._link.announce(
            Announce(self._generation, ranks, self._restarts, failed, lacking, layout.missing, after_steps)
        )

    def _engine_died(self) -> bool:
        # The closed socket tells within milliseconds, Ray up to seconds later.
        hung_up = self._link.status.lost and self._link.status.generation == 0
        return hung_up or not self._actors.has_engine

    async def _change(self, timeout_seconds: float | None) -> None:
        """Wait until an actor's run ends or the engine reports something, at most `timeout_seconds`."""
        changed = asyncio.ensure_future(self._changed.wait())
        waited: list[asyncio.Future[Any]] = [changed, *self._actors.runs]
        try:
            await asyncio.wait(waited, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await changed
        self._changed.clear()
