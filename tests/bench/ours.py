"""Our grouped GEMM on random weights, timed case by case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from cases import Case, floor_seconds, weight_copies
from timing import median_seconds

from w4afp8 import Granularity, Quantized, packed, packed_fp8, quantize_tokens
from w4afp8.gemm import grouped_gemm
from w4afp8.packed import TILE_INPUTS, TILE_ROWS, PackedWeight
from w4afp8.quantize import quantize_tokens_cuda

Weights = Literal["int4", "int4_full_range", "int4_group32", "fp8"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)


def random_weight(experts: int, shape: tuple[int, int], weights: Weights = "int4") -> PackedWeight:
    """Packed weights of random codes and ratios, made where they lie."""
    n, k = shape
    group = 32 if weights == "int4_group32" else TILE_INPUTS
    if weights == "fp8":
        size = packed_fp8.blocks_shape(experts, n, k)
        blocks = torch.randint(0, 127, size, dtype=torch.uint8, device="cuda")  # no NaN
        blocks += 128 * torch.randint(0, 2, size, dtype=torch.uint8, device="cuda")
    else:
        size = packed.blocks_shape(experts, n, k, group)
        blocks = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
    ratios = blocks.view(torch.int16)[..., -packed.scale_bytes(group) // 2 :]
    ratios.copy_(torch.randint(-0x4000, 0, ratios.shape, device="cuda"))  # 0xC000 to 0xFFFF: 64 to 1024
    channel_scales = torch.full((experts, size[1] * TILE_ROWS), 2.0**-8, device="cuda")
    full_range = weights in ("int4_full_range", "int4_group32")
    return PackedWeight(blocks, channel_scales, n, k, group, full_range, codes="fp8" if weights == "fp8" else "int4")


def weight_bytes(weights: Weights) -> float:
    """Bytes that one weight takes, its share of the scales included."""
    group = 32 if weights == "int4_group32" else TILE_INPUTS
    return (1 if weights == "fp8" else 0.5) + 2 / group


class Bench:
    """Ours, case by case; keeps the weights of the last shape."""

    def __init__(self, weights: Weights = "int4") -> None:
        self._kind = weights
        self._held: tuple[object, ...] = ()
        self._weights: list[tuple[PackedWeight, PackedWeight]] = []

    def time(
        self, case: Case, counts: Sequence[int], granularity: Granularity, pair_only: bool = False
    ) -> dict[str, dict[str, float]]:
        """Time gate_up with SwiGLU, down, both, and both with the quantization between them; or both alone.

        Returns: by step, microseconds `us`, those of the floor `floor_us`, and their ratio `percent`.
        """
        weights = self._weights_of(case, weight_copies(case, counts))
        offsets = torch.tensor([0, *itertools.accumulate(counts)], device="cuda")
        row_weights = torch.rand(case.rows, device="cuda")
        x, hidden = (
            quantize_tokens(torch.randn(case.rows, k, device="cuda"), granularity)[0]
            for k in (case.gate_up[1], case.down[1])
        )

        def gate_up(copy: int) -> torch.Tensor:
            return grouped_gemm(x, weights[copy][0], offsets, epilogue="swiglu")

        def down(copy: int, tokens: Quantized) -> torch.Tensor:
            return grouped_gemm(tokens, weights[copy][1], offsets, row_weights=row_weights, early_start=True)

        def pair(copy: int) -> None:
            gate_up(copy)
            down(copy, hidden)

        def chain(copy: int) -> None:
            down(copy, quantize_tokens_cuda(gate_up(copy), granularity, overflow="nan")[0])

        steps: dict[str, Callable[[int], object]] = {"pair": pair}
        if not pair_only:
            steps |= {"gate_up": gate_up, "down": lambda copy: down(copy, hidden), "pair_and_quantize": chain}
        floors = {
            "gate_up": floor_seconds(counts, case.gate_up, weight_bytes(self._kind)),
            "down": floor_seconds(counts, case.down, weight_bytes(self._kind)),
        }
        floors["pair"] = floors["pair_and_quantize"] = floors["gate_up"] + floors["down"]
        found = {}
        for name, step in steps.items():
            seconds = median_seconds([partial(step, copy) for copy in range(len(weights))])
            found[name] = figures(seconds, floors[name])
        return found

    def free(self) -> None:
        """Give the weights' memory back."""
        self._held, self._weights = (), []
        torch.cuda.empty_cache()

    def _weights_of(self, case: Case, copies: int) -> list[tuple[PackedWeight, PackedWeight]]:
        if self._held != (case.shape, copies):
            self.free()
            shapes = (case.gate_up, case.down)
            made = [[random_weight(case.experts, shape, self._kind) for shape in shapes] for _ in range(copies)]
            self._weights = [(gate_up, down) for gate_up, down in made]
            self._held = (case.shape, copies)
        return self._weights


def figures(seconds: float, floor: float) -> dict[str, float]:
    """A measurement as it is written."""
    return {"us": seconds * 1e6, "floor_us": floor * 1e6, "percent": 100 * floor / seconds}
