"""Pictures show the numbers that Prometheus gave."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_prometheus import Series, fill_in
from panels import Panel, Query, Row

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[pictures]'")

from drawing import Drawn, Line, draw_row, inside_buckets, legend, quantity

START = 1000.0
PNG = b"\x89PNG\r\n"


def series(labels: dict[str, str], *values: float) -> Series:
    return Series(labels, tuple((START + second, value) for second, value in enumerate(values)))


def panel(kind: str, title: str = "A panel") -> Panel:
    return Panel(title, "What it means.", "s", (Query("moe_forward_rank_up"),), kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "unit", "written"),
    [
        (0.25, "percentunit", "25 %"),
        (0.0004, "s", "400 µs"),
        (0.02, "s", "20 ms"),
        (3.0, "s", "3 s"),
        (0.0, "s", "0"),
        (2.5e6, "Bps", "2.5 MB/s"),
        (12.0, "reqps", "12 /s"),
        (1500.0, "suffix: tokens/s", "1.5 ktokens/s"),
        (7.0, "none", "7"),
    ],
)
def test_a_quantity_has_its_unit(value: float, unit: str, written: str) -> None:
    assert quantity(value, unit) == written


def test_a_legend_takes_the_labels() -> None:
    assert legend("rank {{rank}} {{phase}}", {"rank": "3", "phase": "gemm1"}) == "rank 3 gemm1"


def test_a_heatmap_shows_what_is_between_two_bounds() -> None:
    cumulative = [series({"le": "+Inf"}, 9, 9), series({"le": "0.1"}, 2, 3), series({"le": "1"}, 5, 9)]
    bounds, _, counts = inside_buckets([Line("", one) for one in cumulative])
    assert bounds == [0.1, 1.0, float("inf")]
    assert counts.tolist() == [[2, 3], [3, 6], [4, 0]]


def test_every_kind_of_panel_is_drawn_and_one_without_data_too(tmp_path: Path) -> None:
    lines = (Line("a", series({"le": "1"}, 1, 0, 1)), Line("b", series({"le": "2"}, 1, 2, 1)))
    kinds = ("timeseries", "stacked", "heatmap", "states", "bars")
    drawn = [Drawn(panel(kind), kind, lines) for kind in kinds]
    drawn += [Drawn(panel("stat"), "stat", lines[:1]), Drawn(panel("timeseries"), "empty", ())]
    named = Line("a name that is longer than a column of the grid is wide", lines[0].series)
    drawn.append(Drawn(Panel("long", "What it means.", "none", (), "states", width=24, height=4), "long", (named,)))
    draw_row(Row("A row", tuple(one.panel for one in drawn)), drawn, START, START + 2, "caption", tmp_path / "row.png")
    assert (tmp_path / "row.png").read_bytes().startswith(PNG)


def test_a_query_keeps_no_variable() -> None:
    expression = 'rate(x{model=~"$model"}[$__rate_interval])'
    assert fill_in(expression, {"model": "tiny"}, "5s") == 'rate(x{model=~"tiny"}[5s])'
    with pytest.raises(ValueError, match="variable"):
        fill_in(expression, {}, "5s")
