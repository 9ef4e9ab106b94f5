"""How tokens reach the ranks of their experts: one file an exchange, one entry in `EXCHANGES`."""

from __future__ import annotations

import logging
from collections.abc import Callable

from moe_forward.errors import StartError
from moe_forward.exchange.base import Dispatched, Exchange, Meeting, Place
from moe_forward.exchange.deepep_package import missing_deepep

__all__ = ["EXCHANGES", "Dispatched", "Exchange", "Meeting", "Place", "choose", "create"]

log = logging.getLogger(__name__)


def _local(place: Place) -> Exchange:
    from moe_forward.exchange.local import LocalExchange

    return LocalExchange(place.num_experts, pads=place.device.type == "cuda")


def _gloo(place: Place) -> Exchange:
    from moe_forward.exchange.gloo import GlooExchange

    return GlooExchange(place)


def _nccl(place: Place) -> Exchange:
    from moe_forward.exchange.nccl import NcclExchange

    return NcclExchange(place)


def _deepep(place: Place) -> Exchange:
    from moe_forward.exchange.deepep import DeepEPExchange

    return DeepEPExchange(place)


EXCHANGES: dict[str, Callable[[Place], Exchange]] = {
    "local": _local,
    "gloo": _gloo,
    "nccl": _nccl,
    "deepep": _deepep,
}
"""Name -> factory; a factory imports its module only when it is asked for."""


def choose(name: str, ranks: int, device: str) -> str:
    """Resolve `auto`: local for one rank, gloo on CPU; on GPUs deepep where it is installed, else nccl, and log why.

    device: cpu or cuda.
    Raises: StartError for an exchange that does not exist, cannot serve `device`, or is not installed.
    """
    if name == "auto":
        name = "local" if ranks == 1 else "gloo" if device == "cpu" else _choose_between_gpus()
    if name not in EXCHANGES:
        raise StartError(f"exchange {name} is not part of this version; it has {', '.join(sorted(EXCHANGES))}")
    if name == "local" and ranks != 1:
        raise StartError(f"exchange local serves one rank, not {ranks}; use {'gloo' if device == 'cpu' else 'auto'}")
    if name == "gloo" and device != "cpu":
        raise StartError(f"exchange gloo serves CPU ranks, not {device}; use deepep or nccl")
    if name in ("nccl", "deepep") and device == "cpu":
        raise StartError(f"exchange {name} serves GPU ranks, not cpu; use gloo")
    if name == "deepep" and (missing := missing_deepep()):
        raise StartError(f"exchange deepep: {missing}; or use exchange nccl")
    return name


def _choose_between_gpus() -> str:
    missing = missing_deepep()
    if missing:
        log.warning("exchange nccl instead of the faster deepep: %s", missing)
        return "nccl"
    log.info("exchange deepep: DeepEP V2 is installed")
    return "deepep"


def create(name: str, place: Place) -> Exchange:
    """Join the group: every rank of it calls this, and it returns when all have.

    It may wait for ever for a rank that died: put `deadline` around it.
    name: as `choose` resolved it.
    Raises: StartError when this machine cannot carry the exchange, saying what it lacks.
    """
    return EXCHANGES[name](place)
