"""A CPU rank put together as `rank_process` does it; where the exchange pads, graphs are plain calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from moe_forward import experts
from moe_forward.checkpoint import LayerWeights
from moe_forward.copy_streams import Copies
from moe_forward.cuda_graphs import Work
from moe_forward.exchange import Exchange
from moe_forward.graphed_intake import GraphedIntake
from moe_forward.graphs import GraphedForward
from moe_forward.intake import Intake
from moe_forward.layer_forward import LayerForward, TokenShape
from moe_forward.rank import Rank
from moe_forward.router import Router
from moe_forward.stopwatch import Clock, Stopwatch
from moe_forward.types import ActivationScale, ModelSpec, expert_range

CPU = torch.device("cpu")
MAX_TOKENS = 6
MAX_GRAPH_TOKENS = 4


def make_rank(
    rank: int,
    ranks: int,
    spec: ModelSpec,
    layers: Mapping[int, LayerWeights],
    exchange: Exchange,
    granularity: ActivationScale,
    copies: Copies | None = None,
    start_clock: Callable[[int], Clock] = lambda step: Stopwatch(),
) -> Rank:
    """Make a rank of `ranks` with its part of the experts in `layers`, which has all."""
    mine = expert_range(rank, ranks, spec.num_experts)
    local = {
        layer: experts.LayerExperts(weights.experts[mine.start : mine.stop], weights.shared)
        for layer, weights in layers.items()
    }
    backend = experts.create("reference", local, granularity)
    router = Router(spec, layers, CPU)
    columns = 1 if granularity == "token" else spec.hidden_size // 128
    shared = spec.shared_intermediate_size > 0
    shape = TokenShape(spec.hidden_size, spec.top_k, spec.num_experts, columns, shared, CPU)
    plain, intake = LayerForward(exchange, backend, shape), Intake(router, backend, shape)
    if not exchange.pads:
        return Rank(rank, ranks, spec, intake, plain, start_clock, expert_metrics=True, copies=copies)
    forward = GraphedForward(plain, MAX_TOKENS, MAX_GRAPH_TOKENS, timed=False, record=capture)
    graphed = GraphedIntake(intake, forward, MAX_GRAPH_TOKENS, spec.layers, capture)
    return Rank(rank, ranks, spec, graphed, forward, start_clock, expert_metrics=True, copies=copies)


def capture(work: Work) -> Work:
    """Stand for the capture of a graph: run the work once, and again at each replay."""
    work()
    return work


def without_bias(layers: Mapping[int, LayerWeights]) -> dict[int, LayerWeights]:
    """Return layers as the softmax gate has them."""
    return {layer: replace(weights, gate_bias=None) for layer, weights in layers.items()}
