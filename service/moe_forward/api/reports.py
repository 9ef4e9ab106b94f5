"""Where the engine's reports go: into the metrics, and into the running count of rows per rank for `/v1/ranks`."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from moe_forward.api.ports import Link
from moe_forward.metrics import Metrics
from moe_forward.types import EngineStatus, QueueReport, StepReport


class HearsSteps(Protocol):
    """The part of a tracer that is told of steps."""

    def step_finished(self, report: StepReport) -> None:
        """Take in a step."""
        ...


class Reports:
    """Listens to one link.

    metrics: told of everything; None where another front end of the service exports it. tracer: also told of steps.
    rank_tokens: rank -> rows its experts computed since this front end started.
    """

    def __init__(self, link: Link, model: str, metrics: Metrics | None, tracer: HearsSteps | None = None) -> None:
        self.rank_tokens: Counter[int] = Counter()
        self._model = model
        self._metrics = metrics
        self._tracer = tracer
        self._on_status(link.status)
        link.on_status = self._on_status
        link.on_queue = self._on_queue
        link.on_report = self._on_report

    def _on_status(self, status: EngineStatus) -> None:
        if self._metrics is not None:
            self._metrics.status_changed(self._model, status)

    def _on_queue(self, report: QueueReport) -> None:
        if self._metrics is not None:
            self._metrics.queue_changed(self._model, report)

    def _on_report(self, report: StepReport) -> None:
        """Have traces know of the step before its answers go out."""
        if self._tracer is not None:
            self._tracer.step_finished(report)
        if self._metrics is not None:
            self._metrics.step_finished(self._model, report)
        for result in report.results:
            self.rank_tokens[result.rank] += result.routed_rows
