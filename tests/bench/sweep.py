"""The order in which a sweep looks at shapes: spread over all axes first, then near those where a peer came close."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from cases import ROWS, Case

BATCH = 12
"""Cases whose kernels are compiled at a time; of them up to half are neighbours of close ones."""

CLOSE = 1.1
"""A peer is close where ours is less than this many times faster."""


class SweepPlan:
    """Which cases come next. cases: all there are."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases
        self._order = covering_order(cases)
        self._planned: set[str] = set()
        self._close: list[tuple[float, Case]] = []

    def next_batch(self) -> list[Case]:
        """Return the next cases, those of one shape side by side; empty when all have been planned."""
        closest = [case for _, case in sorted(self._close, key=lambda noted: noted[0])]
        near = itertools.chain.from_iterable(neighbours(case, self._cases) for case in closest)
        batch = [*self._take(near, BATCH // 2)]
        batch += self._take(self._order, BATCH - len(batch))
        return sorted(batch, key=lambda case: case.shape)

    def note(self, case: Case, times_faster: float | None) -> None:
        """Remember how a case went. times_faster: ours against the best peer, None where there was none."""
        if times_faster is not None and times_faster < CLOSE:
            self._close.append((times_faster, case))

    def _take(self, cases: Iterable[Case], count: int) -> list[Case]:
        taken: list[Case] = []
        for case in cases if count else ():
            if case.name not in self._planned:
                self._planned.add(case.name)
                taken.append(case)
            if len(taken) == count:
                break
        return taken


def covering_order(cases: Iterable[Case], seed: int = 0) -> Iterator[Case]:
    """Yield cases so that every pair of axis values is met early: each time one of those with the most unmet pairs."""
    left = list(cases)
    random.Random(seed).shuffle(left)
    met: set[tuple[object, ...]] = set()
    while left:
        best = max(left, key=lambda case: len(_pairs(case) - met))  # the first of the best, in shuffled order
        met |= _pairs(best)
        left.remove(best)
        yield best


def _pairs(case: Case) -> set[tuple[object, ...]]:
    axes = (case.experts, case.hidden, case.intermediate, case.rows, case.skew)
    return {(i, j, axes[i], axes[j]) for i, j in itertools.combinations(range(len(axes)), 2)}


def neighbours(case: Case, cases: Iterable[Case]) -> list[Case]:
    """Those of `cases` that have the weights of `case` and differ by one step of rows or by their skew."""
    at = ROWS.index(case.rows)
    near = ROWS[max(0, at - 1) : at + 2]
    return [
        other
        for other in cases
        if other.shape == case.shape
        and ((other.skew == case.skew) != (other.rows == case.rows))
        and (other.rows in near)
    ]
