"""The sizes that the operator's guide tells are those that the service plans with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sizing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizing", ROOT / "deploy/sizing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_has_the_table_that_the_code_makes(sizing: ModuleType) -> None:
    assert f"\n{sizing.table()}\n" in (ROOT / "deploy/OPERATIONS.md").read_text(), "run python deploy/sizing.py"


def test_weights_are_what_int4_and_their_scales_take(sizing: ModuleType) -> None:
    for spec in sizing.specs():
        weights = sum(item.size_bytes for item in sizing.planned(spec, 8).weights if item.name == "routed experts")
        values = len(spec.layers) * spec.num_experts / 8 * 3 * spec.hidden_size * spec.intermediate_size
        assert 0.5 < weights / values < 0.5 + 4 / spec.group_size + 0.01, spec.name


def test_more_gpus_hold_less_each(sizing: ModuleType) -> None:
    for spec in sizing.specs():
        sizes = [sizing.planned(spec, ranks).total_bytes for ranks in (2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True)
