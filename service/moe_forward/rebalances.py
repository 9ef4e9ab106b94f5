"""Changes of which ranks hold which experts, read off the engine's statuses."""

from __future__ import annotations

from typing import Literal, get_args

from moe_forward.types import EngineStatus

Result = Literal["degraded", "restored", "failed"]
RESULTS: tuple[Result, ...] = get_args(Result)


class Rebalances:
    """Compares each rank group with the one before it: how many ranks it lacks, and which experts."""

    def __init__(self) -> None:
        self._ready: tuple[int, int] | None = None  # experts and ranks that the last ready group lacked
        self._trying: tuple[int, int, int] | None = None  # generation, and what that one lacks, while it starts

    def seen(self, status: EngineStatus) -> tuple[Result, ...]:
        """Take in a status; returns what it tells of the change of groups.

        degraded, restored: a group with fewer or more experts, or ranks, than the last one is ready. failed: such a
        group never was.
        """
        found: list[Result] = []
        lacks = (status.missing_experts, status.lacking_ranks)
        generation = status.generation
        if self._trying is not None and generation > self._trying[0]:
            found += ["failed"] if self._trying[1:] != self._ready else []
            self._trying = None
        if status.ready:
            if self._ready is not None and lacks != self._ready:
                found.append("degraded" if lacks > self._ready else "restored")
            self._ready, self._trying = lacks, None
        elif generation and self._ready is not None:
            self._trying = (generation, *lacks)
        return tuple(found)
