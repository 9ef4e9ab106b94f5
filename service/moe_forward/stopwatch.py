"""Timing the phases of a step on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from moe_forward.types import PHASES


class Stopwatch:
    """Adds up the seconds spent in each phase of one step: `with stopwatch("dispatch"): ...`."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str, /) -> Iterator[None]:
        """Time a block and add it to `phase`, one of `PHASES`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    @property
    def phase_seconds(self) -> tuple[float, ...]:
        """One figure for each of `PHASES`."""
        return tuple(self._seconds[phase] for phase in PHASES)
