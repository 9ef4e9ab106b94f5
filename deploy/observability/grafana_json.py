"""Rows of panels as the JSON that Grafana reads (dashboard model v1).

Only what the dashboard of this folder needs; everything is deterministic, so that the written file can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from panels import Panel, Query, Row, Variable

TYPES = {"stacked": "timeseries", "states": "state-timeline", "bars": "bargauge"}
"""Kind -> Grafana's panel type, where they differ."""

SCHEMA_VERSION = 41
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OK_COLOUR, WARNING_COLOUR, BAD_COLOUR = "green", "orange", "red"


def dashboard_json(
    uid: str, title: str, description: str, variables: Sequence[Variable], rows: Sequence[Row], restarts: str
) -> dict[str, Any]:
    """Return the document that Grafana imports.

    restarts: expression that is above 0 where an annotation should stand.
    """
    return {
        "annotations": {"list": [_annotation(restarts)]},
        "description": description,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "id": None,
        "links": [],
        "panels": list(_placed(rows)),
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": [uid],
        "templating": {"list": [_datasource_variable(), *map(_variable, variables)]},
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": title,
        "uid": uid,
        "version": 1,
        "weekStart": "",
    }


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Lay rows out from the top, panels from the left; ids count up."""
    number, top = 0, 0
    for row in rows:
        number += 1
        position = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
        yield {"collapsed": False, "gridPos": position, "id": number, "panels": [], "title": row.title, "type": "row"}
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            position = {"h": panel.height, "w": panel.width, "x": left, "y": top}
            yield _panel(panel, number, position)
            left, height = left + panel.width, max(height, panel.height)
        top += height


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    document = {
        "datasource": DATASOURCE,
        "description": panel.description,
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "gridPos": position,
        "id": number,
        "options": _options(panel),
        "targets": [_target(panel, query, chr(ord("A") + index)) for index, query in enumerate(panel.queries)],
        "title": panel.title,
        "type": TYPES.get(panel.kind, panel.kind),
    }
    if panel.repeat is not None:
        document |= {"repeat": panel.repeat, "repeatDirection": "h", "maxPerRow": COLUMNS // panel.width}
    return document


def _target(panel: Panel, query: Query, reference: str) -> dict[str, Any]:
    instant = panel.kind in ("stat", "bars")
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expression,
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        "instant": instant,
        "legendFormat": query.legend or "__auto",
        "range": not instant,
        "refId": reference,
    }


def _field(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": OK_COLOUR, "value": None}]
    limits = ((panel.warning, WARNING_COLOUR), (panel.bad, BAD_COLOUR))
    steps += [{"color": colour, "value": value} for value, colour in limits if value is not None]
    field: dict[str, Any] = {"min": 0, "thresholds": {"mode": "absolute", "steps": steps}, "unit": panel.unit}
    if panel.maximum is not None:
        field["max"] = panel.maximum
    if panel.kind in ("timeseries", "stacked"):
        field |= {"color": {"mode": "palette-classic"}, "custom": _curve(panel, marked=len(steps) > 1)}
    elif panel.kind == "states":
        shown = {"0": {"color": BAD_COLOUR, "text": "down"}, "1": {"color": OK_COLOUR, "text": "ready"}}
        field |= {"color": {"mode": "thresholds"}, "custom": {"fillOpacity": 70, "lineWidth": 0}}
        field["mappings"] = [{"options": shown, "type": "value"}]
    elif panel.kind == "bars":
        field["color"] = {"mode": "continuous-BlPu"}
    else:
        field["color"] = {"mode": "thresholds"}
    return field


def _curve(panel: Panel, marked: bool) -> dict[str, Any]:
    stacked = panel.kind == "stacked"
    return {
        "drawStyle": "line",
        "fillOpacity": 60 if stacked else 5,
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
        "thresholdsStyle": {"mode": "dashed" if marked else "off"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    legend = {"calcs": ["mean", "max"], "displayMode": "table", "placement": "bottom", "showLegend": True}
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "cellGap": 1,
            "color": {"exponent": 0.5, "fill": "dark-orange", "mode": "scheme", "scheme": "Oranges", "steps": 64},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "tooltip": {"mode": "single", "yHistogram": True},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": panel.unit},
        }
    if panel.kind == "stat":
        return {"colorMode": "value", "graphMode": "none", "reduceOptions": last, "textMode": "auto"}
    if panel.kind == "bars":
        return {"displayMode": "basic", "orientation": "horizontal", "reduceOptions": last, "showUnfilled": True}
    if panel.kind == "states":
        return {"alignValue": "left", "legend": {"showLegend": False}, "mergeValues": True, "rowHeight": 0.9}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def _datasource_variable() -> dict[str, Any]:
    return {
        "current": {},
        "hide": 0,
        "includeAll": False,
        "label": "Data source",
        "multi": False,
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "type": "datasource",
    }


def _variable(variable: Variable) -> dict[str, Any]:
    definition = f"label_values({variable.metric}, {variable.name})"
    return {
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "datasource": DATASOURCE,
        "definition": definition,
        "hide": 0,
        "includeAll": True,
        "label": variable.title,
        "multi": True,
        "name": variable.name,
        "options": [],
        "query": {"qryType": 1, "query": definition, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,
        "regex": "",
        "sort": 3,  # numbers in their order
        "type": "query",
    }


def _annotation(expression: str) -> dict[str, Any]:
    return {
        "datasource": DATASOURCE,
        "enable": True,
        "expr": expression,
        "hide": False,
        "iconColor": BAD_COLOUR,
        "name": "Rank group replaced",
        "step": "60s",
        "titleFormat": "Rank group replaced",
    }
