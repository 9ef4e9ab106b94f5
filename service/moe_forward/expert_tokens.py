"""The tokens of every single expert, as one counter with a series for each layer and expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from moe_forward.errors import ConfigError

MAX_SERIES = 32_768
"""Layers times experts that one scrape may show: 60 layers of 512 experts, and some 2 MB of text."""


def check_series(layers: int, num_experts: int) -> None:
    """See that a model's experts are few enough to be shown one by one.

    Raises: ConfigError with the numbers.
    """
    if layers * num_experts > MAX_SERIES:
        raise ConfigError(
            f"expert_metrics: {layers} layers of {num_experts} experts are {layers * num_experts} series, expected at "
            f"most {MAX_SERIES}; serve fewer layers here, or leave it off"
        )


class ExpertTokens(Collector):
    """Adds up rows of experts; a layer is shown from its first step on.

    A step has a row count for every expert, so they are kept in lists and made into series when somebody asks, which
    costs a step microseconds instead of a lookup for each expert.

    name, text: of the counter. registry: where it is registered.
    """

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._layers: dict[int, tuple[int, ...]] = {}
        registry.register(self)

    def add(self, layer: int, rows: Sequence[int]) -> None:
        """Count a step. rows: of each expert in id order, as many in every step."""
        before = self._layers.get(layer) or (0,) * len(rows)
        self._layers[layer] = tuple(old + new for old, new in zip(before, rows, strict=True))

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Name the counter, so that no other can be registered under its name."""
        yield CounterMetricFamily(self._name, self._text, labels=("layer", "expert"))

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Make the series; may run on another thread than `add`."""
        family = CounterMetricFamily(self._name, self._text, labels=("layer", "expert"))
        for layer, rows in sorted(self._layers.copy().items()):
            for expert, count in enumerate(rows):
                family.add_metric((str(layer), str(expert)), count)
        yield family
