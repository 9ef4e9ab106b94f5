"""What a layer is made from: the matrices of its experts and its router, as places in the files."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

from moe_forward.checkpoint.index import TensorInfo


class Part(NamedTuple):
    """Rows [first, last) of one expert in a tensor [E, N, K]."""

    expert: int
    first: int
    last: int


class Matrix(NamedTuple):
    """A matrix as the checkpoint has it, and what it becomes.

    values, scales: its tensors; scales are None where it is not quantized.
    to: `keep` what is served as it is, `decode` the words of compressed-tensors, quantize to `int4` or `fp8`.
    held_bytes: of what is served. part: where `values` holds more than this matrix.
    """

    values: TensorInfo
    scales: TensorInfo | None
    to: Literal["keep", "decode", "int4", "fp8"]
    held_bytes: int
    part: Part | None = None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Its one or two tensors."""
        return (self.values,) if self.scales is None else (self.values, self.scales)

    @property
    def read_bytes(self) -> int:
        """Bytes of the files that it is made from."""
        return part_bytes(self.values, self.part) + (0 if self.scales is None else self.scales.size_bytes)


class Gate(NamedTuple):
    """A router. bias: None for gates that have none."""

    weight: TensorInfo
    bias: TensorInfo | None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Its one or two tensors."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class LayerTensors(NamedTuple):
    """One MoE layer. experts: gate, up, down of each wanted expert; shared: the same, empty without shared expert."""

    experts: tuple[tuple[Matrix, ...], ...]
    shared: tuple[Matrix, ...]
    gate: Gate

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix of the experts, the shared one last."""
        for expert in (*self.experts, self.shared):
            yield from expert

    def tensors(self) -> Iterator[TensorInfo]:
        """Every tensor of the layer; a fused one comes as often as it has parts."""
        for matrix in self.matrices():
            yield from matrix.tensors
        yield from self.gate.tensors

    @property
    def held_bytes(self) -> int:
        """Bytes of what is served; the router as the file has it."""
        gate_bytes = sum(tensor.size_bytes for tensor in self.gate.tensors)
        return gate_bytes + sum(matrix.held_bytes for matrix in self.matrices())


def part_bytes(info: TensorInfo, part: Part | None) -> int:
    """Bytes of a tensor, or of a part of it."""
    return info.size_bytes if part is None else info.size_bytes // prod(info.shape[:2]) * (part.last - part.first)
