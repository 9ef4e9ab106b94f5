"""The Grafana dashboard as code: `python deploy/observability/dashboard.py` writes it into the chart."""

from __future__ import annotations

import json
from pathlib import Path

import rank_rows
import service_rows
from expressions import SERVICE
from grafana_json import dashboard_json
from panels import Row, Variable

DASHBOARD = Path(__file__).parents[2] / "helm" / "moe-forward" / "dashboards" / "moe-forward.json"

VARIABLES = (
    Variable("namespace", "Namespace", "moe_forward_placement_generation"),
    Variable("instance", "Service", 'moe_forward_placement_generation{namespace=~"$namespace"}'),
    Variable("model", "Model", f"moe_forward_inflight_requests{{{SERVICE}}}"),
    Variable("rank", "Rank", f"moe_forward_rank_up{{{SERVICE}}}"),
)
REPLACED = f"changes(moe_forward_placement_generation{{{SERVICE}}}[1m]) > 0"


def rows() -> tuple[Row, ...]:
    """The dashboard, from what users notice down to what operators look up."""
    return (
        service_rows.traffic(),
        service_rows.latency(),
        service_rows.queue(),
        rank_rows.ranks(),
        rank_rows.devices(),
        rank_rows.reliability(),
    )


def text() -> str:
    """The file that Grafana reads."""
    description = "The expert part of transformer layers as a service: traffic, latency, ranks, experts and SLO."
    document = dashboard_json("moe-forward", "moe-forward", description, VARIABLES, rows(), REPLACED)
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text())
    print(f"wrote {DASHBOARD}")
