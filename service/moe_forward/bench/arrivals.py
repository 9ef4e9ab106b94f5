"""When an open loop means to send: moments that do not depend on the answers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Literal

Arrivals = Literal["poisson", "constant"]


def constant(rate: float, phase: float = 0.0) -> Iterator[float]:
    """Yield seconds from the start, 1/rate apart. phase: share of an interval before the first."""
    for number in itertools.count():
        yield (number + phase) / rate


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Yield seconds from the start with exponential gaps of mean 1/rate, as many independent clients arrive."""
    chance = random.Random(seed)
    moment = 0.0
    while True:
        moment += chance.expovariate(rate)
        yield moment


def arrivals(kind: Arrivals, rate: float, seed: int, part: int, parts: int) -> Iterator[float]:
    """Yield the moments of one of `parts` processes that together send `rate` requests a second."""
    if kind == "constant":
        return constant(rate / parts, part / parts)
    return poisson(rate / parts, seed)
