"""Every panel shows data when a real Prometheus scrapes a real service under load of every kind."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from dashboard import rows
from local_prometheus import HOW_TO_INSTALL, RATE_INTERVAL, Prometheus, fill_in, find_prometheus
from local_service import SMALL
from mixed_load import CALLERS, put_load, read_model
from panels import Panel

from ..service.whole.running import Service
from .names import names_in, recorded_names, rules

pytestmark = pytest.mark.service

LOAD_SECONDS = 12.0
STEP_SECONDS = 1.0
ABSENT_ON_CPU = {"GPU memory"}
CHOSEN = {"namespace": "live", "model": "tiny"}
"""What a user would choose; the other variables stand at All."""


@dataclass(frozen=True)
class Live:
    """A service that had load from start to end (Unix seconds), and the Prometheus that watched it."""

    prometheus: Prometheus
    start: float
    end: float
    statuses: Counter[int]
    metrics: str


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    binary = find_prometheus()
    if binary is None:
        pytest.skip(HOW_TO_INSTALL)
    service = Service(SMALL["model"], SMALL["ranks"], SMALL)
    try:
        service.wait_ready()
        target = service.metrics_url.removeprefix("http://").removesuffix("/metrics")
        labels = {"namespace": CHOSEN["namespace"]}
        with Prometheus(binary, tmp_path_factory.mktemp("prometheus"), target, labels) as prometheus:
            prometheus.wait_scraped()
            start = time.time()
            statuses = asyncio.run(put_load(service.url, read_model(service.url), LOAD_SECONDS, CALLERS))
            yield Live(prometheus, start, time.time(), statuses, service.metrics())
    finally:
        service.close()


def has_data(live: Live, expression: str) -> bool:
    variables = {"instance": ".*", "rank": ".*", **CHOSEN}
    asked = fill_in(expression, variables, RATE_INTERVAL)
    return bool(live.prometheus.query_range(asked, live.start, live.end, STEP_SECONDS))


def test_the_load_was_of_every_kind(live: Live) -> None:
    assert set(live.statuses) == {200, 400, 404, 413, 415, 422, 429, 504}


@pytest.mark.parametrize("panel", [panel for row in rows() for panel in row.panels], ids=lambda panel: panel.title)
def test_every_query_of_every_panel_returns_data(live: Live, panel: Panel) -> None:
    found = [has_data(live, query.expression) for query in panel.queries]
    assert found == [panel.title not in ABSENT_ON_CPU] * len(panel.queries)


def test_every_series_of_dashboard_and_rules_is_there(live: Live) -> None:
    exposed = set(re.findall(r"^([a-z_]+)[{ ]", live.metrics, re.MULTILINE))
    expressions = [query.expression for row in rows() for panel in row.panels for query in panel.queries]
    expressions += [rule["expr"] for name in ("recording", "alerts") for rule in rules(name)]
    asked = set().union(*map(names_in, expressions)) - recorded_names()
    assert asked - exposed == {"moe_forward_gpu_memory_bytes"}


def test_every_recording_rule_has_recorded(live: Live) -> None:
    empty = [name for name in recorded_names() if not has_data(live, name)]
    assert empty == []
