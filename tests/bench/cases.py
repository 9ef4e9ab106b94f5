"""What the GEMM benchmark times: the cases with goals, and a sweep over shapes that nobody listed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

READ_BYTES_PER_SECOND = 4389e9
FP8_FLOP_PER_SECOND = 1515e12
WEIGHT_BYTES = 0.5 + 2 / 128
COLD_BYTES = 128e6
MOST_COPY_BYTES = 8e9
MOST_COPIES = 64

Skew = Literal["even", "uniform", "zipf"]
SKEWS: tuple[Skew, ...] = ("even", "uniform", "zipf")


@dataclass(frozen=True)
class Case:
    """One layer's share of a rank.

    hidden, intermediate: H and I of the shard. rows: over all experts, by `skew`.
    hits: experts that have rows, where a case to compare with says; None: as drawn.
    """

    name: str
    experts: int
    hidden: int
    intermediate: int
    rows: int
    skew: Skew = "uniform"
    hits: int | None = None

    @property
    def gate_up(self) -> tuple[int, int]:
        """[N, K] of the first GEMM."""
        return 2 * self.intermediate, self.hidden

    @property
    def down(self) -> tuple[int, int]:
        """[N, K] of the second GEMM."""
        return self.hidden, self.intermediate

    @property
    def shape(self) -> tuple[int, int, int]:
        """What the weights depend on."""
        return self.experts, self.hidden, self.intermediate


def goal_cases() -> list[Case]:
    """DeepSeek-R1 over 8 GPUs by experts and by columns; shapes in turn, so that weights are made once for each."""
    ep = {32: 22, 64: 29, 128: 32, 256: 32, 512: 32, 1024: 32, 4096: 32, 16384: 32}
    tp = {256: 161, 512: 222}
    return [
        *(Case(f"EP8 {rows} rows", 32, 7168, 2048, rows, hits=hits) for rows, hits in ep.items()),
        *(Case(f"EP8 {rows} rows Zipf", 32, 7168, 2048, rows, "zipf") for rows in ep),
        *(Case(f"TP8 {rows} rows", 256, 7168, 256, rows, hits=hits) for rows, hits in tp.items()),
        *(Case(f"TP8 {rows} rows Zipf", 256, 7168, 256, rows, "zipf") for rows in tp),
    ]


EXPERTS = (8, 16, 64, 128, 160)
HIDDEN = (2048, 4096, 5120, 6144)
INTERMEDIATE = (768, 1536, 2560, 3072)
COLUMN_RANKS = (1, 4)
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)


def sweep_cases() -> list[Case]:
    """Every combination of the axes above; K must be whole groups of 128, which excludes 768 over 4 ranks."""
    axes = itertools.product(EXPERTS, HIDDEN, INTERMEDIATE, COLUMN_RANKS, ROWS, SKEWS)
    return [
        Case(f"E{experts} H{hidden} I{full}/{ranks} {rows} rows {skew}", experts, hidden, full // ranks, rows, skew)
        for experts, hidden, full, ranks, rows, skew in axes
        if full % (128 * ranks) == 0
    ]


def draw_counts(case: Case) -> list[int]:
    """Rows of each expert: as even as can be, or drawn uniformly or by Zipf(1.2), with `hits` experts hit."""
    if case.skew == "even":
        return [case.rows // case.experts + (e < case.rows % case.experts) for e in range(case.experts)]
    share = 1 / torch.arange(1, case.experts + 1, dtype=torch.float64) ** (1.2 if case.skew == "zipf" else 0)
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(share, case.rows, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=case.experts)
        if case.hits in (None, int((counts > 0).sum())):
            break
    found: list[int] = counts.tolist()
    return found


def floor_seconds(counts: Sequence[int], shape: tuple[int, int], weight_bytes: float = WEIGHT_BYTES) -> float:
    """Time below which one GEMM [N, K] of these rows cannot come.

    That is to read the weights of experts that have rows (int4: 0.5 + 2/128 bytes each) and fp8 tokens and to write
    bf16 results at 4389 GB/s, or the arithmetic at 1515 TFLOP/s where that takes longer; both as measured on an H200.
    """
    n, k = shape
    rows, hits = sum(counts), sum(count > 0 for count in counts)
    traffic = hits * n * k * weight_bytes + rows * (k + 4) + rows * n * 2
    return max(traffic / READ_BYTES_PER_SECOND, 2 * rows * n * k / FP8_FLOP_PER_SECOND)


def weight_copies(case: Case, counts: Sequence[int]) -> int:
    """Copies of the weights to take in turn, so that none is in L2 (50 MB) when its turn comes: at least 3."""
    weights = min(case.gate_up[0] * case.gate_up[1], case.down[0] * case.down[1])
    hit_bytes = max(1, sum(count > 0 for count in counts)) * weights * WEIGHT_BYTES
    room = int(MOST_COPY_BYTES / (case.experts * case.gate_up[0] * case.gate_up[1] * WEIGHT_BYTES))
    return max(3, min(math.ceil(COLD_BYTES / hit_bytes), room, MOST_COPIES))
