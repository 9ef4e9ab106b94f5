"""The nouns that travel between the front end, the engine and the ranks.

What is made for every request is a NamedTuple: of a dozen fields, it is made in a tenth of a frozen dataclass' time.

Dimensions everywhere: T tokens, H hidden, I intermediate, E experts, K top-k.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, NamedTuple

GateKind = Literal["deepseek_v3", "softmax"]
ActivationScale = Literal["token", "token_group"]

SCALE_GROUP = 128
"""Channels that share one activation scale when the granularity is `token_group`."""

PHASES = ("route", "quantize", "dispatch", "gemm1", "activation", "gemm2", "combine", "shared_experts", "host_copy")
"""The parts of a step that a rank times, in the order they happen (host_copy is the sum of both ends)."""


class DType(enum.IntEnum):
    """Element types that a tensor in a slab can have."""

    BF16 = 0
    F16 = 1
    F32 = 2
    F8_E4M3 = 3
    I32 = 4
    I64 = 5

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return (2, 2, 4, 1, 4, 8)[self]


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How a layer chooses experts when the client does not.

    kind: which gate (`moe_forward.gates`).
    num_groups, top_groups: DeepSeek-V3's group limit; experts are chosen inside the best `top_groups` of `num_groups`.
    normalize: divide the chosen weights by their sum.
    scaling_factor: multiply the chosen weights.
    """

    kind: GateKind
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    scaling_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a checkpoint's MoE layers look like.

    name: the name the model is served under.
    hidden_size, intermediate_size: H and I of one routed expert.
    num_experts, top_k: E and K.
    shared_intermediate_size: I of the shared expert, 0 where the model has none.
    layers: ids of the served MoE layers, ascending.
    group_size: input channels that share one weight scale.
    gate: routing when the client sends neither ids nor logits.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int
    layers: tuple[int, ...]
    group_size: int
    gate: GateSpec


class Routing(enum.IntEnum):
    """Who chose the experts of a request."""

    SERVER = 0
    TOPK = 1
    LOGITS = 2


class TensorRef(NamedTuple):
    """A row-major tensor [tokens, columns] inside a front end's slab.

    offset: bytes from the start of the slab (any alignment).
    columns: elements of one row.
    """

    offset: int
    dtype: DType
    columns: int


class ForwardRequest(NamedTuple):
    """One request as the engine and the ranks see it; its bytes stay in the slab of front end `front`.

    front: front end that owns the slab. request: that front end's id, never reused.
    layer, tokens: which layer, how many rows (>= 1).
    deadline_seconds: on CLOCK_MONOTONIC, which all processes of a host share.
    shared_experts: add the shared experts' output.
    hidden: [T, H] BF16, F16, F32 or F8_E4M3.
    hidden_scales: [T, 1] or [T, H/128] F32 for fp8 input, else None.
    routing: TOPK reads `chosen` as ids [T, K] I32 or I64 and `weights` [T, K] F32; LOGITS reads `chosen` as
        router logits [T, E] F32 or BF16; SERVER reads neither.
    output: [T, H] where the ranks write the result.
    client: stable 64-bit number of who sent it, for fairness; the same from every front end.
    """

    front: int
    request: int
    layer: int
    tokens: int
    deadline_seconds: float
    shared_experts: bool
    hidden: TensorRef
    hidden_scales: TensorRef | None
    routing: Routing
    chosen: TensorRef | None
    weights: TensorRef | None
    output: TensorRef
    client: int = 0


class Step(NamedTuple):
    """One collective forward of one layer over all ranks.

    step: number, ascending. generation: the rank group it was made for; replies of another generation are dropped.
    requests: whose rows the step holds, in row order.
    """

    step: int
    generation: int
    layer: int
    requests: tuple[ForwardRequest, ...]

    @property
    def tokens(self) -> int:
        """Rows of the step over all requests."""
        return sum(request.tokens for request in self.requests)


class StepResult(NamedTuple):
    """What one rank reports of one step.

    phase_seconds: one figure for each of `PHASES`; empty where this rank did not time the step (GPU ranks time one in
        `phase_sample_steps`).
    routed_rows: rows this rank's experts computed.
    requantized_tokens: fp8 rows that came with the other granularity.
    non_finite: indexes into `Step.requests` of requests with NaN or Inf in the rows this rank read.
    error: empty, or why this rank could not do the step (its group is then lost).
    dispatch_bytes, combine_bytes: payload that came from other ranks, and that went back to them.
    expert_rows: rows of each of this rank's experts in id order; empty unless `expert_metrics` is set.
    missing_routes: for each of `Step.requests`, routes of the rows this rank read to experts that its group lacks;
        empty where there are none.
    """

    step: int
    generation: int
    rank: int
    phase_seconds: tuple[float, ...]
    routed_rows: int
    requantized_tokens: int = 0
    non_finite: tuple[int, ...] = ()
    error: str = ""
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    expert_rows: tuple[int, ...] = ()
    missing_routes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A rank as `GET /v1/ranks` and `/v1/placement` show it.

    state: starting, ready or lost. since: Unix time of the last change of state.
    device: cpu or cuda:0 and so on. memory_bytes: weights it holds.
    experts: ids [first, last) of every layer it holds, without those in `EngineStatus.missing`.
    buffer_bytes, free_bytes: of its GPU once it is warm, what is taken beside the weights and what is left; 0 on CPU.
    capacity_bytes: of its GPU that were free before it loaded anything; 0 on CPU.
    """

    rank: int
    state: Literal["starting", "ready", "lost"]
    since: float
    pid: int = 0
    node: str = ""
    device: str = ""
    experts: tuple[int, int] = (0, 0)
    memory_bytes: int = 0
    buffer_bytes: int = 0
    free_bytes: int = 0
    load_seconds: float = 0.0
    capacity_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The engine as a front end knows it.

    ready: every rank of `generation` is up and warm. reason: why not, else empty; it starts with "failed:" when the
        group cannot come back by itself.
    lost: a rank of `generation` died or hung, and the group waits to be started again.
    backend, kernel: the exchange and the experts that the ranks chose.
    lacking_ranks: how many fewer ranks the group has than were asked for.
    missing: ids of the experts that no rank of the group holds, ascending; routes to them add nothing.
    """

    ready: bool = False
    lost: bool = False
    generation: int = 0
    reason: str = "the engine has not reported yet"
    ranks: tuple[RankInfo, ...] = ()
    restarts: int = 0
    backend: str = ""
    kernel: str = ""
    lacking_ranks: int = 0
    missing: tuple[int, ...] = ()

    @property
    def missing_experts(self) -> int:
        """How many experts the group lacks."""
        return len(self.missing)


class ForwardResult(NamedTuple):
    """How a request ended, as the engine tells its front end.

    code: None when the output is in the slab, else why not, with `message` and `retry_after_seconds`.
    queue_seconds: from its arrival until its step could begin, be it in the queue or, sent ahead, behind another step.
    step_seconds: from when the step could begin (sent, and the one before it done) until all ranks had answered.
    batch_tokens, batch_requests: the step it was part of.
    held: ranks of a lost group may still touch the request's bytes; a `Released` message follows when they are gone.
    step, generation: the step it was part of, and its rank group; None and 0 for a request that no step answered.
    missing_experts: that this group lacked. missing_routes: routes of the request to them, which added nothing.
    """

    front: int
    request: int
    code: int | None = None
    message: str = ""
    retry_after_seconds: float | None = None
    queue_seconds: float = 0.0
    step_seconds: float = 0.0
    batch_tokens: int = 0
    batch_requests: int = 0
    held: bool = False
    step: int | None = None
    generation: int = 0
    missing_routes: int = 0
    missing_experts: int = 0


class StepReport(NamedTuple):
    """One finished step, for the metrics of one front end: the results of all ranks, and the queue behind it."""

    layer: int
    tokens: int
    requests: int
    queue_requests: int
    queue_tokens: int
    results: tuple[StepResult, ...] = ()


class QueueReport(NamedTuple):
    """What waits in the engine's queue now, for the metrics of one front end; told after it has changed."""

    requests: int
    tokens: int


def expert_range(rank: int, ranks: int, num_experts: int) -> range:
    """Expert ids that `rank` of `ranks` holds: contiguous, sizes differing by at most one.

    Returns: ids ascending; every expert is on exactly one rank.
    """
    return range(rank * num_experts // ranks, (rank + 1) * num_experts // ranks)


def token_range(rank: int, ranks: int, tokens: int) -> range:
    """Rows of a step that `rank` of `ranks` reads, routes and answers: contiguous, sizes differing by at most one."""
    return range(rank * tokens // ranks, (rank + 1) * tokens // ranks)
