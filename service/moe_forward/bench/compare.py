"""Two reports side by side: the new one's figures as multiples of the old one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_forward.bench.report import SCHEMA_VERSION, Report

FIGURES = ("req/s", "tokens/s", "p50", "p99", "max")
SAME_FIELDS = ("dtype", "routing", "shared_experts", "layers", "arrivals", "processes")


def read_report(path: Path) -> dict[str, Any]:
    """Read a report that `--json` wrote. Raises: ValueError naming the file and what was expected."""
    try:
        document: Any = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the report {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        got = document.get("schema_version") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{path} must be a report of schema_version {SCHEMA_VERSION}, got {got}")
    return document


def comparison(report: Report, old: dict[str, Any]) -> str:
    """Return new/old of every point that both have, as text; says which points and settings differ."""
    new = json.loads(report.to_json())
    before = {row["name"]: row for row in old["rows"]}
    lines = [f"{'new / old':<34}{''.join(f'{figure:>10}' for figure in FIGURES)}"]
    for row in new["rows"]:
        other = before.pop(row["name"], None)
        if other is None:
            lines.append(f"{row['name']:<34}  only in the new report")
            continue
        pairs = zip(_figures(row), _figures(other), strict=True)
        lines.append(f"{row['name']:<34}" + "".join(f"{_ratio(now, then):>10}" for now, then in pairs))
    lines += [f"{name:<34}  only in the old report" for name in before]
    for field in ("model", "hidden_size"):
        lines += _difference(field, new[field], old[field])
    for field in SAME_FIELDS:
        lines += _difference(field, new["load"][field], old["load"][field])
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> list[float | None]:
    latency = row["latency_milliseconds"]
    return [row["requests_per_second"], row["tokens_per_second"], *(latency.get(name) for name in FIGURES[2:])]


def _ratio(now: float | None, then: float | None) -> str:
    return f"{now / then:.2f}x" if now is not None and then else "-"


def _difference(field: str, now: object, then: object) -> list[str]:
    return [] if now == then else [f"not the same load: {field} was {then}, is {now}"]
