"""What processes tell each other, beside the nouns of `types` that travel too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from moe_forward.types import (
    EngineStatus,
    ForwardRequest,
    ForwardResult,
    QueueReport,
    RankInfo,
    Step,
    StepReport,
    StepResult,
)


@dataclass(frozen=True, slots=True)
class FrontHello:
    """Front end to engine, with the slab's descriptor: here is my memory."""

    slab_bytes: int


@dataclass(frozen=True, slots=True)
class FrontWelcome:
    """Engine to front end: your number. No rank of an earlier engine lives any more."""

    front: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Front end to engine: nobody waits for this request; drop it if it is still queued."""

    request: int


@dataclass(frozen=True, slots=True)
class Released:
    """Engine to front end: no rank can touch the bytes of these requests any more (see `ForwardResult.held`)."""

    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Announce:
    """Supervisor to engine: which rank group to expect. An empty `failed` means that it is being started."""

    generation: int
    ranks: int
    restarts: int
    failed: str = ""


@dataclass(frozen=True, slots=True)
class RankHello:
    """Rank to engine: loaded, warm and waiting for steps of `generation`."""

    generation: int
    info: RankInfo
    backend: str
    kernel: str


@dataclass(frozen=True, slots=True)
class AttachSlab:
    """Engine to rank, with the descriptor: requests of `front` lie in this memory."""

    front: int
    slab_bytes: int


@dataclass(frozen=True, slots=True)
class DetachSlab:
    """Engine to rank: that front end is gone."""

    front: int


Message: TypeAlias = (
    ForwardRequest
    | ForwardResult
    | Step
    | StepResult
    | StepReport
    | QueueReport
    | EngineStatus
    | FrontHello
    | FrontWelcome
    | Cancel
    | Released
    | Announce
    | RankHello
    | AttachSlab
    | DetachSlab
)
