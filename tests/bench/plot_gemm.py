"""Draws what bench_gemm.py wrote: `python tests/bench/plot_gemm.py gemm.json gemm.svg`. Needs matplotlib."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import best
from plotting import Line, Point, draw

PEER_LINES = {"humming int4": ("humming",), "SGLang int4": ("sgl",), "DeepGEMM fp8": ("dg",)}
OUR_LINES = {"ours, scale per token": "token", "ours, per token and 128": "token_group"}

Result = Mapping[str, Any]


def main() -> None:
    """Read a result file and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON of bench_gemm.py")
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("--shape", default="EP8", help="cases to draw: those whose name starts so")
    parser.add_argument("--zipf", action="store_true", help="draw Zipf loads instead of uniform ones")
    options = parser.parse_args()
    written = json.loads(options.results.read_text())
    skew = "zipf" if options.zipf else "uniform"
    results = [
        result
        for result in written["results"]
        if result["case"].startswith(options.shape) and result["skew"] == skew and "token" in result["ours"]
    ]
    if not results:
        parser.error(f"{options.results}: no case {options.shape} with {skew} loads and scales per token")
    results.sort(key=lambda result: result["rows"])
    first = results[0]
    shape = f"{first['experts']} experts, hidden {first['hidden']}, intermediate {first['intermediate']}"
    title = f"gate_up and down of a rank, {shape}, {skew} loads; {written['device']}, {written['commit'][:8]}"
    floor = [Point(rows_per_expert(result), floor_us(result), 100) for result in results]
    draw(title, "rows per expert on average", lines(results), floor, options.out)


def lines(results: Sequence[Result]) -> list[Line]:
    """Ours by granularity, then the best variant of each peer; lines without points are left out."""
    found = []
    for label, granularity in OUR_LINES.items():
        measured = [result for result in results if granularity in result["ours"]]
        points = [_point(result, result["ours"][granularity]["pair"]["us"]) for result in measured]
        found.append(Line(label, points, dashed=granularity == "token_group"))
    for label, rows in PEER_LINES.items():
        peers = [(result, best(result["peers"], rows)) for result in results]
        found.append(Line(label, [_point(result, us) for result, us in peers if us is not None]))
    return [line for line in found if line.points]


def rows_per_expert(result: Result) -> float:
    """On average over all experts."""
    return float(result["rows"] / result["experts"])


def floor_us(result: Result) -> float:
    """Of the pair, with int4 weights."""
    return float(result["ours"]["token"]["pair"]["floor_us"])


def _point(result: Result, us: float) -> Point:
    return Point(rows_per_expert(result), us, 100 * floor_us(result) / us)


if __name__ == "__main__":
    main()
