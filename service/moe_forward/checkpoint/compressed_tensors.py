"""Int4 weights of compressed-tensors: `pack-quantized`, symmetric, a scale for 128 or 32 inputs (Kimi-K2-Thinking).

Of a matrix [N, K], `weight_packed` [N, K/8] int32 has input 8 * w + i of a row in bits 4 * i to 4 * i + 3 of word w, as
code + 8. Byte b of a row, on a little-endian machine, thus has inputs 2 * b and 2 * b + 1, the first in the low nibble:
the bytes of `w4afp8.Int4Weight` with the upper bit of every nibble flipped. `weight_scale` [N, K/group], mostly bf16,
multiplies. `weight_shape` [2] repeats N and K. Codes and scales are served as they are, nothing is quantized again.

Source: compressed-tensors, compressors/pack_quantized/helpers.py (pack_to_int32) and quantization/quant_args.py
(settings); vLLM's CompressedTensorsWNA16MoEMethod reads the same.
"""

from __future__ import annotations

import torch

from moe_forward.checkpoint.documents import Keys
from moe_forward.errors import CheckpointError
from w4afp8 import Int4Weight

METHOD = "compressed-tensors"
GROUP_SIZES = (128, 32)
"""Inputs that may share a scale: what the kernels compute with."""

CODES_PER_WORD = 8
SERVED = "pack-quantized, int4, symmetric, groups of 128 or 32, activations not quantized"

_SIGNS = -0x77777778  # 0x88888888 as int32: the upper bit of every nibble
_SAME_ORDER = (None, False, "weight", "static")  # calibrated in another order, stored in the usual one


def group_size(settings: Keys) -> int:
    """Check that a `quantization_config` of compressed-tensors can be served exactly.

    Returns: inputs that share a scale.
    Raises: CheckpointError naming the key, what it holds and what is served.
    """
    _expect(settings, "format", "pack-quantized")
    if settings.document.get("sparsity_config"):
        raise CheckpointError(f"{settings.where}: sparsity_config is set; served is {SERVED}")
    groups = settings.section("config_groups")
    if groups is None or len(groups.document) != 1:
        count = 0 if groups is None else len(groups.document)
        raise CheckpointError(f"{settings.where}: expected one of config_groups, for the routed experts, got {count}")
    scheme = groups.section(next(iter(groups.document)))
    weights = None if scheme is None else scheme.section("weights")
    if scheme is None or weights is None:
        raise CheckpointError(f"{groups.where}: weights are not quantized; served is {SERVED}")
    _expect(scheme, "format", "pack-quantized", None)
    for activations in ("input_activations", "output_activations"):
        _expect(scheme, activations, None)
    _expect(weights, "num_bits", 4)
    _expect(weights, "type", "int", None)
    _expect(weights, "symmetric", True, None)
    _expect(weights, "strategy", "group", None)
    _expect(weights, "dynamic", False, None)
    _expect(weights, "actorder", *_SAME_ORDER)
    _expect(weights, "group_size", *GROUP_SIZES)
    return weights.integer("group_size")


def is_packed(weight: Int4Weight) -> bool:
    """Whether `weight` still is what a file of this format holds: int32 words, and scales of any float type."""
    return weight.codes.dtype == torch.int32


def decode(weight: Int4Weight) -> Int4Weight:
    """Turn words into the codes and scales that are served; a weight that has them is returned as it is.

    weight: codes [N, K/8] int32 and scales [N, K/group] bfloat16, float16 or float32 as in the file, on any device.
    Returns: the same weight, exactly; codes of groups with scale 0 are 0.
    """
    if not is_packed(weight):
        return weight
    codes, scales = (weight.codes ^ _SIGNS).view(torch.int8), weight.scales.to(torch.float32)
    return clear_unscaled(Int4Weight(codes, scales))


def clear_unscaled(weight: Int4Weight) -> Int4Weight:
    """Make the codes of groups with scale 0 zero; without such a group, `weight` itself is returned."""
    scaled = weight.scales != 0
    if bool(scaled.all()):
        return weight
    groups = torch.unflatten(weight.codes, 1, (weight.scales.shape[1], -1))
    return Int4Weight((groups * scaled.unsqueeze(2)).flatten(1), weight.scales)


def _expect(settings: Keys, key: str, *served: object) -> None:
    value = settings.document.get(key)
    if not any(value is allowed or (type(value) is type(allowed) and value == allowed) for allowed in served):
        raise CheckpointError(f"{settings.where}: {key} {value!r} cannot be served; served is {SERVED}")
