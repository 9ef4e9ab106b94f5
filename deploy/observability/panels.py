"""What a dashboard is made of: queries in panels, panels in rows, and variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stacked", "heatmap", "stat", "states", "bars"]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression with Grafana's variables in it. legend: with `{{label}}` for labels."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    title, description: what an operator sees. unit: Grafana's name of the unit.
    width, height: of the grid of 24 columns. maximum: of the axis; None: as large as needed. The minimum is 0.
    warning, bad: from these values on it is orange, red. repeat: variable with one panel for each of its values.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    maximum: float | None = None
    warning: float | None = None
    bad: float | None = None
    repeat: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice among the values that a label has. metric: series, with selector, that have it."""

    name: str
    title: str
    metric: str
