"""Find the tensors of MoE layers in an index and check, from headers alone, that they can be served exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NoReturn

from moe_forward.checkpoint.compressed_tensors import CODES_PER_WORD
from moe_forward.checkpoint.index import CheckpointIndex, TensorInfo
from moe_forward.checkpoint.layout import (
    BLOCK,
    GROUP_SIZE,
    PROJECTIONS,
    SCALE_SUFFIX,
    block_scale_shape,
    expert_matrix,
    gate_bias,
    gate_weight,
    int4_shapes,
    matrix_shape,
    mixtral_spelling,
    shared_matrix,
)
from moe_forward.checkpoint.matrices import Gate, LayerTensors, Matrix, Part
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec

FLOATS = ("BF16", "F16", "F32")
ZERO_POINTS = ("weight_zero_point", "qzeros", "zero_point")
ACTIVATION_ORDERS = ("weight_g_idx", "g_idx")
PACKED = "weight_packed"
PACKED_SCALES = "weight_scale"
PACKED_SHAPE = "weight_shape"


def layer_tensors(index: CheckpointIndex, spec: ModelSpec, layer: int, experts: Sequence[int]) -> LayerTensors:
    """Find what a rank with `experts` holds of one layer.

    Returns: the tensors, each of a dtype and shape that fits the spec.
    Raises: CheckpointError naming the tensor: missing, of another shape, group size, format or precision.
    """
    if layer not in spec.layers:
        raise CheckpointError(f"layer {layer} is not an MoE layer of {index.folder}; those are {list(spec.layers)}")
    if list(experts) != sorted({expert for expert in experts if 0 <= expert < spec.num_experts}):
        raise CheckpointError(
            f"experts {experts} are not within the {spec.num_experts} experts of {index.folder}, ascending"
        )
    spell = mixtral_spelling if mixtral_spelling(gate_weight(layer)) in index.tensors else str
    intermediate = spec.shared_intermediate_size
    return LayerTensors(
        tuple(tuple(_routed(index, spec, spell, layer, expert, name) for name in PROJECTIONS) for expert in experts),
        tuple(_shared(index, spec, layer, name) for name in PROJECTIONS if intermediate),
        _gate(index, spec, spell, layer),
    )


def fused_name(layer: int, projection: str) -> str:
    """Name of the tensor [E, N, K] in which transformers keeps a projection of all experts."""
    kind = "down_proj" if projection == "down_proj" else "gate_up_proj"
    return f"model.layers.{layer}.mlp.experts.{kind}"


def _routed(
    index: CheckpointIndex, spec: ModelSpec, spell: Callable[[str], str], layer: int, expert: int, projection: str
) -> Matrix:
    name = spell(expert_matrix(layer, expert, projection))
    shape = matrix_shape(projection, spec.hidden_size, spec.intermediate_size)
    prefix = name.removesuffix("weight")
    _refuse_companions(index, prefix)
    if prefix + PACKED in index.tensors:
        return _packed(index, spec, prefix, shape)
    if name in index.tensors:
        values = index.tensors[name]
        if values.dtype == "I8":
            return _int4(index, spec, name, shape)
        _require_quantizable(spec, values, shape)
        scales = None
        if values.dtype == "F8_E4M3":
            scales = _require(index, name + SCALE_SUFFIX, ("F32",), block_scale_shape(shape))
        _require(index, name, ("I8", "F8_E4M3", *FLOATS), shape)
        return Matrix(values, scales, "int4", _int4_bytes(shape, GROUP_SIZE))
    if fused_name(layer, projection) in index.tensors:
        return _fused(index, spec, layer, expert, projection, shape)
    _explain_missing(index, name, layer)


def _int4(index: CheckpointIndex, spec: ModelSpec, name: str, shape: tuple[int, int]) -> Matrix:
    codes_shape, scales_shape = int4_shapes(shape, spec.group_size)
    values = _require(index, name, ("I8",), codes_shape)
    _require_scales_of_group(index, spec, name + SCALE_SUFFIX, shape)
    scales = _require(index, name + SCALE_SUFFIX, ("F32",), scales_shape)
    return Matrix(values, scales, "keep", values.size_bytes + scales.size_bytes)


def _packed(index: CheckpointIndex, spec: ModelSpec, prefix: str, shape: tuple[int, int]) -> Matrix:
    """Find the words and scales of compressed-tensors; N and K in `weight_shape` say what both shapes say already."""
    rows, columns = shape
    values = _require(index, prefix + PACKED, ("I32",), (rows, columns // CODES_PER_WORD))
    if columns % spec.group_size:
        raise CheckpointError(f"{values}: {columns} inputs are no multiple of the group size {spec.group_size}")
    _require_scales_of_group(index, spec, prefix + PACKED_SCALES, shape)
    scales = _require(index, prefix + PACKED_SCALES, FLOATS, int4_shapes(shape, spec.group_size)[1])
    if prefix + PACKED_SHAPE in index.tensors:
        _require(index, prefix + PACKED_SHAPE, ("I32", "I64"), (2,))
    return Matrix(values, scales, "decode", _int4_bytes(shape, spec.group_size))


def _fused(
    index: CheckpointIndex, spec: ModelSpec, layer: int, expert: int, projection: str, shape: tuple[int, int]
) -> Matrix:
    """Take transformers' fused form apart: gate_up_proj [E, 2I, H], the gate's rows first, and down_proj [E, H, I]."""
    rows, columns = shape
    parts = 1 if projection == "down_proj" else 2
    values = _require(index, fused_name(layer, projection), FLOATS, (spec.num_experts, rows * parts, columns))
    _require_quantizable(spec, values, shape)
    first = rows if projection == "up_proj" else 0
    return Matrix(values, None, "int4", _int4_bytes(shape, GROUP_SIZE), Part(expert, first, first + rows))


def _shared(index: CheckpointIndex, spec: ModelSpec, layer: int, projection: str) -> Matrix:
    name = shared_matrix(layer, projection)
    shape = matrix_shape(projection, spec.hidden_size, spec.shared_intermediate_size)
    packed = index.tensors.get(name.removesuffix("weight") + PACKED)
    if packed is not None:
        raise CheckpointError(
            f"{packed}: int4 shared experts cannot be served exactly, they are kept in fp8; "
            f"expected {name} (F8_E4M3 or {', '.join(FLOATS)})"
        )
    values = _require(index, name, ("F8_E4M3", *FLOATS), shape)
    scales_shape = block_scale_shape(shape)
    held_bytes = prod(shape) + 4 * prod(scales_shape)
    if values.dtype in FLOATS:
        return Matrix(values, None, "fp8", held_bytes)
    return Matrix(values, _require(index, name + SCALE_SUFFIX, ("F32",), scales_shape), "keep", held_bytes)


def _gate(index: CheckpointIndex, spec: ModelSpec, spell: Callable[[str], str], layer: int) -> Gate:
    weight = _require(index, spell(gate_weight(layer)), FLOATS, (spec.num_experts, spec.hidden_size))
    if spec.gate.kind != "deepseek_v3":
        return Gate(weight, None)
    return Gate(weight, _require(index, gate_bias(layer), FLOATS, (spec.num_experts,)))


def _require(index: CheckpointIndex, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> TensorInfo:
    tensor = index.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{index.folder} misses {name} ({' or '.join(dtypes)} {list(shape)})")
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise CheckpointError(f"{tensor}: expected {' or '.join(dtypes)} {list(shape)}")
    return tensor


def _require_scales_of_group(index: CheckpointIndex, spec: ModelSpec, name: str, shape: tuple[int, int]) -> None:
    """Name the group size that scales are of, where it is not what config.json says."""
    scales = index.tensors.get(name)
    if scales is None or len(scales.shape) != 2 or scales.shape[0] != shape[0] or scales.shape[1] == 0:
        return
    group_size, rest = divmod(shape[1], scales.shape[1])
    if rest == 0 and group_size != spec.group_size:
        raise CheckpointError(f"{scales}: group size {group_size}, but config.json tells of {spec.group_size}")


def _require_quantizable(spec: ModelSpec, values: TensorInfo, shape: tuple[int, int]) -> None:
    """Refuse what cannot become int4 in groups of 128, or ought to be int4 in other groups already."""
    if any(size % BLOCK for size in shape):
        raise CheckpointError(f"{values}: both sizes of an expert's matrix must be multiples of {BLOCK}")
    if spec.group_size != GROUP_SIZE:
        raise CheckpointError(
            f"{values}: config.json tells of int4 in groups of {spec.group_size}; expected {PACKED} (I32)"
        )


def _int4_bytes(shape: tuple[int, int], group_size: int) -> int:
    codes, scales = int4_shapes(shape, group_size)
    return prod(codes) + 4 * prod(scales)


def _refuse_companions(index: CheckpointIndex, prefix: str) -> None:
    """Refuse what comes beside codes and changes what they mean."""
    for suffix in ZERO_POINTS:
        if prefix + suffix in index.tensors:
            raise CheckpointError(f"{prefix}{suffix}: zero points cannot be served; expected symmetric int4")
    for suffix in ACTIVATION_ORDERS:
        if prefix + suffix in index.tensors:
            raise CheckpointError(
                f"{prefix}{suffix}: an activation order (act-order) cannot be served; expected groups of consecutive "
                "inputs"
            )


def _explain_missing(index: CheckpointIndex, name: str, layer: int) -> NoReturn:
    prefix = name.removesuffix("weight")
    if prefix + "qweight" in index.tensors:
        raise CheckpointError(
            f"{index.tensors[prefix + 'qweight']}: the packing of GPTQ and AWQ cannot be served; expected {name} (I8, "
            f"F8_E4M3 or float) or {prefix}{PACKED} (I32)"
        )
    raise CheckpointError(f"{index.folder} misses {name}: an expert of layer {layer} is not there")
