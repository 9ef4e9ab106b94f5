"""Where the engine's reports go: into the metrics, and into the running count of rows per rank for `/v1/ranks`."""

from __future__ import annotations

from collections import Counter

from moe_forward.api.ports import Link
from moe_forward.metrics import Metrics
from moe_forward.types import EngineStatus, StepReport


class Reports:
    """Listens to one link.

    rank_tokens: rank -> rows its experts computed since this front end started.
    """

    def __init__(self, link: Link, model: str, metrics: Metrics) -> None:
        self.rank_tokens: Counter[int] = Counter()
        self._model = model
        self._metrics = metrics
        self._on_status(link.status)
        link.on_status = self._on_status
        link.on_report = self._on_report

    def _on_status(self, status: EngineStatus) -> None:
        self._metrics.status_changed(status)

    def _on_report(self, report: StepReport) -> None:
        self._metrics.step_finished(self._model, report)
        for result in report.results:
            self.rank_tokens[result.rank] += result.routed_rows
