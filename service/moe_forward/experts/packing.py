"""A rank's weights as the kernel reads them, packed on the GPU layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from moe_forward.checkpoint.compressed_tensors import CODES_PER_WORD, is_packed
from moe_forward.errors import StartError
from moe_forward.experts.base import LayerExperts, Progress
from moe_forward.experts.staging import bring_layers
from w4afp8 import ExpertWeights, Int4Weight, SharedExpert
from w4afp8.checks import weight_group, weight_shape
from w4afp8.packed import GROUPS, TILE_INPUTS, PackedWeight, interleave, pack
from w4afp8.packed_fp8 import pack_fp8, pack_fp8_gate_up

MAX_EXPERTS = 512  # of one grouped GEMM (w4afp8.gemm)
ROW_MULTIPLE = 8


class PackedExperts(NamedTuple):
    """gate_up: gate and up interleaved for the SwiGLU epilogue, [2I, H] an expert. down: [H, I] an expert."""

    gate_up: PackedWeight
    down: PackedWeight


class PackedLayer(NamedTuple):
    """routed: None on a rank without experts. shared: None for a layer without a shared expert."""

    routed: PackedExperts | None
    shared: PackedExperts | None


def pack_layers(
    layers: Mapping[int, LayerExperts], device: torch.device, on_progress: Progress | None = None
) -> dict[int, PackedLayer]:
    """Bring every layer to the GPU and pack it there; of the plain weights about a layer is there at a time.

    layers, device, on_progress: as in `bring_layers`.
    Raises: StartError for a group size or a number of experts that the kernel does not have; as `bring_layers`.
    """
    for number, layer in layers.items():
        _check_layer(number, layer)
    packed = {}
    for number, layer in bring_layers(layers, device, on_progress):
        packed[number] = PackedLayer(_pack_routed(layer.experts), _pack_shared(layer.shared))
        del layer  # before the next one comes
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the plain weights took may be needed outside of torch
    return packed


def _check_layer(number: int, layer: LayerExperts) -> None:
    """Refuse what the kernel does not have, before anything is read."""
    if len(layer.experts) > MAX_EXPERTS:
        raise StartError(
            f"experts cutlass: a rank holds at most {MAX_EXPERTS} experts of a layer, layer {number} would have "
            f"{len(layer.experts)}; use more ranks"
        )
    for weight in {_shape_and_group(weight) for expert in layer.experts for weight in expert}:
        (outputs, inputs), group = weight
        if group not in GROUPS or inputs % TILE_INPUTS or outputs % ROW_MULTIPLE:
            raise StartError(
                f"experts cutlass: takes weights [N, K] with N in multiples of {ROW_MULTIPLE}, K in multiples of "
                f"{TILE_INPUTS} and scales for {' or '.join(map(str, GROUPS))} inputs, layer {number} has "
                f"[{outputs}, {inputs}] with scales for {group}; set experts: reference"
            )


def _shape_and_group(weight: Int4Weight) -> tuple[tuple[int, int], int]:
    if not is_packed(weight):
        return weight_shape(weight), weight_group(weight)
    outputs, inputs = weight.codes.shape[0], CODES_PER_WORD * weight.codes.shape[1]
    return (outputs, inputs), inputs // weight.scales.shape[1]


def _pack_routed(experts: Sequence[ExpertWeights]) -> PackedExperts | None:
    if not experts:
        return None
    gate_up = pack([interleave(expert.gate, expert.up) for expert in experts])
    return PackedExperts(gate_up, pack([expert.down for expert in experts]))


def _pack_shared(expert: SharedExpert | None) -> PackedExperts | None:
    if expert is None:
        return None
    return PackedExperts(pack_fp8_gate_up(expert.gate, expert.up), pack_fp8(expert.down))
