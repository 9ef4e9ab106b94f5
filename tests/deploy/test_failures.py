"""The page on failures names settings, series, headers and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from moe_forward import ladder
from moe_forward.client import MissingExperts
from moe_forward.config import Config
from moe_forward.errors import ErrorCode
from moe_forward.group_start import PLACE_SECONDS
from moe_forward.metrics import Metrics
from moe_forward.wire.missing import Missing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deploy/FAILURES.md").read_text()


def test_settings_that_are_named_exist_and_have_the_defaults_that_are_named() -> None:
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?::[^`]*)?`", PAGE)) - {code.slug for code in ErrorCode}
    fields = {"missing_routes", "missing_experts"}
    series = {name for name in named if name.startswith("moe_forward_")}
    assert named - fields - series <= set(Config.model_fields)
    assert "on_rank_loss" in named
    config = Config()
    for key in ("silence_seconds", "step_timeout_seconds"):
        assert f"`{key}` ({getattr(config, key):g})" in PAGE
    assert f"`max_rank_restarts` times within an hour ({config.max_rank_restarts})" in PAGE
    assert config.on_rank_loss == "fail"
    assert "**`fail`** (default)" in PAGE


def test_series_that_are_named_exist() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    known = {name for family in registry.collect() for name in (family.name, f"{family.name}_total")}
    assert {re.sub(r"\{.*", "", name) for name in re.findall(r"`(moe_forward_[^`]+)`", PAGE)} <= known


def test_times_that_are_named_are_those_of_the_code() -> None:
    assert (ladder.WINDOW_SECONDS, ladder.RESTORE_SECONDS, PLACE_SECONDS) == (3600, 60, 15)
    assert "within an hour" in PAGE
    assert "Once a minute" in PAGE
    assert "no other for 15 s" in PAGE


def test_what_a_client_is_told_has_the_names_that_are_documented() -> None:
    missing = Missing(3, 1, 4)
    for name, _ in missing.headers:
        assert name in PAGE.lower()
    assert all(f"`{name}`" in PAGE for name in missing.fields)
    assert f"`{MissingExperts.__name__}`" in PAGE


def test_files_that_are_linked_exist_and_operations_links_here() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "deploy" / target).exists(), target
    assert "(FAILURES.md)" in (ROOT / "deploy/OPERATIONS.md").read_text()
