"""What every gate refuses, and what it does with no or bad rows."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch

from moe_forward import gates
from moe_forward.gates import GATES, KERNELS, choose, kernel_rule
from moe_forward.types import GateSpec
from w4afp8.routing import GateRule

SPECS = [GateSpec("deepseek_v3", num_groups=4, top_groups=2), GateSpec("softmax")]


def test_every_gate_of_the_table_is_tested_here() -> None:
    assert {spec.kind for spec in SPECS} == set(GATES)


def test_every_gate_says_which_kernel_computes_it() -> None:
    assert set(KERNELS) == set(GATES)
    grouped = GateSpec("deepseek_v3", 8, 4, normalize=False, scaling_factor=2.5)
    assert kernel_rule(grouped, 6) == GateRule("sigmoid", 6, 8, 4, False, 1e-20, 2.5)
    assert kernel_rule(GateSpec("softmax"), 8) == GateRule("softmax", 8, 1, 1, True, 0.0, 1.0)


def test_a_gate_without_a_kernel_has_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "KERNELS", MappingProxyType({"softmax": None}))
    assert kernel_rule(GateSpec("softmax"), 8) is None


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_no_rows_give_no_routes(spec: GateSpec) -> None:
    ids, weights = choose(spec, 3, torch.empty(0, 16), None)
    assert (list(ids.shape), list(weights.shape)) == ([0, 3], [0, 3])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_nan_row_keeps_its_ids_in_range_and_touches_no_other(spec: GateSpec, logits: torch.Tensor) -> None:
    clean_ids, clean_weights = choose(spec, 3, logits, None)
    bad = logits.clone()
    bad[4] = torch.nan
    ids, weights = choose(spec, 3, bad, None)
    assert bool(((ids >= 0) & (ids < 64)).all())
    others = torch.arange(67) != 4
    assert torch.equal(ids[others], clean_ids[others])
    assert torch.equal(weights[others], clean_weights[others])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 16).bfloat16()}, r"logits: expected float32 \[T, E\], got torch\.bfloat16"),
        ({"logits": torch.zeros(16)}, r"logits: expected float32 \[T, E\]"),
        ({"top_k": 0}, "top_k: expected 1 to 16"),
        ({"top_k": 17}, "top_k: expected 1 to 16, the number of experts, got 17"),
        ({"bias": torch.zeros(15)}, r"bias: expected float32 \[16\]"),
        ({"bias": torch.zeros(16, dtype=torch.float64)}, r"bias: expected float32 \[16\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(spec: GateSpec, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"top_k": 3, "logits": torch.zeros(2, 16), "bias": None} | change
    with pytest.raises(ValueError, match=message):
        choose(spec, **arguments)


def test_an_unknown_gate_is_refused() -> None:
    unknown: Any = "expert_choice"
    with pytest.raises(ValueError, match="gate: expected one of deepseek_v3, softmax, got 'expert_choice'"):
        choose(GateSpec(unknown), 1, torch.zeros(1, 4), None)
