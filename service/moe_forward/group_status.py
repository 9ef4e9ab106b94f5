"""How the engine's status changes with its rank group: announced, joined rank by rank, lost. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from moe_forward.messages import Announce, RankHello
from moe_forward.types import EngineStatus, RankInfo


def announced(announce: Announce, now: float) -> EngineStatus:
    """Return the status while the ranks of a new group are being started. now: Unix time."""
    return EngineStatus(
        generation=announce.generation,
        ranks=tuple(RankInfo(rank, "starting", now) for rank in range(announce.ranks)),
        restarts=announce.restarts,
        reason=f"waiting for {announce.ranks} of {announce.ranks} ranks",
        lacking_ranks=announce.lacking_ranks,
        missing=announce.missing,
    )


def expects(status: EngineStatus, hello: RankHello) -> bool:
    """Tell whether a rank belongs to the group and may join it now."""
    same_group = hello.generation == status.generation and not status.lost
    return same_group and hello.info.rank < len(status.ranks)


def joined(status: EngineStatus, hello: RankHello, now: float) -> EngineStatus:
    """Return the status with one more rank ready."""
    infos = _replaced(status.ranks, replace(hello.info, state="ready", since=now))
    missing = sum(info.state != "ready" for info in infos)
    reason = f"waiting for {missing} of {len(infos)} ranks" if missing else ""
    return replace(status, ranks=infos, reason=reason, ready=not missing, backend=hello.backend, kernel=hello.kernel)


def lost(status: EngineStatus, reason: str, ranks: Iterable[int], now: float) -> EngineStatus:
    """Return the status of a lost group. ranks: whose loss it was."""
    infos = status.ranks
    for rank in ranks:
        infos = _replaced(infos, replace(infos[rank], state="lost", since=now))
    return replace(status, ready=False, lost=True, ranks=infos, reason=reason)


def _replaced(infos: tuple[RankInfo, ...], info: RankInfo) -> tuple[RankInfo, ...]:
    return (*infos[: info.rank], info, *infos[info.rank + 1 :])
