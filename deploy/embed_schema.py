"""Write the configuration's JSON schema into the chart's values.schema.json, so that chart and code cannot drift."""

from __future__ import annotations

import json
from pathlib import Path

from moe_forward.config import Config

VALUES_SCHEMA = Path(__file__).parents[1] / "helm" / "moe-forward" / "values.schema.json"


def embed(values_schema: Path) -> None:
    """Replace `properties.config` of the chart's schema; tests/chart asserts that it is current."""
    document = json.loads(values_schema.read_text())
    document["properties"]["config"] = Config.model_json_schema()
    values_schema.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    embed(VALUES_SCHEMA)
