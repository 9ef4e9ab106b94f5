"""Draws what bench_layer.py wrote: `python tests/bench/plot_layer.py layer.json layer.svg`. Needs matplotlib."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plotting import Line, Point, draw


def main() -> None:
    """Read a result file and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON of bench_layer.py")
    parser.add_argument("out", type=Path, help="SVG to write")
    options = parser.parse_args()
    written = json.loads(options.results.read_text())
    floors = floors_us(written)
    if not floors:
        parser.error(f"{options.results}: nothing of ours was measured")
    title = f"MoE layer over {written['ranks']} GPUs, bf16 in and out; {written['device']}, {written['commit'][:8]}"
    floor = [Point(tokens, us, 100) for tokens, us in sorted(floors.items())]
    draw(title, "tokens per rank", lines(written, floors), floor, options.out)


def floors_us(written: Mapping[str, Any]) -> dict[int, float]:
    """By tokens a rank; they do not depend on the exchange."""
    return {row["tokens"]: row["floor_us"] for rows in written["ours"].values() for row in rows}


def lines(written: Mapping[str, Any], floors: Mapping[int, float]) -> list[Line]:
    """Ours by exchange, then the peer."""
    by_label = {f"ours, {exchange}": rows for exchange, rows in written["ours"].items()}
    by_label |= {"DeepGEMM fp8 MegaMoE": written["peer"]}
    found = []
    for label, rows in by_label.items():
        timed = sorted((row["tokens"], row["us"]) for row in rows if row["tokens"] in floors)
        if timed:
            found.append(Line(label, [Point(tokens, us, 100 * floors[tokens] / us) for tokens, us in timed]))
    return found


if __name__ == "__main__":
    main()
