"""Describe a checkpoint and what each rank of a placement would hold, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_forward.checkpoint.expected import layer_tensors
from moe_forward.checkpoint.index import CheckpointIndex, open_index
from moe_forward.checkpoint.layout import read_spec
from moe_forward.checkpoint.matrices import LayerTensors
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec, expert_range


def inspect(folder: Path, ranks: int, layers: Sequence[int] | None = None) -> str:
    """Describe a checkpoint as a text table; no tensor is read.

    folder: of any format that is served. ranks: to place it on. layers: ids to look at, default every MoE layer.
    Returns: lines on the model, the bytes of each layer, and the experts and bytes of each rank.
    Raises: CheckpointError naming what cannot be served.
    """
    if ranks < 1:
        raise CheckpointError(f"ranks: expected at least 1, got {ranks}")
    spec, index = read_spec(folder), open_index(folder)
    chosen = spec.layers if layers is None else tuple(layers)
    everything = range(spec.num_experts)
    per_layer = {layer: _held_bytes(index, spec, layer, everything) for layer in chosen}
    parts = [expert_range(rank, ranks, spec.num_experts) for rank in range(ranks)]
    per_rank = [sum(_held_bytes(index, spec, layer, experts) for layer in chosen) for experts in parts]
    return "\n".join(
        [
            *_model_lines(spec, index, chosen),
            f"{'bytes':<20}{_size(sum(per_layer.values()))}",
            "",
            _row("layer", "bytes"),
            *(_row(str(layer), _size(size)) for layer, size in per_layer.items()),
            "",
            _row("rank", "experts", "bytes"),
            *(
                _row(str(rank), _span(experts), _size(size))
                for rank, (experts, size) in enumerate(zip(parts, per_rank, strict=True))
            ),
        ]
    )


def _held_bytes(index: CheckpointIndex, spec: ModelSpec, layer: int, experts: range) -> int:
    """Bytes of a layer that a rank with `experts` holds; router and shared expert are on every rank."""
    return layer_tensors(index, spec, layer, experts).held_bytes


def _model_lines(spec: ModelSpec, index: CheckpointIndex, layers: tuple[int, ...]) -> list[str]:
    gate = spec.gate
    routing = f"{gate.kind}, top {spec.top_k}"
    if gate.num_groups > 1:
        routing += f" in {gate.top_groups} of {gate.num_groups} groups"
    routing += f", {'normalised' if gate.normalize else 'not normalised'}, times {gate.scaling_factor:g}"
    shared = f"I = {spec.shared_intermediate_size}" if spec.shared_intermediate_size else "none"
    facts = {
        "model": spec.name,
        "format": _format(layer_tensors(index, spec, layers[0], range(1))),
        "shards": str(len(index.files)),
        "MoE layers": f"{len(layers)}: {_spans(layers)}",
        "experts": f"{spec.num_experts}, H = {spec.hidden_size}, I = {spec.intermediate_size}",
        "shared expert": shared,
        "group size": str(spec.group_size),
        "gate": routing,
    }
    return [f"{name:<20}{value}" for name, value in facts.items()]


def _format(layer: LayerTensors) -> str:
    """Say what the experts of a layer are, and what becomes of them."""
    values, _, to, *_ = layer.experts[0][0]
    routed = f"{'compressed-tensors' if to == 'decode' else 'w4afp8'}: int4 routed experts"
    if to == "int4":
        routed = f"{values.dtype} routed experts, quantized to int4 as they are loaded"
    if not layer.shared:
        return routed
    values, _, to, *_ = layer.shared[0]
    return f"{routed}; " + (
        "fp8 shared experts" if to == "keep" else f"{values.dtype} shared experts, quantized to fp8"
    )


def _spans(numbers: tuple[int, ...]) -> str:
    """Write ascending ids as ranges: 3-5, 8."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _span(experts: range) -> str:
    return f"{experts[0]}-{experts[-1]}" if experts else "none"


def _size(size_bytes: int) -> str:
    return f"{size_bytes:,} ({size_bytes / 1e9:.3f} GB)"


def _row(*cells: str) -> str:
    return "".join(f"{cell:<20}" for cell in cells).rstrip()
