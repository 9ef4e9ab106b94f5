"""Results as a table for RELIABILITY.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

HEAD = (
    "| fault | trials | detected in, p50 / max | recovered in, p50 / max "
    "| answered | refused | not let in | cut off | wrong | lost | `--faults` |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each fault, over the trials of all documents."""
    trials: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        for trial in document["trials"]:
            trials.setdefault(trial["about"], []).append(trial)
    return "\n".join([*HEAD, *(_row(about, mine) for about, mine in trials.items())])


def _row(about: str, trials: Sequence[Mapping[str, Any]]) -> str:
    def total(*outcomes: str) -> str:
        return str(sum(trial["counts"][outcome] for trial in trials for outcome in outcomes))

    cells = [
        about,
        str(len(trials)),
        _seconds(trial["detected"] for trial in trials),
        _seconds(trial["recovered"] for trial in trials),
        total("right"),
        total("refused"),
        total("unconnected"),
        total("cut"),
        total("wrong", "broken"),
        total("lost"),
        trials[0]["fault"],
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(values: Iterable[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    return f"{median(known):.2f} s / {known[-1]:.2f} s" if known else "-"
