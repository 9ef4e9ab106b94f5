"""What CutlassExperts asks of the kernels, which a CPU computes here; test_cutlass_experts_gpu.py runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moe_forward.errors import StartError
from moe_forward.experts import LayerExperts, cutlass
from moe_forward.experts.cutlass import CutlassExperts
from w4afp8 import Granularity, Quantized, quantize_tokens, reference

from . import kernels_on_cpu
from .expert_cases import (
    LAYER,
    LAYER_ERROR,
    exact_rows,
    make_layer,
    make_rows,
    no_clock,
    offsets_of,
    relative_error,
    with_dead_rows,
)

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE = 512, 384
COUNTS = [0, 160, 1, 0, 39]
ROWS = sum(COUNTS)


@dataclass
class Calls:
    """What was asked of the kernels."""

    gemms: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put the kernels on the CPU and note what they are asked."""
    noted = Calls()

    def grouped_gemm(*arguments: Any, **options: Any) -> torch.Tensor:
        noted.gemms.append(options)
        return kernels_on_cpu.grouped_gemm(*arguments, **options)

    monkeypatch.setattr(cutlass, "grouped_gemm", grouped_gemm)
    monkeypatch.setattr(cutlass, "quantize_tokens_cuda", kernels_on_cpu.quantize_tokens_cuda)
    return noted


@pytest.fixture(params=["token", "token_group"])
def granularity(request: pytest.FixtureRequest) -> Granularity:
    chosen: Granularity = request.param
    return chosen


@pytest.fixture(scope="module", params=[128, 32], ids=["group128", "group32"])
def layer(request: pytest.FixtureRequest) -> LayerExperts:
    return make_layer(len(COUNTS), HIDDEN, INTERMEDIATE, request.param)


@pytest.fixture
def experts(layer: LayerExperts, granularity: Granularity) -> CutlassExperts:
    return CutlassExperts({LAYER: layer}, granularity, CPU)


@pytest.fixture
def row_weights() -> torch.Tensor:
    return torch.rand(ROWS, generator=torch.Generator().manual_seed(1))


def test_rows_pass_through_their_experts(
    experts: CutlassExperts, layer: LayerExperts, granularity: Granularity, row_weights: torch.Tensor
) -> None:
    rows = make_rows(ROWS, HIDDEN, granularity)
    y = experts.forward(LAYER, rows, offsets_of(COUNTS), row_weights, 6, no_clock)
    assert (y.dtype, list(y.shape)) == (torch.bfloat16, [ROWS, HIDDEN])
    assert relative_error(y, exact_rows(layer, rows, COUNTS, row_weights, granularity)) < LAYER_ERROR


def test_nan_in_rows_of_no_expert_reaches_no_other(
    experts: CutlassExperts, granularity: Granularity, row_weights: torch.Tensor
) -> None:
    rows, offsets = make_rows(ROWS, HIDDEN, granularity), offsets_of(COUNTS)
    tight = experts.forward(LAYER, rows, offsets, row_weights, 6, no_clock)
    weights = torch.cat([row_weights, torch.full((9,), torch.nan)])
    roomy = experts.forward(LAYER, with_dead_rows(rows, 9), offsets, weights, 6, no_clock)
    assert list(roomy.shape) == [ROWS + 9, HIDDEN]
    assert torch.equal(roomy[:ROWS], tight)
    assert bool(tight.isfinite().all())


def test_row_that_overflows_between_the_gemms_is_nan_and_alone(
    experts: CutlassExperts, granularity: Granularity, row_weights: torch.Tensor
) -> None:
    offsets = offsets_of(COUNTS)
    clean = experts.forward(LAYER, make_rows(ROWS, HIDDEN, granularity), offsets, row_weights, 6, no_clock)
    loud = make_rows(ROWS, HIDDEN, granularity, loud=5)
    y = experts.forward(LAYER, loud, offsets, row_weights, 6, no_clock)
    assert bool(y[5].isnan().all())
    others = torch.arange(ROWS) != 5
    assert torch.equal(y[others], clean[others])


def test_shared_expert_takes_every_row(
    experts: CutlassExperts, layer: LayerExperts, granularity: Granularity, calls: Calls
) -> None:
    rows = make_rows(200, HIDDEN, granularity)
    y = experts.shared(LAYER, rows)
    assert layer.shared is not None
    exact = reference.expert_forward(rows, layer.shared, granularity, torch.float64)
    assert (y.dtype, list(y.shape)) == (torch.float32, [200, HIDDEN])
    assert relative_error(y, exact) < LAYER_ERROR
    assert [call["expected_rows"] for call in calls.gemms] == [200, 200]


def test_tile_hint_is_of_a_busy_expert(
    experts: CutlassExperts, granularity: Granularity, row_weights: torch.Tensor, calls: Calls
) -> None:
    rows = make_rows(ROWS, HIDDEN, granularity)
    experts.forward(LAYER, rows, offsets_of(COUNTS), row_weights, 40, no_clock)
    assert [call["expected_rows"] for call in calls.gemms] == [80, 80]


def test_without_rows_or_experts_nothing_is_launched(
    experts: CutlassExperts, granularity: Granularity, calls: Calls
) -> None:
    none, empty = make_rows(0, HIDDEN, granularity), torch.empty(0)
    offsets = offsets_of([0] * len(COUNTS))
    assert list(experts.forward(LAYER, none, offsets, empty, 1, no_clock).shape) == [0, HIDDEN]
    assert list(experts.shared(LAYER, none).shape) == [0, HIDDEN]
    idle = CutlassExperts({LAYER: make_layer(0, HIDDEN, INTERMEDIATE)}, granularity, CPU)
    dead = with_dead_rows(none, 4)
    y = idle.forward(LAYER, dead, offsets_of([]), torch.full((4,), torch.nan), 1, no_clock)
    assert (y.dtype, list(y.shape)) == (torch.bfloat16, [4, HIDDEN])
    assert not calls.gemms
    assert list(idle.shared(LAYER, make_rows(2, HIDDEN, granularity)).shape) == [2, HIDDEN]


def test_tokens_are_quantized_in_the_services_granularity(experts: CutlassExperts, granularity: Granularity) -> None:
    x = torch.randn(3, HIDDEN)
    x[1, 5] = torch.nan
    tokens, non_finite = experts.quantize(x)
    expected, flagged = quantize_tokens(x, granularity)
    assert torch.equal(tokens.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(tokens.scales, expected.scales)
    assert torch.equal(non_finite, flagged)


def test_clock_times_three_phases_in_order(
    experts: CutlassExperts, granularity: Granularity, row_weights: torch.Tensor
) -> None:
    seen: list[str] = []

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        seen.append(f"+{name}")
        yield
        seen.append(f"-{name}")

    experts.forward(LAYER, make_rows(ROWS, HIDDEN, granularity), offsets_of(COUNTS), row_weights, 1, clock)
    assert seen == ["+gemm1", "-gemm1", "+activation", "-activation", "+gemm2", "-gemm2"]


def test_layers_and_rows_that_do_not_fit_are_refused(
    experts: CutlassExperts, granularity: Granularity, row_weights: torch.Tensor
) -> None:
    other: Granularity = "token" if granularity == "token_group" else "token_group"
    rows, offsets = make_rows(ROWS, HIDDEN, granularity), offsets_of(COUNTS)
    wrong: Quantized = make_rows(ROWS, HIDDEN, other)
    with pytest.raises(ValueError, match=r"layer: expected one of \[3\], got 4"):
        experts.forward(4, rows, offsets, row_weights, 1, no_clock)
    with pytest.raises(ValueError, match=f"for granularity {granularity}"):
        experts.forward(LAYER, wrong, offsets, row_weights, 1, no_clock)
    with pytest.raises(ValueError, match=f"for granularity {granularity}"):
        experts.shared(LAYER, wrong)
    without = CutlassExperts({LAYER: make_layer(1, HIDDEN, INTERMEDIATE, shared=False)}, granularity, CPU)
    with pytest.raises(ValueError, match="layer: 3 has no shared expert"):
        without.shared(LAYER, rows)


@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate", "group", "message"),
    [
        (
            2,
            256,
            128,
            64,
            r"scales for 128 or 32 inputs, layer 3 has \[128, 256\] with scales for 64; set experts: ref",
        ),
        (2, 288, 128, 32, r"K in multiples of 128 .*layer 3 has \[128, 288\] with scales for 32"),
        (513, 256, 128, 128, "at most 512 experts of a layer, layer 3 would have 513; use more ranks"),
    ],
)
def test_what_the_kernel_does_not_have_is_refused_before_anything_is_read(
    experts: int, hidden: int, intermediate: int, group: int, message: str
) -> None:
    one = make_layer(1, hidden, intermediate, group, shared=False)
    layer = LayerExperts(list(one.experts) * experts, None)
    with pytest.raises(StartError, match=message):
        CutlassExperts({LAYER: layer}, "token", CPU, lambda done, total: pytest.fail("something was read"))


def test_progress_of_packing_ends_at_the_total(layer: LayerExperts) -> None:
    told: list[tuple[int, int]] = []
    CutlassExperts({LAYER: layer, 9: layer}, "token", CPU, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    assert told[len(told) // 2 - 1][0] * 2 == told[-1][1]
