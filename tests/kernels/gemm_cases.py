"""Weights, rows and the float64 answer for the tests of grouped_gemm on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from w4afp8 import Granularity, Int4Weight, Quantized, dequantize_int4, quantize_tokens
from w4afp8.gemm import grouped_gemm
from w4afp8.packed import PackedWeight, pack

CANARY = 0xA5
DEAD_ROWS = 3


@dataclass(frozen=True)
class Weights:
    """codes [E, N, K/2] and scales [E, N, K/group] on the GPU, and the same packed."""

    plain: Int4Weight
    packed: PackedWeight

    def exact(self, expert: int) -> torch.Tensor:
        """[N, K] float64."""
        return dequantize_int4(Int4Weight(self.plain.codes[expert], self.plain.scales[expert]), torch.float64)


def make_weights(experts: int, n: int, k: int, full_range: bool = False, group: int = 128) -> Weights:
    """Random codes of the whole range, or without -8; scales around 0.01, some groups far smaller."""
    generator = torch.Generator("cuda").manual_seed(experts + n + k)
    codes = torch.randint(-128, 128, (experts, n, k // 2), generator=generator, dtype=torch.int8, device="cuda")
    if not full_range:  # -8 becomes -7
        low = codes & 15
        low += low == 8
        codes = (torch.where(codes < -112, codes + 16, codes) & -16) | low
    scales = torch.exp(torch.randn(experts, n, k // group, generator=generator, device="cuda")) * 0.01
    plain = Int4Weight(codes, scales)
    return Weights(plain, pack(plain))


def row_counts(name: str, experts: int) -> list[int]:
    """Rows of each expert by the name of a distribution."""
    if name == "one_hot":
        return [513 if e == experts // 2 else 0 for e in range(experts)]
    if name == "first_empty":
        return [0 if e == 0 else 5 for e in range(experts)]
    if name == "last_empty":
        return [0 if e == experts - 1 else 5 for e in range(experts)]
    if name == "zipf":
        share = 1 / torch.arange(1, experts + 1, dtype=torch.float64) ** 1.2
        drawn = torch.multinomial(share, 1024, replacement=True, generator=torch.Generator().manual_seed(experts))
        return torch.bincount(drawn, minlength=experts).tolist()
    low, high = {"none": (0, 0), "one": (1, 1)}.get(name) or map(int, name.split("-"))
    return [low + e % (high - low + 1) for e in range(experts)]


@dataclass(frozen=True)
class Rows:
    """Tokens of all experts among dead rows of NaN.

    x: [capacity, K]. live: rows that count, in the order of experts. counts: of each expert.
    arguments: of grouped_gemm.
    """

    x: Quantized
    live: torch.Tensor
    counts: list[int]
    arguments: dict[str, Any]


def make_rows(counts: list[int], k: int, granularity: Granularity = "token", masked: bool = False) -> Rows:
    """Random tokens laid out by offsets, or masked: each expert has room for the most rows of one and a few more."""
    generator = torch.Generator("cuda").manual_seed(sum(counts) + k)
    total, most = sum(counts), max(counts) + DEAD_ROWS
    x = torch.randn(total, k, generator=generator, device="cuda")
    x *= torch.exp(torch.randn(total, 1, generator=generator, device="cuda"))
    quantized, _ = quantize_tokens(x, granularity)
    if masked:
        places = [e * most + i for e, count in enumerate(counts) for i in range(count)]
        capacity = most * len(counts)
        arguments = {"counts": torch.tensor(counts, dtype=torch.int32, device="cuda"), "max_rows": most}
    else:
        places, capacity = list(range(total)), total + DEAD_ROWS
        arguments = {"offsets": torch.tensor([0, *itertools.accumulate(counts)], device="cuda")}
    live = torch.tensor(places, dtype=torch.int64, device="cuda")
    values = torch.full((capacity, k), 0x7F, dtype=torch.uint8, device="cuda")  # NaN in e4m3
    values[live] = quantized.values.view(torch.uint8)
    scales = torch.full((capacity, quantized.scales.shape[1]), torch.nan, device="cuda")
    scales[live] = quantized.scales
    return Rows(Quantized(values.view(torch.float8_e4m3fn), scales), live, counts, arguments)


def run(weights: Weights, rows: Rows, columns: int, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """The live rows [total, columns] of grouped_gemm; dead rows must keep what they held."""
    out = torch.empty(rows.x.values.shape[0], columns, dtype=dtype, device="cuda")
    out.view(torch.uint8).fill_(CANARY)
    y = grouped_gemm(rows.x, weights.packed, **rows.arguments, out=out, **options)
    assert y is out
    dead = torch.ones(len(out), dtype=torch.bool, device="cuda")
    dead[rows.live] = False
    assert bool((out[dead].view(torch.uint8) == CANARY).all()), "rows of no expert were written"
    return out[rows.live]


def exact_parts(weights: Weights, rows: Rows) -> list[torch.Tensor]:
    """The answer in float64, [rows of the expert, N] for each expert."""
    live = Quantized(rows.x.values.view(torch.uint8)[rows.live].view(torch.float8_e4m3fn), rows.x.scales[rows.live])
    x = torch.unflatten(live.values.to(torch.float64), 1, (live.scales.shape[1], -1))
    parts = torch.split((x * live.scales.to(torch.float64).unsqueeze(2)).flatten(1), rows.counts)
    return [
        part @ weights.exact(e).T if len(part) else part.new_empty(0, weights.packed.n) for e, part in enumerate(parts)
    ]


def relative_error(y: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """Frobenius norm of the error over that of the answer, part by part to save memory."""
    difference = norm = 0.0
    for part, answer in zip(torch.split(y, [len(answer) for answer in expected]), expected, strict=True):
        difference += float((part.to(torch.float64) - answer).square().sum())
        norm += float(answer.square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0 if difference == 0 else float("inf")
