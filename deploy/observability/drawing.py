"""A row of the dashboard as a picture, from what Prometheus answered. Needs matplotlib (extra `pictures`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from local_prometheus import Series
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from panels import Panel, Row

# Okabe and Ito's colours, which colour-blind readers can tell apart, then greys.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#7f7f7f", "#bfbfbf")
COLUMNS = 24
WIDTH_INCHES = 12.6
UNIT_INCHES = 0.29
DOTS_PER_INCH = 80
LEGEND_LINES = 10
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
SMALL_SECONDS = ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs"))


@dataclass(frozen=True, slots=True)
class Line:
    """A series of a panel under the name that its legend gives it."""

    name: str
    series: Series


@dataclass(frozen=True, slots=True)
class Drawn:
    """A panel, with its title filled in, and what Prometheus had for it."""

    panel: Panel
    title: str
    lines: tuple[Line, ...]


def legend(text: str, labels: Mapping[str, str]) -> str:
    """Fill a legend as Grafana does."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), text).strip()


def draw_row(row: Row, panels: Sequence[Drawn], start: float, end: float, caption: str, out: Path) -> None:
    """Write a row's picture as PNG. start, end: Unix seconds that the axes span. caption: one line below."""
    lines = _lines_of([drawn.panel for drawn in panels])
    heights = [max(panels[index].panel.height for index in line) for line in lines]
    with mpl.rc_context({"font.size": 7.5, "axes.titlesize": 8.5, "axes.axisbelow": True}):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) * UNIT_INCHES + 0.6), layout="constrained")
        # a figure for each line: in one grid, names at the left of one panel would squeeze the panels below it
        for part, line in zip(
            figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False).flat, lines, strict=True
        ):
            widths = [panels[index].panel.width for index in line]
            free = [COLUMNS - sum(widths)] if sum(widths) < COLUMNS else []
            places = part.subplots(1, len(widths + free), width_ratios=widths + free, squeeze=False)[0]
            for axes, index in zip(places, line, strict=False):
                axes.set_title(panels[index].title, loc="left")
                _draw(axes, panels[index], start, end)
            for axes in places[len(line) :]:
                axes.set_axis_off()
        figure.suptitle(row.title, fontsize=11, x=0.01, ha="left", weight="bold")
        figure.supxlabel(caption, fontsize=7, x=0.01, ha="left", color="#555555")
        figure.savefig(out, dpi=DOTS_PER_INCH, pil_kwargs={"optimize": True})


def _lines_of(panels: Sequence[Panel]) -> list[list[int]]:
    """Return the numbers of the panels that stand beside one another, from the top."""
    lines: list[list[int]] = [[]]
    for index, panel in enumerate(panels):
        if sum(panels[other].width for other in lines[-1]) + panel.width > COLUMNS:
            lines.append([])
        lines[-1].append(index)
    return lines


def _draw(axes: Any, drawn: Drawn, start: float, end: float) -> None:
    kind = drawn.panel.kind
    axes.spines[["top", "right"]].set_visible(False)
    if not drawn.lines:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color="#999999", transform=axes.transAxes)
        axes.set_axis_off()
        return
    if kind == "stat":
        _draw_number(axes, drawn)
    elif kind == "bars":
        _draw_bars(axes, drawn)
    else:
        axes.set_xlim(0, end - start)
        axes.set_xlabel("seconds")
        if kind == "heatmap":
            _draw_heatmap(axes, drawn, start)
        elif kind == "states":
            _draw_states(axes, drawn, start)
        else:
            _draw_curves(axes, drawn, start)


def _draw_curves(axes: Any, drawn: Drawn, start: float) -> None:
    lines = sorted(drawn.lines, key=lambda line: -sum(value for _, value in line.series.points))
    if drawn.panel.kind == "stacked":
        times = sorted({at for line in lines for at, _ in line.series.points})
        values = [[dict(line.series.points).get(at, 0.0) for at in times] for line in lines]
        axes.stackplot(
            [at - start for at in times],
            values,
            labels=[line.name for line in lines],
            colors=COLOURS,
            linewidth=0,
        )
    else:
        for index, line in enumerate(lines):
            at, value = zip(*line.series.points, strict=True)
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(np.array(at) - start, value, linewidth=1, label=line.name, color=colour)
    handles, names = axes.get_legend_handles_labels()
    named = [(handle, name) for handle, name in zip(handles, names, strict=True) if name][:LEGEND_LINES]
    columns = 1 + len(named) // 4
    headroom = 1.08 + 0.11 * math.ceil(len(named) / columns)  # for the legend
    axes.set_ylim(0, max(axes.get_ylim()[1] / 1.05, 1e-9) * headroom)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value, drawn.panel.unit)))
    if named:
        axes.legend(*zip(*named, strict=True), fontsize=6, frameon=False, loc="upper left", ncols=columns)


def _draw_heatmap(axes: Any, drawn: Drawn, start: float) -> None:
    bounds, times, counts = inside_buckets(drawn.lines)
    used = np.flatnonzero(counts.sum(1))
    if not used.size:
        return
    first, last = int(used.min()), int(used.max()) + 1
    shown = np.ma.masked_less_equal(counts[first:last], 0.0)
    edges = np.arange(last - first + 1)
    seconds = np.array(times) - start
    axes.pcolormesh(np.append(seconds, 2 * seconds[-1] - seconds[-2]), edges, shown, cmap="YlOrRd")
    names = [f"≤ {quantity(bound, drawn.panel.unit)}" for bound in bounds[first:last]]
    axes.set_yticks(edges[1:], names, fontsize=6)


def inside_buckets(lines: Sequence[Line]) -> tuple[list[float], list[float], Any]:
    """Turn cumulative buckets into what lies inside each.

    lines: one for each upper bound `le`.
    Returns: upper bounds ascending, times in Unix seconds, and counts [bounds, times].
    """
    ordered = sorted(lines, key=lambda line: float(line.series.labels["le"]))
    times = sorted({at for line in ordered for at, _ in line.series.points})
    cumulative = np.array([[dict(line.series.points).get(at, 0.0) for at in times] for line in ordered])
    inside = np.diff(cumulative, axis=0, prepend=0.0).clip(min=0.0)
    return [float(line.series.labels["le"]) for line in ordered], times, inside


def _draw_states(axes: Any, drawn: Drawn, start: float) -> None:
    for index, line in enumerate(drawn.lines):
        at, up = (np.array(column) for column in zip(*line.series.points, strict=True))
        for value, colour in ((1.0, COLOURS[2]), (0.0, COLOURS[5])):
            axes.fill_between(at - start, index + 0.1, index + 0.9, where=up == value, color=colour, step="post", lw=0)
    axes.set_yticks(np.arange(len(drawn.lines)) + 0.5, [line.name for line in drawn.lines])
    axes.set_ylim(0, max(4, len(drawn.lines)))
    axes.text(0.99, 0.95, "green: ready", ha="right", va="top", transform=axes.transAxes, fontsize=6)


def _draw_bars(axes: Any, drawn: Drawn) -> None:
    lines = sorted(drawn.lines, key=lambda line: line.series.points[-1][1])
    heights = range(len(lines))
    axes.barh(heights, [line.series.points[-1][1] for line in lines], color=COLOURS[4])
    for height, line in zip(heights, lines, strict=True):
        axes.annotate(line.name, (0, height), (2, 0), textcoords="offset points", va="center", fontsize=5.5)
    axes.set_yticks([])
    axes.set_ylim(-0.6, max(4, len(lines)) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value, drawn.panel.unit)))


def _draw_number(axes: Any, drawn: Drawn) -> None:
    (line,) = drawn.lines
    shown = quantity(line.series.points[-1][1], drawn.panel.unit)
    axes.text(0.5, 0.5, shown, fontsize=16, ha="center", va="center", transform=axes.transAxes, color=COLOURS[0])
    axes.set_axis_off()


def quantity(value: float, unit: str) -> str:
    """Write a value with its unit, short."""
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if unit == "s":
        factor, name = next((factor, name) for low, factor, name in SMALL_SECONDS if abs(value) >= low)
        return f"{value * factor:.3g} {name}"
    scale, prefix = next(((scale, prefix) for scale, prefix in PREFIXES if abs(value) >= scale), (1.0, ""))
    name = {"none": "", "reqps": "/s", "Bps": "B/s", "bytes": "B"}.get(unit, unit.removeprefix("suffix: "))
    return f"{value / scale:.3g} {prefix}{name}".strip()
