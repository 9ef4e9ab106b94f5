"""Prometheus series whose children are looked up once: `labels` makes strings of its values and takes a lock, and a
request has a dozen of them. And what has the last word before they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prometheus_client import Counter as PlainCounter
from prometheus_client import Gauge as PlainGauge
from prometheus_client import Histogram as PlainHistogram
from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

Self = TypeVar("Self", bound="_Remembering")


class _Remembering(MetricWrapperBase):
    def labels(self: Self, *labelvalues: Any, **labelkwargs: Any) -> Self:
        """Return the child of these values, given in order; by name they are not remembered."""
        if labelkwargs:
            return super().labels(*labelvalues, **labelkwargs)
        children = self.__dict__.setdefault("_remembered", {})
        child: Self | None = children.get(labelvalues)
        if child is None:
            child = children[labelvalues] = super().labels(*labelvalues)
        return child

    def remove(self, *labelvalues: Any) -> None:
        """Forget one child."""
        self.__dict__.pop("_remembered", None)
        super().remove(*labelvalues)

    def clear(self) -> None:
        """Forget all children."""
        self.__dict__.pop("_remembered", None)
        super().clear()


class Counter(_Remembering, PlainCounter):
    """See the module."""


class Gauge(_Remembering, PlainGauge):
    """See the module."""


class Histogram(_Remembering, PlainHistogram):
    """See the module."""


class Settling(Collector):
    """Has `settle` called whenever a registry is read; registered there before what is to be read."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle

    def describe(self) -> Iterator[Metric]:
        """Name no family."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Show nothing."""
        self._settle()
        return iter(())
