"""Times grouped_gemm and the quantization kernel on one GPU; prints a table and writes JSON.

Cases are those that other libraries were measured with. Each GEMM, and the pair of one layer, runs in a CUDA graph
over several copies of the weights in turn, so that none is in L2. The floor is the time to read the weights of experts
that have rows (0.5 + 2/128 bytes a weight) and fp8 tokens and to write bf16 results at 4389 GB/s, or the arithmetic
at 1515 TFLOP/s where that takes longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from w4afp8 import Granularity, Quantized, quantize_tokens
from w4afp8.gemm import grouped_gemm
from w4afp8.packed import BLOCK_BYTES, CODE_BYTES, PackedWeight
from w4afp8.quantize import quantize_tokens_cuda

READ_BYTES_PER_SECOND = 4389e9
FP8_FLOP_PER_SECOND = 1515e12
COPIES = 3
REPLAYS = 30


@dataclass(frozen=True)
class Case:
    """One layer's share of a rank. hits: experts that have rows, where a case to compare with says; None: as drawn."""

    name: str
    experts: int
    gate_up: tuple[int, int]
    down: tuple[int, int]
    rows: int
    hits: int | None = None
    zipf: bool = False


def cases() -> list[Case]:
    """All cases, shapes in turn so that weights are made once for each."""
    ep = {32: 22, 64: 29, 128: 32, 256: 32, 512: 32, 1024: 32, 4096: 32, 16384: 32}
    tp = {256: 161, 512: 222}
    wide, tall = ((4096, 7168), (7168, 2048)), ((512, 7168), (7168, 256))
    return [
        *(Case(f"EP8 {rows} rows", 32, *wide, rows, hits) for rows, hits in ep.items()),
        *(Case(f"EP8 {rows} rows Zipf", 32, *wide, rows, zipf=True) for rows in ep),
        *(Case(f"TP8 {rows} rows", 256, *tall, rows, hits) for rows, hits in tp.items()),
        *(Case(f"TP8 {rows} rows Zipf", 256, *tall, rows, zipf=True) for rows in tp),
    ]


def draw_counts(case: Case) -> list[int]:
    """Rows of each expert, drawn uniformly or by Zipf(1.2), with as many experts hit as the case says."""
    share = 1 / torch.arange(1, case.experts + 1, dtype=torch.float64) ** (1.2 if case.zipf else 0)
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(share, case.rows, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=case.experts)
        if case.hits in (None, int((counts > 0).sum())):
            break
    found: list[int] = counts.tolist()
    return found


def floor_seconds(counts: Sequence[int], shape: tuple[int, int]) -> float:
    """Time below which one GEMM [N, K] of these rows cannot come."""
    n, k = shape
    rows, hits = sum(counts), sum(count > 0 for count in counts)
    traffic = hits * n * k * (0.5 + 2 / 128) + rows * (k + 4) + rows * n * 2
    return max(traffic / READ_BYTES_PER_SECOND, 2 * rows * n * k / FP8_FLOP_PER_SECOND)


def random_weight(experts: int, shape: tuple[int, int]) -> PackedWeight:
    """Packed weights of random codes and ratios, made where they lie."""
    n, k = shape
    size = (experts, -(-n // 128), -(-k // 256) * 2, BLOCK_BYTES)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
    blocks.view(torch.float16)[..., CODE_BYTES // 2 :] = torch.empty(
        *size[:3], 128, dtype=torch.float16, device="cuda"
    ).uniform_(100, 1024)
    return PackedWeight(blocks, torch.full((experts, size[1] * 128), 2.0**-8, device="cuda"), n, k, 128, False)


def median_seconds(runs: Sequence[Callable[[], object]]) -> float:
    """Median over replays of a graph of all `runs`, for one of them."""
    for run in runs:  # outside of the graph first: loads kernels
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times: list[float] = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(runs))
    return statistics.median(times[3:])


def bench_case(
    case: Case, weights: dict[tuple[int, int], list[PackedWeight]], granularity: Granularity
) -> dict[str, Any]:
    """Time gate_up with SwiGLU, down, both, and both with the quantization between them."""
    counts = draw_counts(case)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], device="cuda")
    row_weights = torch.rand(case.rows, device="cuda")
    x, hidden = (
        quantize_tokens(torch.randn(case.rows, k, device="cuda"), granularity)[0]
        for k in (case.gate_up[1], case.down[1])
    )

    def gate_up(copy: int) -> torch.Tensor:
        return grouped_gemm(x, weights[case.gate_up][copy], offsets, epilogue="swiglu")

    def down(copy: int, tokens: Quantized) -> torch.Tensor:
        return grouped_gemm(tokens, weights[case.down][copy], offsets, row_weights=row_weights)

    def pair(copy: int) -> None:
        gate_up(copy)
        down(copy, hidden)

    def chain(copy: int) -> None:
        down(copy, quantize_tokens_cuda(gate_up(copy), granularity)[0])

    steps: dict[str, Callable[[int], object]] = {
        "gate_up": gate_up,
        "down": lambda copy: down(copy, hidden),
        "pair": pair,
        "pair_and_quantize": chain,
    }
    floors = {"gate_up": floor_seconds(counts, case.gate_up), "down": floor_seconds(counts, case.down)}
    floors["pair"] = floors["pair_and_quantize"] = floors["gate_up"] + floors["down"]
    result: dict[str, Any] = {
        "case": case.name,
        "granularity": granularity,
        "rows": case.rows,
        "hits": sum(count > 0 for count in counts),
        "most_rows": max(counts),
    }
    for name, step in steps.items():
        seconds = median_seconds([partial(step, copy) for copy in range(COPIES)])
        result[name] = {"us": seconds * 1e6, "floor_us": floors[name] * 1e6, "percent": 100 * floors[name] / seconds}
    return result


def bench_quantize(rows: int, channels: int, dtype: torch.dtype, granularity: Granularity) -> dict[str, Any]:
    """Time the quantization kernel; its floor is reading the tokens and writing fp8 and scales."""
    copies = max(2, int(2e8 // (rows * channels * 2)) if rows * channels > 1e6 else 8)
    tokens = [torch.randn(rows, channels, device="cuda").to(dtype) for _ in range(copies)]
    outs = [quantize_tokens_cuda(x, granularity) for x in tokens]
    pairs = zip(tokens, outs, strict=True)
    seconds = median_seconds([partial(quantize_tokens_cuda, x, granularity, None, out) for x, out in pairs])
    scales = 4 * (1 if granularity == "token" else channels // 128)
    floor = rows * (channels * (tokens[0].element_size() + 1) + scales) / READ_BYTES_PER_SECOND
    return {
        "case": f"quantize {rows} x {channels} {str(dtype).removeprefix('torch.')} {granularity}",
        "us": seconds * 1e6,
        "floor_us": floor * 1e6,
        "percent": 100 * floor / seconds,
    }


def show(name: str, timed: dict[str, Any]) -> str:
    """One measurement in a fixed width."""
    return f"{name} {timed['us']:8.1f} us, floor {timed['floor_us']:7.1f}, {timed['percent']:5.1f} %"


def main() -> None:
    """Run every case and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "bench.json")
    parser.add_argument("--granularity", choices=("token", "token_group"), nargs="+", default=["token"])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--floors", action="store_true", help="print rows, experts hit and floors; needs no GPU")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in case.name]
    if options.floors:
        for case in chosen:
            counts = draw_counts(case)
            floors = [1e6 * floor_seconds(counts, shape) for shape in (case.gate_up, case.down)]
            hits = sum(count > 0 for count in counts)
            text = f"hits {hits:3d}, most rows {max(counts):5d}, floor {floors[0]:5.1f} + {floors[1]:5.1f} us"
            print(f"{case.name:20s} {text}")
        return
    results: list[dict[str, Any]] = []
    for _, same in itertools.groupby(chosen, lambda case: (case.experts, case.gate_up, case.down)):
        group = list(same)
        shapes = (group[0].gate_up, group[0].down)
        weights = {shape: [random_weight(group[0].experts, shape) for _ in range(COPIES)] for shape in shapes}
        for case, granularity in itertools.product(group, options.granularity):
            result = bench_case(case, weights, granularity)
            results.append(result)
            lines = [show(f"{name:18s}", timed) for name, timed in result.items() if isinstance(timed, dict)]
            print(f"{case.name} {granularity}, {result['hits']} experts hit\n  " + "\n  ".join(lines), flush=True)
        del weights
        torch.cuda.empty_cache()
    sizes = itertools.product((32, 128, 512, 4096, 16384), ((7168, torch.bfloat16), (2048, torch.float32)))
    granularities: tuple[Granularity, ...] = ("token", "token_group")
    for rows, (channels, dtype) in sizes if not options.only else ():
        for each in granularities:
            result = bench_quantize(rows, channels, dtype, each)
            results.append(result)
            print(show(f"{result['case']:44s}", result))
    options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
