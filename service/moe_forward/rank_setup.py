"""What a rank's process is told at its start, and how a rank is put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from moe_forward import exchange, memory_plan
from moe_forward.copy_streams import copies_of
from moe_forward.cuda_graphs import CudaGraphs
from moe_forward.exchange import Meeting
from moe_forward.expert_map import expert_map, held_experts, shard
from moe_forward.experts import Experts
from moe_forward.graphed_intake import GraphedIntake
from moe_forward.graphs import GraphedForward
from moe_forward.handshake import Address
from moe_forward.intake import Intake
from moe_forward.layer_forward import LayerForward, TokenShape
from moe_forward.memory_plan import MemoryPlan
from moe_forward.rank import Rank
from moe_forward.router import Router
from moe_forward.stopwatch import Clock, start_clock
from moe_forward.types import SCALE_GROUP, ActivationScale, ModelSpec

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class RankSetup:
    """Everything a rank's process is told at its start.

    device: cpu or cuda:0 and so on. folder: the checkpoint. socket_path: where the engine listens.
    rendezvous: the group's meeting file, or where it meets over TCP.
    exchange, experts: names as resolved, never `auto`. threads: for torch.
    max_tokens: rows of one step on one rank at most; on a GPU, a step with more goes in chunks.
    max_graph_tokens: up to this many rows a GPU runs a step as a graph.
    phase_sample_steps: a GPU rank times the phases of one step in this many; 0: of none.
    step_timeout_seconds: of one collective. start_timeout_seconds: until the group is joined and warm.
    expert_metrics: report the rows of every expert with each step.
    on_load_scales: of experts that are quantized while loading, as `moe-forward quantize --scales` takes them.
    host: this host's address towards the other ranks. gateway: where to reach an engine of another host.
    missing: ids of experts that nobody in the group holds.
    silence_seconds: after which the engine takes a rank for lost that sends no heartbeat.
    poll_seconds: how long engine and ranks look for a message before they sleep.
    """

    rank: int
    ranks: int
    generation: int
    device: str
    folder: Path
    spec: ModelSpec
    socket_path: Path
    rendezvous: Path | Meeting
    exchange: str
    experts: str
    activation_scale: ActivationScale
    threads: int
    max_tokens: int
    max_graph_tokens: int
    phase_sample_steps: int
    step_timeout_seconds: float
    start_timeout_seconds: float
    expert_metrics: bool = False
    on_load_scales: Literal["rtn", "search"] = "rtn"
    host: str = LOOPBACK
    gateway: Address | None = None
    missing: tuple[int, ...] = ()
    silence_seconds: float = 10.0
    poll_seconds: float = 0.0

    @property
    def experts_held(self) -> tuple[int, ...]:
        """Ids of the experts that this rank holds, ascending."""
        return shard(self.rank, self.ranks, self.spec.num_experts, self.missing)


def resized(setup: RankSetup, ranks: int, missing: tuple[int, ...]) -> RankSetup:
    """Return the setup for a group of so many ranks, without some experts.

    A rank takes no more tokens at once than before, so that its buffers do not grow where memory becomes scarce. Fewer
    ranks do without DeepEP: its kernels are compiled for a number of ranks, which takes minutes and a compiler.
    """
    exchange_name = setup.exchange
    if ranks < setup.ranks:
        exchange_name = "local" if ranks == 1 else "nccl" if exchange_name == "deepep" else exchange_name
    return replace(setup, ranks=ranks, exchange=exchange_name, missing=missing)


def planned_memory(setup: RankSetup) -> MemoryPlan:
    """Work out what the rank that holds most will need."""
    return memory_plan.plan(
        setup.spec,
        setup.ranks,
        setup.exchange,
        setup.experts,
        setup.max_tokens,
        setup.activation_scale,
        max_graph_tokens=setup.max_graph_tokens,
        missing_experts=len(setup.missing),
    )


def all_experts_fit(setup: RankSetup, ranks: int, capacity_bytes: int) -> bool:
    """Tell whether `ranks` ranks can hold all experts.

    capacity_bytes: of each rank's GPU; 0 for ranks on CPU, whose weights are mapped files and need not fit.
    """
    return capacity_bytes == 0 or planned_memory(resized(setup, ranks, ())).total_bytes <= capacity_bytes


def join_group(setup: RankSetup, router: Router, local_experts: Experts) -> Rank:
    """Join the group of ranks, which returns when all have, and make this rank of it."""
    spec, device = setup.spec, torch.device(setup.device)
    columns = 1 if setup.activation_scale == "token" else spec.hidden_size // SCALE_GROUP
    num_experts = len(held_experts(spec.num_experts, setup.missing))
    group = exchange.create(
        setup.exchange,
        exchange.Place(
            rank=setup.rank,
            ranks=setup.ranks,
            num_experts=num_experts,
            rendezvous=setup.rendezvous,
            timeout_seconds=setup.step_timeout_seconds,
            device=device,
            hidden_size=spec.hidden_size,
            top_k=spec.top_k,
            max_tokens=setup.max_tokens,
            scale_columns=columns,
        ),
    )
    shared = spec.shared_intermediate_size > 0
    shape = TokenShape(spec.hidden_size, spec.top_k, num_experts, columns, shared, device)
    plain = LayerForward(group, local_experts, shape)

    def clock(step: int) -> Clock:
        return start_clock(step, device, setup.phase_sample_steps)

    who, copies = (setup.rank, setup.ranks, spec), copies_of(device, kernels=setup.experts == "cutlass")
    numbers = expert_map(spec.num_experts, setup.missing, device) if setup.missing else None
    intake = Intake(router, local_experts, shape, numbers)
    if not group.pads:
        return Rank(*who, intake, plain, clock, setup.expert_metrics, setup.missing, copies)
    graph_tokens = min(setup.max_graph_tokens, setup.max_tokens) if local_experts.capturable else 0
    graphs = CudaGraphs()
    forward = GraphedForward(plain, setup.max_tokens, graph_tokens, setup.phase_sample_steps > 0, graphs)
    graphed = GraphedIntake(intake, forward, graph_tokens, spec.layers, graphs)
    return Rank(*who, graphed, forward, clock, setup.expert_metrics, setup.missing, copies)
