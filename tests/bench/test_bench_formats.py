"""What the formats benchmark compares: nothing differs where nothing should, and a wrong scale is seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_formats import FORMATS, compare, measure_load
from format_cases import Shape, Weights

pytest.importorskip("transformers")

# warnings of transformers about itself are not about this package
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = Shape(hidden=256, intermediate=128, experts=4)


@pytest.mark.parametrize(("name", "rounded"), [("Mixtral, bf16", True), ("DeepSeek-R1-W4AFP8", False)])
def test_what_is_served_is_what_the_library_reads(name: str, rounded: bool, tmp_path: Path) -> None:
    kind = FORMATS[name]
    kind.write(tmp_path / "model", SMALL)
    largest, relative = compare(tmp_path / "model", kind)
    assert largest == 0
    assert 0.08 < relative < 0.2 if rounded else relative == 0  # what int4 costs

    def read_wrongly(folder: Path) -> Weights:
        return {matrix: weight * (1.01 if matrix.expert == 3 else 1) for matrix, weight in kind.read(folder).items()}

    assert compare(tmp_path / "model", replace(kind, read=read_wrongly))[0] > 0
    told = measure_load(tmp_path / "model")
    assert told["held_bytes"] > 4 * 3 * 256 * 128 // 2
    assert json.dumps(told)
