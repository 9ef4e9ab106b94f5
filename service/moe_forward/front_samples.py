"""One metrics page of several front ends: each sends what it counted, and the page shows the sums.

Not prometheus_client's multiprocess mode: that one costs every request a third more of the time of counting it, and
knows no exemplars.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Exemplar, Metric, Sample
from prometheus_client.registry import Collector

from moe_forward.messages import FrontSamples, Labels, SampleValue

Key = tuple[str, str, Labels]
"""Family, sample and labels."""


def read_samples(registry: CollectorRegistry) -> FrontSamples:
    """Return every value in `registry`."""
    return FrontSamples(
        tuple(_value(family.name, sample) for family in registry.collect() for sample in family.samples)
    )


class MergedSamples(Collector):
    """Shows a registry with the samples of front ends added to it.

    Counters and histograms of a front end that is gone stay in the sums; its gauges do not, since they told of itself.

    own: has every family that front ends may send. What is in it is shown too.
    registry: shows all of it, to a metrics server.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own
        self._kinds = {family.name: family.type for family in own.collect()}
        self._fronts: dict[int, dict[Key, SampleValue]] = {}
        self._gone: dict[Key, SampleValue] = {}
        self._lock = threading.Lock()  # scrapes come on threads of their own
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def update(self, front: int, samples: FrontSamples) -> None:
        """Take in what a front end counted since it started. front: its number."""
        with self._lock:
            self._fronts[front] = {_key(sample): sample for sample in samples.samples}

    def front_is_gone(self, front: int) -> None:
        """Keep what a front end counted; another one of its number starts at zero."""
        with self._lock:
            for key, sample in self._fronts.pop(front, {}).items():
                if self._kinds[sample[0]] != "gauge":
                    self._gone[key] = _sum(self._gone.get(key), sample)

    def describe(self) -> Iterator[Metric]:
        """Name the families, so that no other can be registered under their names."""
        for family in self._own.collect():
            yield Metric(family.name, family.documentation, family.type)

    def collect(self) -> Iterator[Metric]:
        """Add up."""
        with self._lock:
            parts = [self._gone, *self._fronts.values()]
        found: dict[str, dict[Key, SampleValue]] = {}
        own = list(self._own.collect())
        for family in own:
            values = (_value(family.name, sample) for sample in family.samples)
            found[family.name] = {_key(value): value for value in values}
        for part in parts:
            for key, sample in part.copy().items():
                family_samples = found[sample[0]]
                family_samples[key] = _sum(family_samples.get(key), sample)
        for family in own:
            shown = Metric(family.name, family.documentation, family.type)
            shown.samples = [_sample(value) for value in found[family.name].values()]
            yield shown


def _key(value: SampleValue) -> Key:
    return value[:3]


def _value(family: str, sample: Sample) -> SampleValue:
    exemplar = None
    if sample.exemplar is not None:
        shown = sample.exemplar
        exemplar = (tuple(shown.labels.items()), float(shown.value), float(shown.timestamp or 0.0))
    return family, sample.name, tuple(sample.labels.items()), sample.value, exemplar


def _sample(value: SampleValue) -> Sample:
    _, name, labels, number, exemplar = value
    shown = None if exemplar is None else Exemplar(dict(exemplar[0]), exemplar[1], exemplar[2])
    return Sample(name, dict(labels), number, None, shown)


def _sum(before: SampleValue | None, sample: SampleValue) -> SampleValue:
    """Add two values of one sample; the newest exemplar stays."""
    if before is None:
        return sample
    exemplars = [value[4] for value in (before, sample) if value[4] is not None]
    newest = max(exemplars, key=lambda exemplar: exemplar[2], default=None)
    return *sample[:3], before[3] + sample[3], newest
