"""The calls that read: protocol metadata, health, placement and ranks."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from moe_forward.api.availability import Availability
from moe_forward.api.ports import Link
from moe_forward.api.reports import Reports
from moe_forward.api.schemas import ErrorBody, Live, ModelReady, Placement, PlacementRank, Rank, Ranks, Ready
from moe_forward.metrics import package_version
from moe_forward.types import EngineStatus, ModelSpec
from moe_forward.wire.oip import check_model, model_metadata, server_metadata

UNKNOWN_MODEL: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No such model or version."}}
UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"model": ErrorBody, "description": "The error says why not."}}


def placement(spec: ModelSpec, status: EngineStatus) -> Placement:
    """Return which rank holds which experts of which layer."""
    missing = set(status.missing)
    ranks = [
        PlacementRank(
            rank=info.rank,
            node=info.node,
            device=info.device,
            experts={layer: [id for id in range(*info.experts) if id not in missing] for layer in spec.layers},
        )
        for info in status.ranks
    ]
    return Placement(
        model=spec.name,
        hidden_size=spec.hidden_size,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        shared_experts=spec.shared_intermediate_size > 0,
        gate=spec.gate.kind,
        layers=list(spec.layers),
        generation=status.generation,
        ranks=ranks,
        missing_experts=list(status.missing),
    )


def ranks(status: EngineStatus, reports: Reports) -> Ranks:
    """Return the state of every rank."""
    return Ranks(
        ranks=[
            Rank(
                rank=info.rank,
                state=info.state,
                since=info.since,
                pid=info.pid,
                node=info.node,
                device=info.device,
                tokens=reports.rank_tokens[info.rank],
                memory=info.memory_bytes,
            )
            for info in status.ranks
        ]
    )


def status_router(spec: ModelSpec, link: Link, availability: Availability, reports: Reports) -> APIRouter:
    """Return the GET routes over one link."""
    router = APIRouter()

    def check_ready() -> None:
        refusal = availability.refusal()
        if refusal is not None:
            raise refusal

    @router.get("/v2", tags=["protocol"])
    async def server() -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return server_metadata(package_version("moe-forward"))

    @router.get("/v2/health/live", tags=["health"], responses=UNAVAILABLE)
    async def live() -> Live:
        """Whether the service works or can come back by itself."""
        failure = availability.failure()
        if failure is not None:
            raise failure
        return Live()

    @router.get("/v2/health/ready", tags=["health"], responses=UNAVAILABLE)
    async def ready() -> Ready:
        """Whether every needed rank is up, loaded and warm, and the service is not draining."""
        check_ready()
        return Ready()

    @router.get("/v2/models/{model}/versions/{version}", tags=["protocol"], responses=UNKNOWN_MODEL)
    @router.get("/v2/models/{model}", tags=["protocol"], responses=UNKNOWN_MODEL)
    async def model_description(model: str, version: str | None = None) -> dict[str, Any]:
        """Versions, inputs and outputs of the model."""
        check_model(model, version, spec)
        return model_metadata(spec)

    @router.get(
        "/v2/models/{model}/versions/{version}/ready", tags=["health"], responses={**UNKNOWN_MODEL, **UNAVAILABLE}
    )
    @router.get("/v2/models/{model}/ready", tags=["health"], responses={**UNKNOWN_MODEL, **UNAVAILABLE})
    async def model_ready(model: str, version: str | None = None) -> ModelReady:
        """Whether a forward of the model would be taken now."""
        check_model(model, version, spec)
        check_ready()
        return ModelReady(name=spec.name)

    @router.get("/v1/placement", tags=["ranks"])
    async def show_placement() -> Placement:
        """Which rank holds which experts."""
        return placement(spec, link.status)

    @router.get("/v1/ranks", tags=["ranks"])
    async def show_ranks() -> Ranks:
        """State of every rank."""
        return ranks(link.status, reports)

    return router
