"""A failing stage is told and ends nothing else; the tables leave no row out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from formats import ACTIVATIONS, INT4, WEIGHTS, Format, formats
from results import Results
from table import tables


def failing() -> None:
    raise ArithmeticError("seven is not eight")


def test_a_failing_stage_is_noted_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "results.json", 60.0)
    assert results.stage("first", lambda: None)
    assert results.exit_status == 0
    assert not results.stage("second", failing)
    assert results.stage("third", lambda: results.document["models"].update(seen={}))
    written = json.loads((tmp_path / "results.json").read_text())
    assert [stage["name"] for stage in written["stages"]] == ["first", "second", "third"]
    (failure,) = written["failures"]
    assert failure["stage"] == "second"
    assert "seven is not eight" in failure["traceback"]
    assert "in failing" in failure["traceback"]
    assert written["models"] == {"seen": {}}
    assert results.exit_status == 1
    assert "seven is not eight" in capsys.readouterr().out


def test_a_stage_after_the_deadline_is_not_run_and_said_to_be_missing(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", -1.0)
    ran: list[int] = []
    assert not results.stage("late", lambda: ran.append(1))
    assert ran == []
    assert "not run" in results.document["failures"][0]["traceback"]
    assert results.exit_status == 1


def test_every_int4_form_of_quantize_is_measured_with_every_granularity() -> None:
    found = formats()
    assert len(set(found)) == len(found)
    for weights in INT4:
        assert {each.activations for each in found if each.weights == weights} == {None, "token", "token_group"}
    assert Format("bf16", None) not in found


def test_the_tables_have_every_row_and_every_failure() -> None:
    printed = tables(document())
    lines = printed.splitlines()
    for weights in WEIGHTS:
        for activations in ACTIVATIONS:
            start = f"| {WEIGHTS[weights]} | {ACTIVATIONS[activations]} |"
            assert len([line for line in lines if line.startswith(start)]) == 2 + 2 * ((weights, activations) == SERVED)
    rows = [line for line in lines if line.startswith("| ") and "---" not in line]
    assert len({line.count("|") for line in rows}) <= 2, "a column is missing somewhere"
    assert "+0.01234 ± 0.00012" in printed
    assert "1.0e-03 to 2.0e-03" in printed
    assert "7 of 8" in printed
    assert printed.endswith("**Failed**: trained: served search/token: RuntimeError: no such device")


SERVED = ("search", "token")


def document() -> dict[str, Any]:
    """A result file with every format."""
    quality = {"loss": 0.9, "perplexity": 2.46, "bits_per_byte": 1.3}
    apart = {
        "loss_increase": 0.01234,
        "loss_increase_standard_error": 0.00012,
        "kl": 1e-3,
        "same_choice": 0.99,
        "logits": 0.02,
    }
    layers = {"1": {"from_bf16": 0.1, "from_float64": 1e-3}, "2": {"from_bf16": 0.2, "from_float64": 2e-3}}
    chosen = [(w, a) for w in WEIGHTS for a in ACTIVATIONS if (w, a) != ("bf16", None)]
    rows = [
        {"format": "", "weights": w, "activations": a, **quality, **apart, "layers": layers if a else {}}
        for w, a in chosen
    ]
    served = {
        "weights": SERVED[0],
        "activations": SERVED[1],
        "served": quality | apart,
        "local": quality | apart,
        "served_from_local": apart,
        "layers": layers,
        "texts_from_local": {"same": 7, "prompts": 8},
        "tokens_per_second": 1000.0,
    }
    model = {"channel_spread": {"1": 3.0, "2": 4.0}, "bf16": quality, "formats": rows, "served": [served]}
    about = dict.fromkeys(("date", "device", "python", "torch", "transformers", "command", "commit"), "x")
    traceback = "Traceback (most recent call last):\n  ...\nRuntimeError: no such device\n"
    return {
        "about": about,
        "models": {"trained": model, "outliers": model | {"from_trained": apart}},
        "failures": [{"stage": "trained: served search/token", "traceback": traceback}],
    }
