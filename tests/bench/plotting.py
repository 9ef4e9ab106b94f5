"""Two panels over one logarithmic axis: microseconds, and share of the floor. Needs matplotlib, not a dependency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
GREY = "#7f7f7f"


class Point(NamedTuple):
    """x: on the common axis. us: time. percent: of the floor."""

    x: float
    us: float
    percent: float


class Line(NamedTuple):
    """label: in the legend. points: by ascending x. dashed: drawn so."""

    label: str
    points: Sequence[Point]
    dashed: bool = False


def draw(title: str, x_label: str, lines: Sequence[Line], floor: Sequence[Point], out: Path) -> None:
    """Draw lines into an SVG.

    floor: points whose `us` are the floor, drawn in grey.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, share = figure.subplots(1, 2)
    time.plot([point.x for point in floor], [point.us for point in floor], color=GREY, linewidth=1, label="floor")
    share.axhline(100, color=GREY, linewidth=1)
    for line, colour in zip(lines, COLOURS, strict=False):
        style = {"color": colour, "marker": "o", "markersize": 3, "linestyle": "--" if line.dashed else "-"}
        time.plot([point.x for point in line.points], [point.us for point in line.points], label=line.label, **style)
        share.plot([point.x for point in line.points], [point.percent for point in line.points], **style)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes, name in ((time, "microseconds"), (share, "floor / time, %")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({point.x for point in floor}))
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x_label)
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    time.set_yscale("log")
    time.yaxis.set_major_formatter(plain)
    share.set_ylim(0, 105)
    figure.suptitle(title, fontsize=10)
    figure.legend(*time.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    # Text as text: small, and in the reader's font. Nothing that differs between two runs of the same data.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe-forward"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
