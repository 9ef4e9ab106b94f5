"""A report as a picture: latency percentiles and throughput against load. Needs matplotlib, the extra `pictures`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_forward.bench.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7")
STYLES = {"p50": "-", "p90": "--", "p99": ":"}
RATES = "requests per second, asked for"
FORMATS = (".svg", ".png")


def check_picture(path: Path) -> None:
    """Raises: ValueError for a file that cannot be drawn, before hours of load."""
    if path.suffix not in FORMATS:
        raise ValueError(f"plot must be a file named *{' or *'.join(FORMATS)}, got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot needs matplotlib: pip install 'moe-forward[pictures]'")


def draw(report: Report, path: Path) -> None:
    """Draw latency and throughput over the load: rates, callers, or sizes where nothing else varies."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lines, x_label = _lines(report.rows)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for (label, points), colour in zip(lines.items(), _colours(len(lines)), strict=True):
        xs = [x for x, _ in points]
        for name, style in STYLES.items():
            drawn = [(x, row.latency_milliseconds[name]) for x, row in points if row.latency_milliseconds]
            marked: dict[str, Any] = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3}
            latency.plot([x for x, _ in drawn], [y for _, y in drawn], label=f"{label} {name}".strip(), **marked)
        throughput.plot(xs, [row.tokens_per_second for _, row in points], color=colour, marker="o", markersize=3)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    for axes, title in ((latency, "latency, ms"), (throughput, "tokens per second")):
        _finish(axes, x_label, title)
        if x_label != RATES:  # callers and sizes are mostly powers of two
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    loops = " and ".join(dict.fromkeys(f"{row.loop} loop" for row in report.rows))
    figure.suptitle(f"{report.model}, {report.load.dtype}, {loops}", fontsize=10)
    figure.legend(*latency.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    # Text as text: small, and in the reader's font. Nothing that differs between two runs of the same data.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe-forward"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, format=path.suffix[1:], metadata=metadata, dpi=150)


def _lines(rows: Sequence[Row]) -> tuple[dict[str, list[tuple[float, Row]]], str]:
    loads = {row.rate if row.rate is not None else row.connections for row in rows}
    sizes = {row.size for row in rows}
    over_sizes = len(loads) == 1 and len(sizes) > 1
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        load = float(row.connections if row.rate is None else row.rate)
        label, x = ("", float(row.size)) if over_sizes else (_label(row), load)
        lines.setdefault(label, []).append((x, row))
    for points in lines.values():
        points.sort(key=lambda point: point[0])
    if over_sizes:
        return lines, "tokens of a request"
    return lines, "callers" if rows[0].rate is None else RATES


def _label(row: Row) -> str:
    return "mix" if row.size == "mix" else f"T={row.size}"


def _colours(number: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(number)]


def _finish(axes: Axes, x_label: str, title: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
