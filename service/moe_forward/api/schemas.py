"""Bodies of the JSON calls, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from moe_forward.types import GateKind


class ErrorBody(BaseModel):
    """Every error of every route."""

    error: str = Field(description="One sentence naming the tensor or parameter, what was expected and what came.")
    code: str = Field(description="Slug of the error, stable across versions.")
    request_id: str = Field(description="As in the X-Request-Id header and in the log.")


class Live(BaseModel):
    """The process answers and the service works or can come back by itself."""

    live: Literal[True] = True


class Ready(BaseModel):
    """A forward sent now is taken."""

    ready: Literal[True] = True


class ModelReady(Ready):
    """A forward of this model sent now is taken."""

    name: str


class PlacementRank(BaseModel):
    """Where one shard lies."""

    rank: int
    node: str
    device: str
    experts: dict[int, list[int]] = Field(description="Layer -> ids of the experts this rank holds.")


class Placement(BaseModel):
    """The model's dimensions and which expert is on which rank."""

    model: str
    hidden_size: int
    num_experts: int
    top_k: int
    shared_experts: bool = Field(description="Whether the layers have shared experts, added unless a request says no.")
    gate: GateKind = Field(description="How a layer chooses experts when the client does not.")
    layers: list[int]
    generation: int = Field(description="Number of the rank group; another number means that it was started again.")
    ranks: list[PlacementRank]
    missing_experts: list[int] = Field(
        description="Experts that no rank holds (on_rank_loss: degrade); routes to them add nothing."
    )


class Rank(BaseModel):
    """One rank's state."""

    rank: int
    state: Literal["starting", "ready", "lost"]
    since: float = Field(description="Unix time in seconds of the last change of state.")
    pid: int
    node: str
    device: str
    tokens: int = Field(description="Rows its experts computed since this front end started.")
    memory: int = Field(description="Bytes of weights it holds.")


class Ranks(BaseModel):
    """All ranks of the current group."""

    ranks: list[Rank]


class Drained(BaseModel):
    """What draining still waits for."""

    draining: Literal[True] = True
    inflight_requests: int = Field(description="Forwards still being served; ask again until it is 0.")
