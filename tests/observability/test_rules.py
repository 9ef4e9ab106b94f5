"""The rules: Prometheus takes them, every alert fires and stays quiet as its cases say, and its runbook is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from .names import CHART, exposed_families, names_in, recorded_names, rules

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "rules_test.yaml"
ALERTS = rules("alerts")
PROMTOOL_SECONDS = 120


@pytest.fixture(scope="module")
def promtool() -> str:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("no promtool on PATH: apt-get install prometheus")
    return binary


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(CASES.read_text())["tests"]
    return found


def run(promtool: str, *arguments: str) -> str:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=PROMTOOL_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules_and_the_configuration(promtool: str) -> None:
    run(promtool, "check", "rules", *(str(CHART / "rules" / f"{name}.yaml") for name in ("recording", "alerts")))
    run(promtool, "check", "config", str(ROOT / "deploy" / "observability" / "prometheus.yml"))


def test_every_alert_fires_and_stays_quiet_as_its_cases_say(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", str(CASES))


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_every_alert_has_a_case_that_fires_and_one_that_does_not(cases: list[dict[str, Any]], alert: str) -> None:
    (rule,) = (rule for rule in ALERTS if rule["alert"] == alert)
    sources = {name for name in names_in(rule["expr"]) if ":" not in name}
    for case in cases:
        given = set().union(*(names_in(series["series"]) for series in case["input_series"]))
        if not case["name"].startswith(alert + " "):
            continue
        assert not sources or sources & given, case["name"]
        listed = [sample["labels"] for test in case["promql_expr_test"] for sample in test["exp_samples"]]
        fires = any(f'alertname="{alert}"' in labels for labels in listed)
        assert fires == case["name"].startswith(f"{alert} fires: "), case["name"]
        assert fires or "max_over_time(ALERTS" in case["promql_expr_test"][0]["expr"], case["name"]
    names = [case["name"] for case in cases]
    assert any(name.startswith(f"{alert} fires: ") for name in names)
    assert any(name.startswith(f"{alert} stays quiet: ") for name in names)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("MoEForward")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    headings = re.findall(r"^## (.+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_the_runbook_says_what_it_means_how_to_check_and_what_to_do(alert: str) -> None:
    text = (ROOT / "deploy/observability/RUNBOOK.md").read_text()
    (section,) = re.findall(rf"^## {alert}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    for part in ("**Means.**", "**Check.**", "**Do.**"):
        assert part in section, part


def test_the_runbook_has_no_alert_that_does_not_exist() -> None:
    text = (ROOT / "deploy/observability/RUNBOOK.md").read_text()
    assert re.findall(r"^## (MoEForward.+)$", text, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_rules_ask_for_series_that_exist() -> None:
    exposed = set().union(*exposed_families().values())
    asked = set().union(*(names_in(rule["expr"]) for rule in [*ALERTS, *rules("recording")]))
    assert asked <= exposed | recorded_names()
