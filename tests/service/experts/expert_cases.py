"""Weights and rows for the tests of expert backends, on any device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_forward.experts import LayerExperts
from w4afp8 import (
    ExpertWeights,
    Granularity,
    Int4Weight,
    Quantized,
    SharedExpert,
    quantize_fp8_block,
    quantize_tokens,
    reference,
)

LAYER = 3
LAYER_ERROR = 6e-3
"""Relative Frobenius error that a layer may have. Most of it comes from the fp16 ratios of the kernel's weight scales,
which move values to the other side of an fp8 rounding between the GEMMs: one row alone may have three times as much."""


@contextmanager
def no_clock(name: str) -> Iterator[None]:
    """Time nothing."""
    yield


def make_layer(
    experts: int, hidden: int, intermediate: int, group: int = 128, device: str = "cpu", shared: bool = True
) -> LayerExperts:
    """Random experts whose outputs are about as large as their inputs; expert 0 has codes of -8."""
    generator = torch.Generator(device).manual_seed(experts + hidden + intermediate)

    def int4(n: int, k: int, lowest: int) -> Int4Weight:
        q = torch.randint(lowest, 8, (n, k), generator=generator, dtype=torch.int8, device=device)
        scales = torch.randn(n, k // group, generator=generator, device=device).exp() * (0.1 / k**0.5)
        return Int4Weight((q[:, 0::2] & 15) | (q[:, 1::2] << 4), scales)

    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    routed = [ExpertWeights(*(int4(*shape, -7 if index else -8) for shape in shapes)) for index in range(experts)]
    if not shared:
        return LayerExperts(routed, None)
    dense = [torch.randn(*shape, generator=generator, device=device) / shape[1] ** 0.5 for shape in shapes]
    return LayerExperts(routed, SharedExpert(*(quantize_fp8_block(weight) for weight in dense)))


def make_rows(
    rows: int, hidden: int, granularity: Granularity, device: str = "cpu", loud: int | None = None
) -> Quantized:
    """Random rows of one size, so that none stands for all in an error. loud: one that exceeds float32 on its way."""
    x = torch.randn(rows, hidden, generator=torch.Generator(device).manual_seed(rows), device=device)
    if loud is not None:
        x[loud] *= 1e30
    return quantize_tokens(x, granularity)[0]


def with_dead_rows(rows: Quantized, dead: int) -> Quantized:
    """Add rows of no expert that hold nothing but NaN."""
    values, scales = rows.values.view(torch.uint8), rows.scales
    poison = torch.full((dead, values.shape[1]), 0x7F, dtype=torch.uint8, device=values.device)
    more = torch.full((dead, scales.shape[1]), torch.nan, device=values.device)
    return Quantized(torch.cat([values, poison]).view(torch.float8_e4m3fn), torch.cat([scales, more]))


def offsets_of(counts: list[int], device: str = "cpu") -> torch.Tensor:
    """Boundaries of experts with so many rows each."""
    return torch.tensor([0, *itertools.accumulate(counts)], device=device)


def exact_rows(
    layer: LayerExperts, rows: Quantized, counts: list[int], row_weights: torch.Tensor, granularity: Granularity
) -> torch.Tensor:
    """The specification's answer in float64, [rows, H]."""
    parts = []
    first = 0
    for expert, count in zip(layer.experts, counts, strict=True):
        part = Quantized(rows.values[first : first + count], rows.scales[first : first + count])
        parts.append(reference.expert_forward(part, expert, granularity, torch.float64))
        first += count
    return torch.cat(parts) * row_weights[:first, None].to(torch.float64)


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((y.to(torch.float64) - exact).norm() / exact.norm())
