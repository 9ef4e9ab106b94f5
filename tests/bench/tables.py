"""Results of bench_gemm.py as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cases import Case, draw_counts, floor_seconds, weight_copies
from peers import FP8_ROWS, INT4_ROWS, best


def times_faster(result: dict[str, Any]) -> float | None:
    """How many times faster ours is than the best peer, None where no peer was measured."""
    peer = best(result["peers"], (*INT4_ROWS, *FP8_ROWS))
    return None if peer is None else peer / float(result["ours"]["token"]["pair"]["us"])


def table(results: Sequence[dict[str, Any]], head: bool = True) -> str:
    """One line a case: ours by granularity, share of the floor, drift, the peers, and how many times faster ours is."""
    title = "case                               | hit | token us | floor | drift | group us "
    lines = [title + "| int4 us | fp8 us | x int4 | x fp8"] if head else []
    for result in results:
        ours, group = result["ours"].get("token"), result["ours"].get("token_group")
        peers = [best(result["peers"], rows) for rows in (INT4_ROWS, FP8_ROWS)]
        pair = ours["pair"]["us"] if ours else None
        cells = [
            f"{result['case']:34s}",
            f"{result['hits']:3d}",
            _cell(pair, "8.1f"),
            _cell(ours and ours["pair"]["percent"], "4.0f") + "%",
            _cell(ours and 100 * ours["pair"].get("drift", 0), "+4.1f") + "%",
            _cell(group and group["pair"]["us"], "8.1f"),
            *(_cell(peer, f"{width}.1f") for peer, width in zip(peers, (7, 6), strict=True)),
            *(_cell(peer and pair and peer / pair, f"{width}.2f") for peer, width in zip(peers, (6, 5), strict=True)),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.lstrip("+").split(".")[0]))


def show_steps(result: dict[str, Any]) -> str:
    """The steps of a case, one a line."""
    lines = [f"{result['case']}, {result['hits']} experts hit, at most {result['most_rows']} rows"]
    for granularity, steps in result["ours"].items():
        for name, timed in steps.items():
            times = f"{timed['us']:8.1f} us, floor {timed['floor_us']:7.1f}, {timed['percent']:5.1f} %"
            lines.append(f"  {granularity:11s} {name:18s} {times}")
    lines += [f"  {variant:30s} {timed['pair']:8.1f} us  {timed['note']}" for variant, timed in result["peers"].items()]
    return "\n".join(lines)


def show_floors(cases: Sequence[Case]) -> str:
    """Rows, experts hit and floors of cases; needs no GPU."""
    lines = []
    for case in cases:
        counts = draw_counts(case)
        floors = [1e6 * floor_seconds(counts, shape) for shape in (case.gate_up, case.down)]
        hits = sum(count > 0 for count in counts)
        text = f"hits {hits:3d}, most rows {max(counts):5d}, floor {floors[0]:5.1f} + {floors[1]:5.1f} us"
        lines.append(f"{case.name:34s} {text}, {weight_copies(case, counts)} copies")
    return "\n".join(lines)
