"""Calibration files: how large the inputs of the experts' matrices are, channel by channel, over real tokens.

A safetensors file with two tensors for every MoE layer L of the model, all F32, finite and not negative:

    layers.{L}.gate_up  [H]     mean square of each input channel of the gate and up matrices, over all tokens
    layers.{L}.down     [E, I]  mean square of each input channel of an expert's down matrix, over the tokens routed to
                                it; a row of zeros for an expert that saw none, whose scales are then searched by the
                                error of its weights

Only ratios within a matrix count. `moe_forward.integrations.transformers.record_calibration` writes such a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_forward.checkpoint.index import TensorInfo, read_header
from moe_forward.checkpoint.mapped import MappedFiles
from moe_forward.checkpoint.plan import ExpertMatrix
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec


@dataclass(frozen=True)
class Calibration:
    """A calibration file. digest: SHA-256 of its bytes. gate_up: layer -> [H]. down: layer -> [E, I]."""

    digest: str
    gate_up: Mapping[int, torch.Tensor]
    down: Mapping[int, torch.Tensor]

    def importance(self, matrix: ExpertMatrix) -> torch.Tensor | None:
        """Mean square of each input channel of a matrix.

        Returns: [K] float32; None for an expert that saw no token, and for a layer that is not in the file, which only
            a multi-token-prediction layer may be.
        """
        if matrix.layer not in self.gate_up:
            return None
        down = self.down[matrix.layer][matrix.expert]
        if not bool(down.any()):
            return None
        return down if matrix.projection == "down_proj" else self.gate_up[matrix.layer]


def read_calibration(path: Path, spec: ModelSpec) -> Calibration:
    """Read a calibration file of a model.

    Raises: CheckpointError naming the tensor that is missing, unknown, of another shape or type, negative, NaN or Inf.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in spec.layers:
        shapes[f"layers.{layer}.gate_up"] = (spec.hidden_size,)
        shapes[f"layers.{layer}.down"] = (spec.num_experts, spec.intermediate_size)
    found = {info.name: info for info in read_header(path).tensors}
    unknown = sorted(found.keys() - shapes.keys())
    if unknown:
        raise CheckpointError(f"{path} holds {unknown[0]}, which is not of an MoE layer of {spec.name}")
    missing = [name for name in shapes if name not in found]
    if missing:
        raise CheckpointError(f"{path} misses {missing[0]} (F32 {list(shapes[missing[0]])})")
    files = MappedFiles([path])
    tensors = {name: _checked(files, found[name], shape) for name, shape in shapes.items()}
    return Calibration(
        hashlib.sha256(path.read_bytes()).hexdigest(),
        {layer: tensors[f"layers.{layer}.gate_up"] for layer in spec.layers},
        {layer: tensors[f"layers.{layer}.down"] for layer in spec.layers},
    )


def _checked(files: MappedFiles, info: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor:
    if info.dtype != "F32" or info.shape != shape:
        raise CheckpointError(f"{info}: expected F32 {list(shape)}")
    tensor = files.tensor(info).clone()  # a few MB; the file may change afterwards
    if not bool(((tensor >= 0) & tensor.isfinite()).all()):
        raise CheckpointError(f"{info}: expected finite values that are not negative")
    if not bool(tensor.any()):
        raise CheckpointError(f"{info}: holds zeros only: no token reached the layer")
    return tensor
