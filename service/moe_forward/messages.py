"""What processes tell each other, beside the nouns of `types` that travel too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

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


class Ticket(NamedTuple):
    """A `ForwardRequest` as the engine sees it: what it decides by. The rest stays packed, for the ranks.

    packed: the whole request, as its front end sent it.
    """

    front: int
    request: int
    layer: int
    tokens: int
    deadline_seconds: float
    client: int = 0
    packed: bytes = b""


class StepOrder(NamedTuple):
    """Engine to ranks: a step of these tickets. A rank reads it as a `Step` of the whole requests."""

    step: int
    generation: int
    layer: int
    tickets: tuple[Ticket, ...]


class RankWord(NamedTuple):
    """A `StepResult` as the engine sees it: what it goes by. The rest stays packed, for the metrics.

    packed: the whole result, as its rank sent it.
    """

    step: int
    generation: int
    rank: int
    packed: bytes
    non_finite: tuple[int, ...] = ()
    missing_routes: tuple[int, ...] = ()
    error: str = ""


class StepSummary(NamedTuple):
    """Engine to front end: a finished step. A front end reads it as a `StepReport` of the whole results."""

    layer: int
    tokens: int
    requests: int
    queue_requests: int
    queue_tokens: int
    results: tuple[RankWord, ...]


class StepAnswers(NamedTuple):
    """Engine to front end: how its requests in one step ended; `ForwardResult` says what the figures are.

    requests, queue_seconds: one of each for every request.
    non_finite: positions in `requests` of those that are refused for NaN or Inf. missing_routes: of each request;
        empty where there are none.
    """

    step: int
    generation: int
    batch_tokens: int
    batch_requests: int
    missing_experts: int
    step_seconds: float
    requests: tuple[int, ...]
    queue_seconds: tuple[float, ...]
    non_finite: tuple[int, ...] = ()
    missing_routes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FrontHello:
    """Front end to engine, with the slab's descriptor: here is my memory.

    wants_reports: of finished steps and of what waits; the engine tells each to one of those who do.
    """

    slab_bytes: int
    wants_reports: bool = True


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
    """Supervisor to engine: which rank group to expect. An empty `failed` means that it is being started.

    lacking_ranks, missing: what the group lacks, as `EngineStatus` has it.
    after_steps: the present group works; let it finish the steps that run, and form no more.
    """

    generation: int
    ranks: int
    restarts: int
    failed: str = ""
    lacking_ranks: int = 0
    missing: tuple[int, ...] = ()
    after_steps: bool = False


@dataclass(frozen=True, slots=True)
class RankHello:
    """Rank to engine: loaded, warm and waiting for steps of `generation`."""

    generation: int
    info: RankInfo
    backend: str
    kernel: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Rank to engine, now and then: this process runs."""

    generation: int
    rank: int


@dataclass(frozen=True, slots=True)
class Alive:
    """Engine to front end, and front process to the service's, now and then: my loop turns."""


@dataclass(frozen=True, slots=True)
class AttachSlab:
    """Engine to rank, with the descriptor: requests of `front` lie in this memory."""

    front: int
    slab_bytes: int


@dataclass(frozen=True, slots=True)
class DetachSlab:
    """Engine to rank: that front end is gone."""

    front: int


@dataclass(frozen=True, slots=True)
class FrontUp:
    """Front process to the service's: connections may come."""


@dataclass(frozen=True, slots=True)
class FrontFailed:
    """Front process to the service's, its last word: why it cannot serve."""

    reason: str


@dataclass(frozen=True, slots=True)
class TakeConnection:
    """Service to front process, with a descriptor: this HTTP connection is yours."""


@dataclass(frozen=True, slots=True)
class ConnectionGone:
    """Front process to the service's: one of the connections that I took is closed."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Service to front process: refuse what is new, and say what is in flight. The other way: an operator asked me."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """Answer to `Drain`: forwards that this front end serves, or all the others together."""

    requests: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Service to front process: drain, answer what is in flight, end."""


@dataclass(frozen=True, slots=True)
class RankTokens:
    """Service to front process: rows that each rank's experts computed, by rank, since the service started."""

    tokens: tuple[tuple[int, int], ...]


Labels: TypeAlias = tuple[tuple[str, str], ...]
SampleValue: TypeAlias = tuple[str, str, Labels, float, tuple[Labels, float, float] | None]


@dataclass(frozen=True, slots=True)
class FrontSamples:
    """Front process to the service's: its metrics as they are now.

    samples: (family, name, labels, value, exemplar) each; exemplar: (labels, value, Unix seconds), or None.
    """

    samples: tuple[SampleValue, ...]


class Several(NamedTuple):
    """Messages to one peer, in order, in one datagram: a system call and a wake-up cost more than all of them."""

    messages: tuple[Message, ...]


Message: TypeAlias = (
    ForwardRequest
    | Ticket
    | ForwardResult
    | StepAnswers
    | StepOrder
    | Step
    | StepResult
    | RankWord
    | StepReport
    | StepSummary
    | QueueReport
    | EngineStatus
    | FrontHello
    | FrontWelcome
    | Cancel
    | Released
    | Announce
    | RankHello
    | Heartbeat
    | Alive
    | AttachSlab
    | DetachSlab
    | FrontUp
    | FrontFailed
    | TakeConnection
    | ConnectionGone
    | Drain
    | InFlight
    | Stop
    | RankTokens
    | FrontSamples
    | Several
)
