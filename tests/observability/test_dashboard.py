"""The dashboard is what its code writes, names only series that exist, and says what each panel means."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard import DASHBOARD, text

from moe_forward.config import Config

from .names import exposed_families, names_in, recorded_names

OBSERVABILITY = Path(__file__).parents[2] / "deploy" / "observability"
VARIABLES = ["datasource", "namespace", "instance", "model", "rank"]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


@pytest.fixture(scope="module")
def panels(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in document["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def expressions(document: dict[str, Any], panels: list[dict[str, Any]]) -> list[str]:
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [variable["definition"] for variable in document["templating"]["list"][1:]]
    return asked + [annotation["expr"] for annotation in document["annotations"]["list"]]


def test_the_committed_file_is_what_the_code_writes() -> None:
    assert DASHBOARD.read_text() == text(), "run `make dashboard`"


def test_grafana_can_import_it_and_finds_it_again(document: dict[str, Any]) -> None:
    assert (document["id"], document["uid"]) == (None, "moe-forward")
    assert 39 <= document["schemaVersion"] <= 41
    assert [variable["name"] for variable in document["templating"]["list"]] == VARIABLES


def test_every_panel_says_what_it_means_and_in_which_unit(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        assert panel["title"], panel
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        for source in (panel, *panel["targets"]):
            assert source["datasource"]["uid"] == "${datasource}", panel["title"]
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_panels_have_their_own_numbers_and_places(document: dict[str, Any]) -> None:
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24, panel["title"]
        columns = range(position["x"], position["x"] + position["w"])
        cells = set(itertools.product(columns, range(position["y"], position["y"] + position["h"])))
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_query_takes_the_variables_and_the_rate_interval(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"]
            assert 'namespace=~"$namespace"' in expression, expression
            assert set(re.findall(r"\[([^]]+)\]", expression)) <= {"$__rate_interval"}, expression
            assert set(re.findall(r"\$(\w+)", expression)) <= {*VARIABLES, "__rate_interval"}, expression


def test_every_series_that_it_asks_for_exists(expressions: list[str]) -> None:
    exposed = set().union(*exposed_families().values())
    assert set().union(*map(names_in, expressions)) <= exposed | recorded_names()


def test_every_series_that_the_service_exposes_is_shown(expressions: list[str]) -> None:
    asked = set().union(*map(names_in, expressions))
    assert {family for family, names in exposed_families().items() if not names & asked} == set()


def test_prometheus_and_grafana_are_provisioned_with_the_same_interval_and_each_other() -> None:
    prometheus = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"moe-forward:{Config().metrics_port}"]}]
    (source,) = yaml.safe_load((OBSERVABILITY / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((OBSERVABILITY / "grafana/dashboards/provider.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"].startswith("/")
