"""What `quantize` does with each tensor of a source checkpoint, decided and checked from headers before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from moe_forward.checkpoint.expected import FLOATS
from moe_forward.checkpoint.index import CheckpointIndex, TensorInfo
from moe_forward.checkpoint.layout import (
    BLOCK,
    GROUP_SIZE,
    MIXTRAL_PROJECTIONS,
    PROJECTIONS,
    SCALE_SUFFIX,
    block_scale_shape,
    expert_matrix,
    int4_shapes,
    matrix_shape,
    mixtral_spelling,
)
from moe_forward.checkpoint.matrices import Part
from moe_forward.checkpoint.writer import TensorEntry
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec

_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)"
    r"|block_sparse_moe\.experts\.(\d+)\.(w[123]))\.weight"
)
_PROJECTIONS = {number: projection for projection, number in MIXTRAL_PROJECTIONS.items()}
_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.\w*_proj(_with_mqa)?|mlp\.(shared_experts\.)?(gate|up|down)_proj)\.weight"
)
_FORMATS = (".weight_packed", ".qweight", ".qzeros", ".weight_zero_point", ".weight_scale", ".input_scale")


class ExpertMatrix(NamedTuple):
    """A matrix of a routed expert. projection: one of `PROJECTIONS`."""

    layer: int
    expert: int
    projection: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """One matrix or tensor on its way.

    to: what becomes of it. scales: block scales of an fp8 source, else None.
    part: of a fused tensor [E, N, K]; None for all of an ordinary one.
    matrix: which one, where it is a routed expert's, which become int4.
    entries: what comes out, the values first.
    """

    to: Literal["copy", "int4", "fp8"]
    source: TensorInfo
    entries: tuple[TensorEntry, ...]
    scales: TensorInfo | None = None
    part: Part | None = None
    matrix: ExpertMatrix | None = None


def plan_conversions(index: CheckpointIndex, spec: ModelSpec) -> dict[Path, tuple[Conversion, ...]]:
    """Decide what becomes of every tensor.

    Returns: source shard -> conversions, in the order of its data; together they make every expert of the spec.
    Raises: CheckpointError naming the tensor: already quantized, a size that is no multiple of 128, another shape
        than config.json tells, or an expert that is missing.
    """
    plan = {
        file: tuple(
            conversion for info in index.headers[file].tensors for conversion in _conversions(index, spec, info)
        )
        for file in index.files
    }
    made = {entry.name for conversions in plan.values() for item in conversions for entry in item.entries}
    for layer in spec.layers:
        for expert in range(spec.num_experts):
            for projection in PROJECTIONS:
                name = expert_matrix(layer, expert, projection)
                if name not in made and mixtral_spelling(name) not in made:
                    raise CheckpointError(f"{index.folder} misses {name}, which its config.json promises")
    return plan


def _conversions(index: CheckpointIndex, spec: ModelSpec, info: TensorInfo) -> Iterator[Conversion]:
    if index.tensors.get(info.name) is not info:
        return  # a leftover that the index places in another shard
    if info.name.endswith(_FORMATS) or info.dtype in ("I8", "U8", "F8_E5M2"):
        raise CheckpointError(f"{info}: the source is already quantized; expected bf16, f16, f32 or fp8 in blocks")
    if info.name.endswith(SCALE_SUFFIX):
        owner = index.tensors.get(info.name.removesuffix(SCALE_SUFFIX))
        if owner is None or owner.dtype != "F8_E4M3":
            raise CheckpointError(f"{info}: scales without an F8_E4M3 matrix; already quantized or broken")
        if not _EXPERT.fullmatch(owner.name):
            yield _copy(info)
    elif fused := _FUSED.fullmatch(info.name):
        yield from _split(spec, info, int(fused[1]), fused[2])
    elif expert := _EXPERT.fullmatch(info.name):
        matrix = ExpertMatrix(int(expert[1]), int(expert[2] or expert[4]), expert[3] or _PROJECTIONS[expert[5]])
        shape = matrix_shape(matrix.projection, spec.hidden_size, spec.intermediate_size)
        if info.shape != shape:
            raise CheckpointError(f"{info}: config.json promises {list(shape)}")
        entries = _int4_entries(info, info.name, shape)
        yield Conversion("int4", info, entries, scales=_source_scales(index, info), matrix=matrix)
    elif info.dtype == "F8_E4M3":
        _source_scales(index, info)
        yield _copy(info)
    elif _LINEAR.fullmatch(info.name) and len(info.shape) == 2:
        shape = (info.shape[0], info.shape[1])
        scales = TensorEntry(info.name + SCALE_SUFFIX, "F32", block_scale_shape(shape))
        yield Conversion("fp8", _floating(info), (TensorEntry(info.name, "F8_E4M3", shape), scales))
    else:
        yield _copy(info)


def _split(spec: ModelSpec, info: TensorInfo, layer: int, kind: str) -> Iterator[Conversion]:
    """Take transformers' fused form apart: gate_up_proj [E, 2I, H], the gate's rows first, and down_proj [E, H, I]."""
    down = kind == "down_proj"
    projections = ("down_proj",) if down else ("gate_proj", "up_proj")
    rows, columns = matrix_shape(projections[0], spec.hidden_size, spec.intermediate_size)
    promised = (spec.num_experts, rows * len(projections), columns)
    if info.shape != promised:
        raise CheckpointError(f"{info}: config.json promises {list(promised)}")
    _floating(info)
    for expert in range(spec.num_experts):
        for number, projection in enumerate(projections):
            entries = _int4_entries(info, expert_matrix(layer, expert, projection), (rows, columns))
            part = Part(expert, number * rows, (number + 1) * rows)
            yield Conversion("int4", info, entries, part=part, matrix=ExpertMatrix(layer, expert, projection))


def _int4_entries(info: TensorInfo, name: str, shape: tuple[int, int]) -> tuple[TensorEntry, ...]:
    if any(size % GROUP_SIZE for size in shape):
        raise CheckpointError(f"{info}: both sizes of an expert's matrix must be multiples of {GROUP_SIZE}")
    codes, scales = int4_shapes(shape)
    return TensorEntry(name, "I8", codes), TensorEntry(name + SCALE_SUFFIX, "F32", scales)


def _source_scales(index: CheckpointIndex, info: TensorInfo) -> TensorInfo | None:
    if info.dtype != "F8_E4M3":
        _floating(info)
        return None
    scales = index.tensors.get(info.name + SCALE_SUFFIX)
    if scales is None or len(info.shape) != 2:
        raise CheckpointError(f"{info}: the source is already quantized, and not in blocks with {SCALE_SUFFIX} scales")
    expected = block_scale_shape((info.shape[0], info.shape[1]))
    if scales.dtype != "F32" or scales.shape != expected:
        raise CheckpointError(f"{scales}: expected F32 {list(expected)}, one scale for {BLOCK} x {BLOCK} values")
    return scales


def _floating(info: TensorInfo) -> TensorInfo:
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{info}: expected {', '.join(FLOATS)}; the source is already quantized or no weight")
    return info


def _copy(info: TensorInfo) -> Conversion:
    return Conversion("copy", info, (TensorEntry(info.name, info.dtype, info.shape),))
