"""What well-known models take on Hopper GPUs: python deploy/sizing.py prints the table of deploy/OPERATIONS.md.

The plan is the one that `serve` makes before it loads anything; shapes are those of the models' config.json.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_forward import memory_plan
from moe_forward.config import Config
from moe_forward.memory_plan import MemoryPlan
from moe_forward.types import GateSpec, ModelSpec

GPUS = {"H100 80 GB": 85.0e9, "H200": 150.0e9}
"""Bytes that a process finds free on an idle GPU, rounded down."""

RANKS = 8
EXPECTED_RANKS = (1, 2, 4, 8, 16, 32)

HEADS = ("model", "MoE layers", "experts", "weights", "besides", "at most", *(f"GPUs: {gpu}" for gpu in GPUS))


def specs() -> tuple[ModelSpec, ...]:
    """The models, every MoE layer of each."""
    return (
        _spec("DeepSeek-R1", 7168, 2048, 256, 8, shared=2048, layers=range(3, 61)),
        _spec("Kimi-K2", 7168, 2048, 384, 8, shared=2048, layers=range(1, 61), group=32),
        _spec("Qwen3-235B-A22B", 4096, 1536, 128, 8, shared=0, layers=range(94)),
        _spec("Mixtral-8x22B", 6144, 16384, 8, 2, shared=0, layers=range(56)),
    )


def planned(spec: ModelSpec, ranks: int) -> MemoryPlan:
    """What `serve` would plan with default settings on a host that has everything."""
    config = Config()
    exchange = "local" if ranks == 1 else "deepep"
    max_tokens = min(-(-config.max_step_tokens // ranks), config.max_rank_tokens)
    return memory_plan.plan(
        *(spec, ranks, exchange, "cutlass", max_tokens, config.activation_scale),
        max_graph_tokens=config.max_graph_tokens,
    )


def fewest_ranks(spec: ModelSpec, free_bytes: float) -> str:
    """The fewest GPUs of so much memory that hold the model."""
    for ranks in EXPECTED_RANKS:
        if ranks <= spec.num_experts and planned(spec, ranks).total_bytes <= free_bytes:
            return str(ranks)
    return "fewer layers"


def table() -> str:
    """The table, in Markdown. Bytes are of the GPU that holds most."""
    rows = [HEADS, ("---",) * len(HEADS), *_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows() -> Iterator[tuple[str, ...]]:
    for spec in specs():
        plan = planned(spec, RANKS)
        weights_bytes = sum(item.size_bytes for item in plan.weights)
        sizes = (weights_bytes, plan.total_bytes - weights_bytes, plan.total_bytes)
        yield (
            spec.name,
            str(len(spec.layers)),
            f"{spec.num_experts}, top {spec.top_k}",
            *(f"{size / 1e9:.1f} GB" for size in sizes),
            *(fewest_ranks(spec, free_bytes) for free_bytes in GPUS.values()),
        )


def _spec(
    name: str, hidden: int, inner: int, experts: int, top_k: int, shared: int, layers: range, group: int = 128
) -> ModelSpec:
    gate = GateSpec("deepseek_v3" if shared else "softmax")
    return ModelSpec(name, hidden, inner, experts, top_k, shared, tuple(layers), group, gate)


if __name__ == "__main__":
    print(table())
