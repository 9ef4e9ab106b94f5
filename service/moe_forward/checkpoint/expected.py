"""Find the tensors of MoE layers in an index and check, from headers alone, that they can be served exactly."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from moe_forward.checkpoint.index import CheckpointIndex, TensorInfo
from moe_forward.checkpoint.layout import (
    GROUP_SIZE,
    PROJECTIONS,
    SCALE_SUFFIX,
    block_scale_shape,
    expert_matrix,
    gate_bias,
    gate_weight,
    int4_shapes,
    matrix_shape,
    shared_matrix,
)
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec

FLOATS = ("BF16", "F16", "F32")
ZERO_POINTS = ("weight_zero_point", "qzeros", "zero_point")
PACKED_FORMATS = ("weight_packed", "qweight")


class Matrix(NamedTuple):
    """A quantized matrix: int4 codes with group scales, or fp8 values with block scales."""

    values: TensorInfo
    scales: TensorInfo


class Gate(NamedTuple):
    """A router. bias: None for gates that have none."""

    weight: TensorInfo
    bias: TensorInfo | None


class LayerTensors(NamedTuple):
    """One MoE layer. experts: gate, up, down of each wanted expert; shared: the same, empty without shared expert."""

    experts: tuple[tuple[Matrix, ...], ...]
    shared: tuple[Matrix, ...]
    gate: Gate

    def all(self) -> tuple[TensorInfo, ...]:
        """Every tensor of the layer."""
        matrices = [matrix for expert in self.experts for matrix in expert] + list(self.shared)
        gate = (self.gate.weight,) if self.gate.bias is None else (self.gate.weight, self.gate.bias)
        return tuple(tensor for matrix in matrices for tensor in matrix) + gate


def layer_tensors(index: CheckpointIndex, spec: ModelSpec, layer: int, experts: range) -> LayerTensors:
    """Find what a rank with `experts` holds of one layer.

    Returns: the tensors, each of the dtype and shape that the spec asks for.
    Raises: CheckpointError naming the tensor: missing, of another shape, group size, format or precision.
    """
    if layer not in spec.layers:
        raise CheckpointError(f"layer {layer} is not an MoE layer of {index.folder}; those are {list(spec.layers)}")
    if experts and not (experts.step == 1 and experts[0] >= 0 and experts[-1] < spec.num_experts):
        raise CheckpointError(f"experts {experts} are not within the {spec.num_experts} experts of {index.folder}")
    intermediate = spec.shared_intermediate_size
    return LayerTensors(
        tuple(tuple(_int4(index, spec, layer, expert, name) for name in PROJECTIONS) for expert in experts),
        tuple(_fp8(index, spec, layer, name) for name in PROJECTIONS if intermediate),
        _gate(index, spec, layer),
    )


def _int4(index: CheckpointIndex, spec: ModelSpec, layer: int, expert: int, projection: str) -> Matrix:
    name = expert_matrix(layer, expert, projection)
    shape = matrix_shape(projection, spec.hidden_size, spec.intermediate_size)
    prefix = name.removesuffix("weight")
    for suffix in ZERO_POINTS:
        if prefix + suffix in index.tensors:
            raise CheckpointError(f"{prefix}{suffix}: zero points cannot be served; expected symmetric int4")
    if name not in index.tensors:
        _explain_missing(index, name, layer)
    values = index.tensors[name]
    if values.dtype != "I8":
        raise CheckpointError(
            f"{values}: routed experts must be packed int4 (I8 {list(int4_shapes(shape)[0])}); "
            "run `moe-forward quantize` on the checkpoint first"
        )
    codes_shape, scales_shape = int4_shapes(shape)
    values = _require(index, name, ("I8",), codes_shape)
    scales = index.tensors.get(name + SCALE_SUFFIX)
    if scales is not None and len(scales.shape) == 2 and scales.shape[0] == shape[0] and scales.shape != scales_shape:
        groups = scales.shape[1]
        if groups and shape[1] % groups == 0:
            raise CheckpointError(
                f"{scales}: group size {shape[1] // groups}, but only group size {GROUP_SIZE} can be served"
            )
    return Matrix(values, _require(index, name + SCALE_SUFFIX, ("F32",), scales_shape))


def _fp8(index: CheckpointIndex, spec: ModelSpec, layer: int, projection: str) -> Matrix:
    name = shared_matrix(layer, projection)
    shape = matrix_shape(projection, spec.hidden_size, spec.shared_intermediate_size)
    values = index.tensors.get(name)
    if values is not None and values.dtype in FLOATS:
        raise CheckpointError(f"{values}: shared experts must be F8_E4M3; run `moe-forward quantize` first")
    return Matrix(
        _require(index, name, ("F8_E4M3",), shape),
        _require(index, name + SCALE_SUFFIX, ("F32",), block_scale_shape(shape)),
    )


def _gate(index: CheckpointIndex, spec: ModelSpec, layer: int) -> Gate:
    weight = _require(index, gate_weight(layer), FLOATS, (spec.num_experts, spec.hidden_size))
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


def _explain_missing(index: CheckpointIndex, name: str, layer: int) -> NoReturn:
    prefix = name.removesuffix("weight")
    for suffix in PACKED_FORMATS:
        if prefix + suffix in index.tensors:
            raise CheckpointError(f"{prefix}{suffix}: this packed format cannot be served; expected {name} as I8")
    fused = f"model.layers.{layer}.mlp.experts.gate_up_proj"
    if fused in index.tensors:
        raise CheckpointError(f"{index.tensors[fused]}: run `moe-forward quantize` on the checkpoint first")
    raise CheckpointError(f"{index.folder} misses {name}: an expert of layer {layer} is not there")
