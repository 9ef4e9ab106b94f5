"""CutlassExperts on a GPU, against the specification in float64 and against the portable experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moe_forward import checkpoint, memory_plan
from moe_forward.checkpoint.presets import PRESETS
from moe_forward.checkpoint.synthetic import write_model
from moe_forward.errors import CheckpointError
from moe_forward.experts import Experts, LayerExperts, create
from w4afp8 import Granularity, Quantized, quantize_tokens, reference

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

pytestmark = pytest.mark.gpu

COUNTS = [0, 160, 1, 0, 39]  # a busy expert, and some without rows
ROWS = sum(COUNTS)
EVEN = 40


class Shape(NamedTuple):
    """H, I and the inputs that share a weight scale."""

    hidden: int
    intermediate: int
    group: int


SHAPES = [Shape(512, 384, 128), Shape(512, 384, 32), Shape(7168, 2048, 128)]


class Case(NamedTuple):
    """Weights on the GPU, the experts made of them, and rows."""

    layer: LayerExperts
    experts: Experts
    rows: Quantized
    row_weights: torch.Tensor
    offsets: torch.Tensor
    granularity: Granularity

    def forward(self, rows: Quantized | None = None, expected_rows: int = EVEN) -> torch.Tensor:
        """The live rows of a forward."""
        y = self.experts.forward(LAYER, rows or self.rows, self.offsets, self.row_weights, expected_rows, no_clock)
        return y[: int(self.offsets[-1])]


@pytest.fixture(scope="module", params=["token", "token_group"])
def granularity(request: pytest.FixtureRequest) -> Granularity:
    chosen: Granularity = request.param
    return chosen


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def layer(request: pytest.FixtureRequest) -> Iterator[LayerExperts]:
    yield make_layer(len(COUNTS), *request.param, device="cuda")
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def case(layer: LayerExperts, granularity: Granularity) -> Case:
    experts = create("cutlass", {LAYER: layer}, granularity)
    rows = make_rows(ROWS, layer.experts[0].down.codes.shape[0], granularity, "cuda")
    weights = torch.rand(ROWS, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return Case(layer, experts, rows, weights, offsets_of(COUNTS, "cuda"), granularity)


@pytest.fixture
def poisoned_memory() -> None:
    """Leave NaN in the memory that the next tensors get."""
    parts = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in [1 << 20] * 64 + [1 << 24] * 16]
    del parts


def test_rows_pass_through_their_experts(case: Case) -> None:
    y = case.forward()
    exact = exact_rows(case.layer, case.rows, COUNTS, case.row_weights, case.granularity)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) <= LAYER_ERROR


def test_cutlass_and_reference_agree(case: Case) -> None:
    other = create(
        "reference", {LAYER: case.layer}, case.granularity, torch.device("cuda", torch.cuda.current_device())
    )
    y = other.forward(LAYER, case.rows, case.offsets, case.row_weights, EVEN, no_clock)
    assert y.dtype == torch.bfloat16
    assert relative_error(case.forward(), y.double()) <= LAYER_ERROR
    assert relative_error(case.experts.shared(LAYER, case.rows), other.shared(LAYER, case.rows).double()) <= LAYER_ERROR


def test_shared_expert_takes_every_row(case: Case) -> None:
    assert case.layer.shared is not None
    exact = reference.expert_forward(case.rows, case.layer.shared, case.granularity, torch.float64)
    y = case.experts.shared(LAYER, case.rows)
    assert (y.dtype, y.shape) == (torch.float32, exact.shape)
    assert relative_error(y, exact) <= LAYER_ERROR


@pytest.mark.usefixtures("poisoned_memory")
def test_nan_in_rows_of_no_expert_reaches_no_other(case: Case) -> None:
    tight = case.forward()
    for dead in (1, 77, 3000):
        weights = torch.cat([case.row_weights, torch.full((dead,), torch.nan, device="cuda")])
        roomy = case._replace(row_weights=weights).forward(with_dead_rows(case.rows, dead))
        assert torch.equal(roomy, tight)
    assert bool(tight.isfinite().all())


def test_row_that_overflows_between_the_gemms_is_nan_and_alone(case: Case) -> None:
    clean = case.forward()
    y = case.forward(make_rows(ROWS, case.rows.values.shape[1], case.granularity, "cuda", loud=5))
    assert bool(y[5].isnan().all())
    others = torch.arange(ROWS, device="cuda") != 5
    assert torch.equal(y[others], clean[others])


def test_neither_batch_nor_hint_changes_the_bits_of_a_row(case: Case) -> None:
    whole, shared = case.forward(), case.experts.shared(LAYER, case.rows)
    for expected_rows in (1, 32, 1000):
        assert torch.equal(case.forward(expected_rows=expected_rows), whole)
    for row, expert in ((0, 1), (159, 1), (160, 2), (161, 4), (ROWS - 1, 4)):
        one = slice(row, row + 1)
        rows = Quantized(case.rows.values[one].contiguous(), case.rows.scales[one].contiguous())
        offsets = offsets_of([int(index == expert) for index in range(len(COUNTS))], "cuda")
        alone = case._replace(rows=rows, offsets=offsets, row_weights=case.row_weights[one].contiguous())
        assert torch.equal(alone.forward(expected_rows=1)[0], whole[row])
        assert torch.equal(case.experts.shared(LAYER, rows)[0], shared[row])


@pytest.mark.usefixtures("poisoned_memory")
def test_graph_follows_changed_rows_and_offsets(case: Case) -> None:
    fixed = case._replace(
        rows=Quantized(case.rows.values.clone(), case.rows.scales.clone()),
        row_weights=case.row_weights.clone(),
        offsets=case.offsets.clone(),
    )

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        y = fixed.experts.forward(LAYER, fixed.rows, fixed.offsets, fixed.row_weights, EVEN, no_clock)
        return y, fixed.experts.shared(LAYER, fixed.rows)

    work()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = work()
    for counts in ([0] * 5, [ROWS, 0, 0, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, ROWS], [40, 40, 40, 40, 40]):
        fixed.offsets.copy_(offsets_of(counts))
        fixed.rows.scales.mul_(1.25)
        fixed.row_weights.mul_(0.9)
        graph.replay()
        replayed = [tensor.clone() for tensor in outputs]
        live = sum(counts)
        assert torch.equal(replayed[0][:live], fixed.forward())
        assert torch.equal(replayed[1], fixed.experts.shared(LAYER, fixed.rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_are_quantized_with_the_bits_of_the_cpu(case: Case, dtype: torch.dtype) -> None:
    x = torch.randn(6, case.rows.values.shape[1], generator=torch.Generator().manual_seed(9)).to(dtype)
    x[1, 5], x[2, 300], x[3] = torch.nan, -torch.inf, 0
    expected, flagged = quantize_tokens(x, case.granularity)
    tokens, non_finite = case.experts.quantize(x.cuda())
    assert torch.equal(tokens.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(tokens.scales.cpu(), expected.scales)
    assert torch.equal(non_finite.cpu(), flagged)


def test_rank_without_experts_gives_rows_of_nothing(granularity: Granularity) -> None:
    idle = create("cutlass", {LAYER: make_layer(0, 512, 384, device="cuda")}, granularity)
    rows = with_dead_rows(make_rows(0, 512, granularity, "cuda"), 4)
    y = idle.forward(LAYER, rows, offsets_of([], "cuda"), torch.ones(4, device="cuda"), 1, no_clock)
    assert (y.dtype, y.shape) == (torch.bfloat16, (4, 512))
    live = make_rows(3, 512, granularity, "cuda")
    assert bool(idle.shared(LAYER, live).isfinite().all())


def test_weights_of_a_mapped_checkpoint_give_what_the_same_weights_on_the_gpu_give(
    tmp_path: Path, granularity: Granularity
) -> None:
    """The way of a real start: mapped, staged through pinned memory, checked and packed on the GPU."""
    write_model(PRESETS["tiny"], tmp_path / "m", 2, progress=False)
    spec = checkpoint.read_spec(tmp_path / "m")
    held = checkpoint.load_shard(tmp_path / "m", spec, spec.layers, range(8, 24), read=False)
    mapped = {number: LayerExperts(weights.experts, weights.shared) for number, weights in held.items()}
    told: list[tuple[int, int]] = []
    staged = create("cutlass", mapped, granularity, on_progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    rows = make_rows(160, spec.hidden_size, granularity, "cuda")
    counts, weights = [10] * 16, torch.ones(160, device="cuda")
    for number, layer in mapped.items():
        host = Quantized(rows.values.cpu(), rows.scales.cpu())
        exact = exact_rows(layer, host, counts, weights.cpu(), granularity)
        y = staged.forward(number, rows, offsets_of(counts, "cuda"), weights, 10, no_clock)
        assert relative_error(y.cpu(), exact) <= LAYER_ERROR


def test_bad_scales_are_found_on_the_gpu() -> None:
    layer = make_layer(2, 512, 384)
    layer.experts[1].up.scales[7, 2] = torch.nan
    with pytest.raises(CheckpointError, match="layer 3, expert 1 of this rank, up: scales must be finite"):
        create("cutlass", {LAYER: layer}, "token")


def test_memory_is_what_the_plan_says(tmp_path: Path) -> None:
    write_model(PRESETS["tiny"], tmp_path / "m", 3, progress=False)
    spec = checkpoint.read_spec(tmp_path / "m")
    held = checkpoint.load_shard(tmp_path / "m", spec, spec.layers, range(16), read=False)
    torch.cuda.synchronize()
    before_bytes = torch.cuda.memory_allocated()
    layers = {number: LayerExperts(weights.experts, weights.shared) for number, weights in held.items()}
    experts = create("cutlass", layers, "token")
    taken_bytes = torch.cuda.memory_allocated() - before_bytes
    plan = memory_plan.plan(spec, 2, "nccl", "cutlass", 128, "token", max_graph_tokens=128)
    planned_bytes = sum(item.size_bytes for item in plan.weights if item.name != "routers")
    assert planned_bytes <= taken_bytes <= planned_bytes + 512 * 8 * len(spec.layers)  # torch rounds up to 512 bytes
    del experts
