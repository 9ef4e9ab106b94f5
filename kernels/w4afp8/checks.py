"""What the GEMMs of every backend require of their arguments, checked once and told in one sentence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from w4afp8.activations import check_scales
from w4afp8.tensors import FP8_BLOCK, Fp8BlockWeight, Int4Weight, Quantized


def weight_shape(weight: Int4Weight | Fp8BlockWeight) -> tuple[int, int]:
    """Outputs N and inputs K of a weight."""
    if isinstance(weight, Int4Weight):
        return weight.codes.shape[0], 2 * weight.codes.shape[1]
    return weight.values.shape[0], weight.values.shape[1]


def weight_group(weight: Int4Weight | Fp8BlockWeight) -> int:
    """Inputs that share one weight scale.

    Raises: ValueError where the scales do not fit the weight, or a group is not an even divisor of 128.
    """
    outputs, inputs = weight_shape(weight)
    if weight.scales.dtype != torch.float32:
        raise ValueError(f"weight scales: expected float32, got {weight.scales.dtype}")
    shape = list(weight.scales.shape)
    if isinstance(weight, Fp8BlockWeight):
        expected = [-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK)]
        if weight.values.dtype != torch.float8_e4m3fn or shape != expected:
            raise ValueError(
                f"weight: expected float8_e4m3fn [{outputs}, {inputs}] with scales {expected}, "
                f"got {weight.values.dtype} with scales {shape}"
            )
        return FP8_BLOCK
    if weight.codes.dtype != torch.int8:
        raise ValueError(f"weight codes: expected int8, got {weight.codes.dtype}")
    if len(shape) != 2 or shape[0] != outputs or shape[1] == 0 or inputs % shape[1]:
        raise ValueError(f"weight scales: expected [{outputs}, a divisor of K = {inputs}], got {shape}")
    group = inputs // shape[1]
    if group % 2 or FP8_BLOCK % group:
        raise ValueError(f"weight scales: expected groups of 2 to 128 inputs that divide 128, got groups of {group}")
    return group


def check_gemm(x: Quantized, weight: Int4Weight | Fp8BlockWeight) -> None:
    """Raise ValueError where `x` [T, K] and `weight` [N, K] cannot be multiplied."""
    check_scales(x)
    weight_group(weight)
    inputs = weight_shape(weight)[1]
    if x.values.shape[1] != inputs:
        raise ValueError(f"x: expected K = {inputs} channels as the weight has, got {x.values.shape[1]}")


def check_grouped(
    x: Quantized, offsets: torch.Tensor, weights: Sequence[Int4Weight], row_weights: torch.Tensor | None
) -> list[int]:
    """Check the arguments of a grouped GEMM.

    x: [rows, K]. offsets: [E+1] int64. weights: E of one shape. row_weights: [rows] float32 or None.
    Returns: the offsets as integers.
    Raises: ValueError naming the argument.
    """
    rows = x.values.shape[0]
    if not weights:
        raise ValueError("weights: expected at least one expert, got none")
    if offsets.dtype != torch.int64 or list(offsets.shape) != [len(weights) + 1]:
        raise ValueError(
            f"offsets: expected int64 [{len(weights) + 1}] for {len(weights)} experts, "
            f"got {offsets.dtype} {list(offsets.shape)}"
        )
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or any(high < low for low, high in itertools.pairwise(bounds)):
        raise ValueError(f"offsets: expected ascending from 0 to {rows} rows, got {bounds[:3]} ... {bounds[-3:]}")
    if len({weight_shape(weight) for weight in weights}) != 1:
        raise ValueError("weights: expected one shape for all experts, got several")
    if row_weights is not None and (row_weights.dtype != torch.float32 or list(row_weights.shape) != [rows]):
        raise ValueError(f"row_weights: expected float32 [{rows}], got {row_weights.dtype} {list(row_weights.shape)}")
    return bounds
