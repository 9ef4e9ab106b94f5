"""Which series exist, and which an expression asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from moe_forward.metrics import Metrics

CHART = Path(__file__).parents[2] / "helm" / "moe-forward"
HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")


def names_in(expression: str) -> set[str]:
    """Return the names of the product's series in an expression."""
    return set(re.findall(r"\bmoe_forward[a-z0-9_:]*", expression))


def rules(name: str) -> list[dict[str, Any]]:
    """Return the rules of a file of the chart."""
    groups = yaml.safe_load((CHART / "rules" / f"{name}.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded_names() -> set[str]:
    """Return the names that the recording rules make."""
    return {rule["record"] for rule in rules("recording")}


def exposed_families() -> dict[str, set[str]]:
    """Return family -> names of its samples, of everything that the service can expose."""
    registry = CollectorRegistry()
    Metrics(registry, expert_metrics=True)
    families: dict[str, set[str]] = {}
    for family in registry.collect():
        if family.type == "counter":
            families[family.name] = {f"{family.name}_total"}
        elif family.type == "histogram":
            families[family.name] = {family.name + suffix for suffix in HISTOGRAM_SUFFIXES}
        else:
            families[family.name] = {family.name}
    return families
