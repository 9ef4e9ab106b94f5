"""How tokens reach the ranks of their experts: one file an exchange, one entry in `EXCHANGES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_forward.errors import StartError
from moe_forward.exchange.base import Dispatched, Exchange

__all__ = ["EXCHANGES", "Dispatched", "Exchange", "Place", "choose", "create"]


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in a group.

    rank, ranks, num_experts: who, of how many, sharing which E experts.
    rendezvous: a file that every rank of the group sees and no other group uses.
    timeout_seconds: of one collective.
    """

    rank: int
    ranks: int
    num_experts: int
    rendezvous: Path
    timeout_seconds: float


def _local(place: Place) -> Exchange:
    from moe_forward.exchange.local import LocalExchange

    return LocalExchange(place.num_experts)


def _gloo(place: Place) -> Exchange:
    from moe_forward.exchange.gloo import GlooExchange

    return GlooExchange(place.rank, place.ranks, place.num_experts, place.rendezvous, place.timeout_seconds)


EXCHANGES: dict[str, Callable[[Place], Exchange]] = {"local": _local, "gloo": _gloo}
"""Name -> factory; a factory imports its module only when it is asked for."""


def choose(name: str, ranks: int, device: str) -> str:
    """Resolve `auto`: local for one rank, gloo on CPU, deepep on GPUs.

    Raises: StartError for an exchange that this version does not have, or that cannot serve `device`.
    """
    if name == "auto":
        name = "local" if ranks == 1 else "gloo" if device == "cpu" else "deepep"
    if name not in EXCHANGES:
        raise StartError(f"exchange {name} is not part of this version; it has {', '.join(sorted(EXCHANGES))}")
    if name == "local" and ranks != 1:
        raise StartError(f"exchange local serves one rank, not {ranks}; use gloo on CPU")
    if name == "gloo" and device != "cpu":
        raise StartError(f"exchange gloo serves CPU ranks, not {device}")
    return name


def create(name: str, place: Place) -> Exchange:
    """Join the group: every rank of it calls this, and it returns when all have.

    name: as `choose` resolved it.
    """
    return EXCHANGES[name](place)
