"""From an announced generation to a rank group that is ready, or to the reason why there is none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from moe_forward.errors import StartError
from moe_forward.ladder import Layout
from moe_forward.link import EngineLink
from moe_forward.placement import Places, RankPlace
from moe_forward.rank_group import Actors

PLACE_SECONDS = 15.0
"""How long a place may be gone before a group is started without it; Ray gives it another one where there is room."""

PLACE_POLL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a group cannot go on. places: of the ranks it is because of. there: what places are left, if some are gone.

    started: it was up.
    """

    reason: str
    places: tuple[int, ...] = ()
    there: tuple[int, ...] | None = None
    started: bool = True


class NotStarted(StartError):
    """A group that could not be started, and the loss that it is."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.reason)
        self.loss = loss


def places_of(ranks: Iterable[int], settled: list[RankPlace]) -> tuple[int, ...]:
    """Return the places of ranks."""
    return tuple(settled[rank].bundle for rank in ranks if rank < len(settled))


@dataclass(frozen=True, slots=True)
class GroupStart:
    """Starts one generation.

    layout: with what. patient: wait for every place to the deadline; else rather be told which ones are gone.
    deadline: on the loop's clock; timeout_seconds from the start. change: waits for news, so many seconds at most.
    """

    actors: Actors
    places: Places
    link: EngineLink
    generation: int
    layout: Layout
    patient: bool
    deadline: float
    timeout_seconds: float
    change: Callable[[float], Awaitable[None]]

    async def settle(self) -> list[RankPlace]:
        """Wait for the places. Raises: NotStarted."""
        wanted = set(self.layout.places)
        if not self.patient:
            patience = min(self.deadline, asyncio.get_running_loop().time() + PLACE_SECONDS)
            with contextlib.suppress(StartError):
                return await self.places.settled(wanted, patience)
            there = await self.places.there()
            if wanted & set(there):
                raise self._gone(there)
        try:
            return await self.places.settled(wanted, self.deadline)
        except StartError as error:
            raise NotStarted(Loss(str(error), started=False)) from error

    async def until_ready(self, settled: list[RankPlace]) -> None:
        """Wait for the group, and look after its places meanwhile: ranks of a host that is gone wait for ever.

        Raises: NotStarted.
        """
        loop = asyncio.get_running_loop()
        gone_since = None
        while True:
            status = self.link.status
            if status.ready and status.generation == self.generation:
                return
            ended = self.actors.ended()
            if ended is not None:
                blamed = () if ended.rank is None else (ended.rank,)
                raise NotStarted(Loss(ended.reason, places_of(blamed, settled), started=False))
            now = loop.time()
            if now >= self.deadline:
                reason = f"not ready after {self.timeout_seconds:g} s (start_timeout_seconds): {status.reason}"
                raise NotStarted(Loss(reason, started=False))
            if not self.patient:
                there = await self.places.there()
                if set(self.layout.places) <= set(there):
                    gone_since = None
                elif now - (gone_since := now if gone_since is None else gone_since) >= PLACE_SECONDS:
                    raise self._gone(there)
            await self.change(self.deadline - now if self.patient else min(self.deadline - now, PLACE_POLL_SECONDS))

    def _gone(self, there: tuple[int, ...]) -> NotStarted:
        wanted = self.layout.places
        gone = sum(place not in there for place in wanted)
        return NotStarted(Loss(f"{gone} of {len(wanted)} places are gone", there=there, started=False))
