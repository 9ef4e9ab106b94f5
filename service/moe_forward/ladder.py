"""Which rank group comes after a loss: the same again, one without the places that keep failing, or none.

A place is where one rank goes: a bundle of Ray's, with the same GPU every time. The ladder knows no Ray and no clock:
it is told what happened and when, and says which layout to start next. Down: a place that is gone or keeps losing its
rank is left out; the others share all experts where they fit, else those of the places left out are missing. Up: places
that are there again come back, those that failed after a wait that doubles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from moe_forward.types import expert_range

WINDOW_SECONDS = 3600.0
"""Losses count for so long: `max_rank_restarts` is a rate."""

RESTORE_SECONDS = 60.0
"""How often a smaller group is looked at, and the first wait before a place that failed is tried again."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A rank group. places: numbers of the places that have a rank. missing: ids of experts that nobody holds."""

    places: tuple[int, ...]
    missing: tuple[int, ...] = ()


class Ladder:
    """Decides over the layouts of one service; every method that returns a layout makes it the present one.

    places: as many as ranks were asked for. num_experts: of the model. max_restarts: losses in `WINDOW_SECONDS` after
    which the same group is started once more. degrade: go on with fewer ranks after that, or give up.
    fits: tells whether all experts fit on so many ranks. Times are seconds on one clock.
    """

    def __init__(
        self, places: int, num_experts: int, max_restarts: int, degrade: bool, fits: Callable[[int], bool]
    ) -> None:
        self._all = tuple(range(places))
        self._num_experts = num_experts
        self._max_restarts = max_restarts
        self._degrade = degrade
        self._fits = fits
        self._losses: dict[int | None, list[float]] = {}  # by place; None: of nobody in particular
        self._shunned: dict[int, tuple[float, float]] = {}  # place -> until when, after which wait
        self._too_small: set[int] = set()  # numbers of ranks on which all experts did not fit after all
        self._added: tuple[int, ...] = ()  # places that the present layout tries again
        self.layout = Layout(self._all)

    @property
    def complete(self) -> bool:
        """Whether the present layout has every place."""
        return self.layout.places == self._all

    def started(self) -> None:
        """The present layout is up."""
        self._added = ()
        if self.complete:
            self._too_small.clear()

    def lost(self, places: Collection[int], now: float) -> Layout | None:
        """A group that was up is lost, because of its ranks at `places`; none or all of them: of nobody in particular.

        Returns: what to start next; None to give up.
        """
        worn_out = [place for place in self._blamed(places) if self._count(place, now) > self._max_restarts]
        return self._without(worn_out, now) if worn_out else self.layout

    def refused(self, places: Collection[int], now: float) -> Layout | None:
        """The present layout did not start, because of its ranks at `places`; as `lost`."""
        if self._added:
            return self._without(self._added, now)
        if not self.complete and not self.layout.missing:
            self._too_small.add(len(self.layout.places))
            return self._go(self.layout.places)
        blamed = self._blamed(places)
        return self.lost(places, now) if None in blamed else self._without(blamed, now)

    def gone(self, there: Collection[int], now: float) -> Layout | None:
        """Only the places `there` can be had now; what to start in them, None where there is nothing to do but wait."""
        left = [place for place in self.layout.places if place in there]
        if not self._degrade or not left or len(left) == len(self.layout.places):
            return None
        self._added = tuple(place for place in self._added if place in left)
        return self._go(left)

    def better(self, there: Collection[int], now: float) -> Layout | None:
        """The present layout works; return a larger one to replace it by, None where it is not yet time for one."""
        back = [place for place in self._all if place in there and self._shunned.get(place, (0.0,))[0] <= now]
        self._added = tuple(place for place in back if place not in self.layout.places)
        return self._go(sorted({*self.layout.places, *back})) if self._added else None

    def _blamed(self, places: Collection[int]) -> list[int | None]:
        mine = set(self.layout.places)
        known = self._degrade and set(places) < mine and len(places) > 0
        return [*sorted(places)] if known else [None]

    def _count(self, place: int | None, now: float) -> int:
        recent = [when for when in self._losses.get(place, ()) if now - when < WINDOW_SECONDS]
        self._losses[place] = [*recent, now]
        return len(self._losses[place])

    def _without(self, places: Iterable[int | None], now: float) -> Layout | None:
        """Step down; None where nothing is left, or where nobody can be left out."""
        out = {place for place in places if place is not None}
        left = [place for place in self.layout.places if place not in out]
        if not out or not left:
            return None
        for place in out & set(self.layout.places):
            until, wait = self._shunned.get(place, (now - 2 * WINDOW_SECONDS, 0.0))
            wait = RESTORE_SECONDS if now - until > WINDOW_SECONDS else min(2 * wait, WINDOW_SECONDS)
            self._shunned[place] = (now + wait, wait)
        self._added = ()
        return self._go(left)

    def _go(self, places: Iterable[int]) -> Layout:
        present = tuple(places)
        whole = present == self._all or (len(present) not in self._too_small and self._fits(len(present)))
        parts = [expert_range(place, len(self._all), self._num_experts) for place in self._all if place not in present]
        missing = () if whole else tuple(expert for part in parts for expert in part)
        self.layout = Layout(present, missing)
        return self.layout
