"""What a rank will hold in memory, worked out before anything is loaded.

Weights, rows and buffers follow from shapes. Nobody documents what the driver, NCCL, CUDA graphs and the allocator
take: those lines are estimates and say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_forward.cuda_graphs import buckets
from moe_forward.errors import StartError
from moe_forward.exchange import Place, nccl
from moe_forward.types import ActivationScale, ModelSpec, expert_range
from w4afp8 import packed, packed_fp8
from w4afp8.activations import scale_columns
from w4afp8.tensors import FP8_BLOCK

MIB = 1 << 20

CUDA_BYTES = 1024 * MIB  # kernel modules, cuBLAS workspaces, what the allocator rounds up; a context is there before
NCCL_BYTES = 1024 * MIB  # channels to the other GPUs
DEEPEP_WORKSPACE_BYTES = 16 * MIB
STAGING_BYTES = 512 * MIB  # weights on their way to a GPU ahead of their layer, and temporaries of packing one expert

GRAPHS_OF_A_SIZE = 5  # of a layer: the intake, and the forward with and without shared experts and phase times
GRAPH_BYTES = MIB  # some thirty kernels with their arguments
GRAPH_POOL_FACTOR = 2  # memory of all graphs over that of the largest: blocks of different sizes share it badly

ROUTER_BLOCK = 1 << 24  # elements of tokens that routing holds in float64 at a time (w4afp8.linear)


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One line of a plan. note: shape or origin."""

    name: str
    size_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of the rank that holds most.

    title: what it is for. weights: held for as long as the rank lives. loading: while they are brought, given back
    then. serving: from then on, up to the largest step. layers: how many share `weights`.
    """

    title: str
    weights: tuple[MemoryItem, ...]
    loading: tuple[MemoryItem, ...]
    serving: tuple[MemoryItem, ...]
    layers: int

    @property
    def total_bytes(self) -> int:
        """The most that is taken at any time."""
        return _sum(self.weights) + max(_sum(self.loading), _sum(self.serving))

    def check(self, free_bytes: int) -> None:
        """Compare with the memory there is.

        free_bytes: of the GPU, once this process has a context on it.
        Raises: StartError with the numbers where it does not fit, saying what to change.
        """
        missing_bytes = self.total_bytes - free_bytes
        if missing_bytes <= 0:
            return
        fewer = self.layers - math.ceil(missing_bytes * self.layers / _sum(self.weights))
        advice = f"serve {fewer} of the {self.layers} layers" if fewer > 0 else "serve fewer layers"
        advice += " (layers), or use more ranks (ranks)"
        if _sum(self.serving) > _sum(self.loading):
            advice += (
                ", or lower max_step_tokens, max_rank_tokens or max_graph_tokens, on which most of the "
                f"{_gigabytes(_sum(self.serving))} beside the weights depends"
            )
        raise StartError(
            f"{self.title}: needs {_gigabytes(self.total_bytes)}, and the GPU has {_gigabytes(free_bytes)} free; "
            f"{advice}\n{self}"
        )

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("while loading", self.loading), ("while serving", self.serving))
        lines = [self.title]
        for name, items in parts:
            if items:
                lines += [_row(name, _sum(items), ""), *(_row(f"  {i.name}", i.size_bytes, i.note) for i in items)]
        return "\n".join([*lines, _row("at most", self.total_bytes, "weights, and the larger of the others")])


def plan(
    spec: ModelSpec,
    ranks: int,
    exchange: str,
    experts: str,
    max_tokens: int,
    granularity: ActivationScale,
    *,
    max_graph_tokens: int,
    missing_experts: int = 0,
) -> MemoryPlan:
    """Work out the memory of the rank that holds most experts.

    spec: with the layers to serve. exchange, experts: names as resolved, never `auto`.
    max_tokens: T, rows that one rank forwards at once at most. granularity: of the activation scales.
    max_graph_tokens: rows up to which a step is a graph.
    missing_experts: how many of the model's experts the group does without.
    Returns: GPU memory for the experts `cutlass` and the exchanges between GPUs; else the host's: weights, most of
        which are mapped files that the kernel reads and drops as it likes.
    Raises: ValueError for fewer than one token.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    num_experts = spec.num_experts - missing_experts
    shares = [len(expert_range(rank, ranks, num_experts)) for rank in range(ranks)]
    place = Place(
        rank=shares.index(max(shares)),
        ranks=ranks,
        num_experts=num_experts,
        rendezvous=Path(),
        timeout_seconds=0.0,
        device=torch.device("cuda"),
        hidden_size=spec.hidden_size,
        top_k=spec.top_k,
        max_tokens=max_tokens,
        scale_columns=scale_columns(spec.hidden_size, granularity),
    )
    weights = _weights(spec, max(shares), experts)
    title = f"memory of a rank of {ranks}: {len(spec.layers)} layers, {max(shares)} of {spec.num_experts} experts each"
    if experts != "cutlass" and exchange not in ("deepep", "nccl"):
        return MemoryPlan(f"{title}, on the host", weights, (), (), len(spec.layers))
    sizes = [size for size in buckets(max_tokens) if size <= max_graph_tokens]
    serving = (*_buffers(spec, place, exchange, granularity, sizes), *_step(spec, place, exchange, granularity))
    title += f", {max_tokens} tokens, exchange {exchange}"
    return MemoryPlan(title, weights, _loading(spec, max(shares), experts), serving, len(spec.layers))


def _weights(spec: ModelSpec, local: int, experts: str) -> tuple[MemoryItem, ...]:
    """What every served layer holds for good."""
    hidden, inner, shared = spec.hidden_size, spec.intermediate_size, spec.shared_intermediate_size
    if experts == "cutlass":
        routed_bytes = _packed_bytes(local, 2 * inner, hidden, spec.group_size)
        routed_bytes += _packed_bytes(local, hidden, inner, spec.group_size)
        shared_bytes = _packed_fp8_bytes(2 * shared, hidden) + _packed_fp8_bytes(hidden, shared)
    else:
        routed_bytes, shared_bytes = local * _plain_bytes(spec), 3 * _fp8_bytes(hidden, shared)
    router_bytes = spec.num_experts * (2 * hidden * 8 + 8 + 4)
    layers = len(spec.layers)
    return (
        MemoryItem(
            "routed experts", layers * routed_bytes, f"{layers} layers, {local} experts of [{inner}, {hidden}] x 3"
        ),
        MemoryItem("shared experts", layers * shared_bytes, f"{layers} layers, fp8"),
        MemoryItem("routers", layers * router_bytes, f"{layers} layers, [{spec.num_experts}, {hidden}] cut in float64"),
    )


def _loading(spec: ModelSpec, local: int, experts: str) -> tuple[MemoryItem, ...]:
    """What bringing the last layer takes for a while; nothing but that of what stays as it is."""
    layer_bytes = local * _plain_bytes(spec) * 5 // 3 if experts == "cutlass" else 0
    return (
        MemoryItem("a layer as it is", layer_bytes, "all of it, and gate and up interleaved"),
        MemoryItem("on the way", STAGING_BYTES, "estimate"),
    )


def _buffers(
    spec: ModelSpec, place: Place, exchange: str, granularity: ActivationScale, graph_tokens: Sequence[int]
) -> tuple[MemoryItem, ...]:
    """What else a GPU holds for good. graph_tokens: sizes of the steps that are graphs, ascending."""
    items = []
    if exchange == "deepep":
        items.append(
            MemoryItem("DeepEP's buffer", _deepep_bytes(place), f"{place.max_tokens} tokens from {place.ranks} ranks")
        )
    if exchange in ("deepep", "nccl"):
        items.append(MemoryItem("NCCL", NCCL_BYTES, "estimate"))
    if graph_tokens:
        largest = replace(place, max_tokens=graph_tokens[-1])
        pool_bytes = GRAPH_POOL_FACTOR * _sum(_step(spec, largest, exchange, granularity))
        graphs = len(spec.layers) * len(graph_tokens) * GRAPHS_OF_A_SIZE
        items += [
            MemoryItem("memory of graphs", pool_bytes, f"estimate: twice a step of {graph_tokens[-1]} tokens"),
            MemoryItem("graphs", graphs * GRAPH_BYTES, f"estimate: {graphs} of {GRAPH_BYTES // MIB} MiB"),
        ]
    token_bytes = 5 * place.hidden_size + 4 * place.scale_columns + 12 * place.top_k + 1
    return (
        *items,
        MemoryItem(
            "inputs and outputs", place.max_tokens * token_bytes, f"{place.max_tokens} tokens, where graphs find them"
        ),
        MemoryItem("CUDA", CUDA_BYTES, "estimate: modules, workspaces, rounding"),
    )


def _step(spec: ModelSpec, place: Place, exchange: str, granularity: ActivationScale) -> tuple[MemoryItem, ...]:
    """What a step of the most tokens takes."""
    tokens, rows = place.max_tokens, _rows(place, exchange)
    hidden, inner, shared = spec.hidden_size, spec.intermediate_size, spec.shared_intermediate_size
    hidden_row_bytes = inner + 4 * scale_columns(inner, granularity) + 1
    shared_row_bytes = 5 * shared + 4 * scale_columns(shared, granularity) + 8 * hidden if shared else 0
    routing_bytes = 5 * 8 * min(tokens * hidden, ROUTER_BLOCK)
    return (
        MemoryItem(
            "tokens",
            tokens * 25 * hidden + routing_bytes,
            f"{tokens} of {hidden}: received and output of two steps, quantized, routed",
        ),
        MemoryItem("rows on their way", _exchange_bytes(place, exchange), f"at most {rows} rows, and back"),
        MemoryItem("activated rows", rows * 4 * inner, f"[{rows}, {inner}] float32"),
        MemoryItem("activated rows in fp8", rows * hidden_row_bytes, f"[{rows}, {inner}] with scales"),
        MemoryItem("experts' output", rows * 2 * hidden, f"[{rows}, {hidden}] bfloat16"),
        MemoryItem("shared experts' rows", tokens * shared_row_bytes, f"{tokens} tokens"),
    )


def _rows(place: Place, exchange: str) -> int:
    """Rows that a rank's experts may get: where nothing waits for the host, the worst case."""
    if exchange == "local":
        return place.max_tokens * place.top_k
    local = len(expert_range(place.rank, place.ranks, place.num_experts))
    return place.ranks * place.max_tokens * min(place.top_k, local)


def _exchange_bytes(place: Place, exchange: str) -> int:
    """What dispatch and combine of one step allocate."""
    if exchange == "nccl":
        return nccl.step_bytes(place)
    rows, tokens, hidden, slots = _rows(place, exchange), place.max_tokens, place.hidden_size, place.top_k
    row_bytes = hidden + 4 * place.scale_columns + 4
    if exchange == "deepep":  # besides, for each token of each rank where it came from and where its rows are
        return rows * row_bytes + 4 * place.ranks * tokens * (slots + 2) + tokens * (8 * slots + 2 * hidden)
    return rows * (row_bytes + 2 * hidden + 5 * 8) + 4 * tokens * hidden  # every row again before they are added


def _deepep_bytes(place: Place) -> int:
    """DeepEP's buffer in one NVLink domain: room for every rank's tokens there, or for their sums on the way back.

    Source: DeepEP V2, csrc/elastic/buffer.hpp (get_buffer_size_hint).
    """
    hidden, slots = place.hidden_size, place.top_k
    there = _aligned(hidden) + _aligned(4 * place.scale_columns) + _aligned(12 * slots + 4)
    back = _aligned(2 * hidden) + _aligned(8 * slots)
    token_bytes = max(place.ranks * there, min(place.ranks, slots) * back)
    return -(-place.max_tokens * token_bytes // (2 * MIB)) * 2 * MIB + DEEPEP_WORKSPACE_BYTES


def _packed_bytes(experts: int, n: int, k: int, group: int) -> int:
    """Bytes of `w4afp8.packed.PackedWeight` of int4 experts [N, K]."""
    shape = packed.blocks_shape(experts, n, k, group)
    return math.prod(shape) + experts * shape[1] * packed.TILE_ROWS * 4


def _packed_fp8_bytes(n: int, k: int) -> int:
    """The same for one fp8 expert, 0 where there is none."""
    shape = packed_fp8.blocks_shape(1, n, k)
    return math.prod(shape) + shape[1] * packed.TILE_ROWS * 4 if n and k else 0


def _plain_bytes(spec: ModelSpec) -> int:
    """One routed expert as a checkpoint has it."""
    weights = 3 * spec.hidden_size * spec.intermediate_size
    return weights // 2 + 4 * weights // spec.group_size


def _fp8_bytes(n: int, k: int) -> int:
    """An fp8 matrix as a checkpoint has it, 0 where there is none."""
    return n * k + 4 * math.ceil(n / FP8_BLOCK) * math.ceil(k / FP8_BLOCK)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // 32) * 32


def _sum(items: tuple[MemoryItem, ...]) -> int:
    return sum(item.size_bytes for item in items)


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def _row(name: str, size_bytes: int, note: str) -> str:
    return f"{name:<26}{_gigabytes(size_bytes):>12}  {note}".rstrip()
