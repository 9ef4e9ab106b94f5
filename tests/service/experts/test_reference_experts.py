"""The portable experts: against the specification, and bit for bit against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from moe_forward.experts import Experts, LayerExperts, create
from w4afp8 import (
    ExpertWeights,
    Granularity,
    Int4Weight,
    Quantized,
    SharedExpert,
    quantize_fp8_block,
    quantize_int4,
    quantize_tokens,
    reference,
)

HIDDEN, INTERMEDIATE, EXPERTS, ROWS = 256, 384, 8, 90
LAYER = 3
COUNTS = [0, 60, 1, 0, 17, 2, 10, 0]  # a hot expert, and some with no rows
GRANULARITIES: list[Granularity] = ["token", "token_group"]


@contextmanager
def no_clock(name: str) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.fixture(scope="module", params=[32, 128], ids=["group32", "group128"])
def layer(request: pytest.FixtureRequest, generator: torch.Generator) -> LayerExperts:
    def int4(rows: int, columns: int) -> Int4Weight:
        return quantize_int4(torch.randn(rows, columns, generator=generator) * 0.05, request.param)

    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    experts = [ExpertWeights(*(int4(*shape) for shape in shapes)) for _ in range(EXPERTS)]
    dense = [torch.randn(*shape, generator=generator) * 0.05 for shape in shapes]
    return LayerExperts(experts, SharedExpert(*(quantize_fp8_block(weight) for weight in dense)))


@pytest.fixture(params=GRANULARITIES)
def granularity(request: pytest.FixtureRequest) -> Granularity:
    chosen: Granularity = request.param
    return chosen


@pytest.fixture
def experts(layer: LayerExperts, granularity: Granularity) -> Experts:
    return create("reference", {LAYER: layer}, granularity)


@pytest.fixture
def hidden(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, HIDDEN, generator=generator) * torch.randn(ROWS, 1, generator=generator).exp()


@pytest.fixture
def rows(hidden: torch.Tensor, granularity: Granularity) -> Quantized:
    return quantize_tokens(hidden, granularity)[0]


@pytest.fixture
def row_weights(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(ROWS, generator=generator)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's thread count for the rest of a test; one is quickest for small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def take(rows: Quantized, index: torch.Tensor | slice) -> Quantized:
    return Quantized(rows.values[index], rows.scales[index])


def relative_frobenius(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def test_forward_meets_the_float64_oracle(
    experts: Experts,
    layer: LayerExperts,
    hidden: torch.Tensor,
    rows: Quantized,
    row_weights: torch.Tensor,
    granularity: Granularity,
) -> None:
    y = experts.forward(LAYER, rows, offsets_of(COUNTS), row_weights, 1, no_clock)
    ids = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(COUNTS))[:, None]
    arguments = (hidden, ids, row_weights[:, None], layer.experts, None, granularity)
    assert y.dtype == torch.float32
    assert relative_frobenius(y, reference.moe_layer(*arguments, torch.float64)) < 1e-3
    assert relative_frobenius(y.bfloat16(), reference.moe_layer(*arguments, torch.float64)) < 6e-3
    assert relative_frobenius(y, reference.moe_layer(*arguments).double()) < 1e-3


def test_shared_meets_the_float64_oracle(
    experts: Experts, layer: LayerExperts, rows: Quantized, granularity: Granularity
) -> None:
    assert layer.shared is not None
    exact = reference.expert_forward(rows, layer.shared, granularity, torch.float64)
    assert relative_frobenius(experts.shared(LAYER, rows), exact) < 1e-3


def test_neither_batch_nor_threads_change_bits(
    experts: Experts, rows: Quantized, row_weights: torch.Tensor, threads: Callable[[int], None]
) -> None:
    offsets = offsets_of(COUNTS)
    threads(2)
    whole = experts.forward(LAYER, rows, offsets, row_weights, 1, no_clock)
    shared = experts.shared(LAYER, rows)
    threads(1)
    assert torch.equal(experts.forward(LAYER, rows, offsets, row_weights, 1, no_clock), whole)
    assert torch.equal(experts.shared(LAYER, rows), shared)
    bounds = offsets.tolist()
    for expert in (1, 2, 4):
        counts = [int(index == expert) for index in range(EXPERTS)]
        for row in {bounds[expert], bounds[expert + 1] - 1}:
            one = slice(row, row + 1)
            alone = experts.forward(LAYER, take(rows, one), offsets_of(counts), row_weights[one], 1, no_clock)
            assert torch.equal(alone, whole[one])
            assert torch.equal(experts.shared(LAYER, take(rows, one)), shared[one])


def test_the_order_of_rows_inside_an_expert_does_not_change_bits(
    experts: Experts, rows: Quantized, row_weights: torch.Tensor, generator: torch.Generator
) -> None:
    offsets = offsets_of(COUNTS)
    order = torch.cat(
        [low + torch.randperm(count, generator=generator) for low, count in zip(offsets.tolist(), COUNTS, strict=False)]
    )
    whole = experts.forward(LAYER, rows, offsets, row_weights, 1, no_clock)
    moved = experts.forward(LAYER, take(rows, order), offsets, row_weights[order], 1, no_clock)
    assert torch.equal(moved, whole[order])
    shuffle = torch.randperm(ROWS, generator=generator)
    assert torch.equal(experts.shared(LAYER, take(rows, shuffle)), experts.shared(LAYER, rows)[shuffle])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_number_of_ranks_does_not_change_bits(
    ranks: int,
    experts: Experts,
    layer: LayerExperts,
    rows: Quantized,
    row_weights: torch.Tensor,
    granularity: Granularity,
) -> None:
    whole = experts.forward(LAYER, rows, offsets_of(COUNTS), row_weights, 1, no_clock)
    size = EXPERTS // ranks
    parts = []
    for rank in range(ranks):
        held = slice(rank * size, (rank + 1) * size)
        mine = create("reference", {LAYER: LayerExperts(layer.experts[held], None)}, granularity)
        low = sum(COUNTS[: held.start])
        span = slice(low, low + sum(COUNTS[held]))
        parts.append(mine.forward(LAYER, take(rows, span), offsets_of(COUNTS[held]), row_weights[span], 1, no_clock))
    assert torch.equal(torch.cat(parts), whole)


def test_rows_of_no_expert_change_nothing_whatever_they_hold(
    experts: Experts, rows: Quantized, row_weights: torch.Tensor
) -> None:
    offsets = offsets_of(COUNTS)
    whole = experts.forward(LAYER, rows, offsets, row_weights, 1, no_clock)
    poison = torch.full((7, HIDDEN), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)  # NaN in e4m3
    more = Quantized(
        torch.cat([rows.values.view(torch.uint8), poison.view(torch.uint8)]).view(torch.float8_e4m3fn),
        torch.cat([rows.scales, torch.full((7, rows.scales.shape[1]), torch.nan)]),
    )
    weights = torch.cat([row_weights, torch.full((7,), torch.nan)])
    y = experts.forward(LAYER, more, offsets, weights, 1, no_clock)
    assert list(y.shape) == [ROWS + 7, HIDDEN]
    assert torch.equal(y[:ROWS], whole)


def test_tokens_are_quantized_in_the_services_granularity(experts: Experts, granularity: Granularity) -> None:
    x = torch.randn(3, HIDDEN)
    x[1, 5] = torch.nan
    tokens, non_finite = experts.quantize(x)
    expected, flagged = quantize_tokens(x, granularity)
    assert torch.equal(tokens.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(tokens.scales, expected.scales)
    assert non_finite.tolist() == flagged.tolist() == [False, True, False]


def test_no_rows_give_no_rows(experts: Experts, rows: Quantized, granularity: Granularity) -> None:
    none = take(rows, slice(0, 0))
    empty = torch.empty(0)
    assert list(experts.forward(LAYER, none, offsets_of([0] * EXPERTS), empty, 1, no_clock).shape) == [0, HIDDEN]
    assert list(experts.shared(LAYER, none).shape) == [0, HIDDEN]
    idle = create("reference", {LAYER: LayerExperts([], None)}, granularity)
    assert list(idle.forward(LAYER, none, offsets_of([]), empty, 1, no_clock).shape) == [0, HIDDEN]


def test_zero_rows_give_zero(experts: Experts, granularity: Granularity) -> None:
    rows, _ = quantize_tokens(torch.zeros(1, HIDDEN), granularity)
    counts = offsets_of([1] + [0] * (EXPERTS - 1))
    assert not experts.forward(LAYER, rows, counts, torch.ones(1), 1, no_clock).any()


def test_a_row_that_overflows_between_the_gemms_is_nan_and_alone(
    experts: Experts, hidden: torch.Tensor, row_weights: torch.Tensor, granularity: Granularity
) -> None:
    offsets = offsets_of(COUNTS)
    clean = experts.forward(LAYER, quantize_tokens(hidden, granularity)[0], offsets, row_weights, 1, no_clock)
    hidden[5] = hidden[5] * 1e30
    y = experts.forward(LAYER, quantize_tokens(hidden, granularity)[0], offsets, row_weights, 1, no_clock)
    assert bool(y[5].isnan().all())
    others = torch.arange(ROWS) != 5
    assert torch.equal(y[others], clean[others])


def test_the_clock_times_three_phases_in_order(experts: Experts, rows: Quantized, row_weights: torch.Tensor) -> None:
    seen: list[str] = []

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        seen.append(f"+{name}")
        yield
        seen.append(f"-{name}")

    experts.forward(LAYER, rows, offsets_of(COUNTS), row_weights, 1, clock)
    assert seen == ["+gemm1", "-gemm1", "+activation", "-activation", "+gemm2", "-gemm2"]


def test_layers_and_rows_that_do_not_fit_are_refused(
    experts: Experts, layer: LayerExperts, rows: Quantized, row_weights: torch.Tensor, granularity: Granularity
) -> None:
    offsets = offsets_of(COUNTS)
    with pytest.raises(ValueError, match=r"layer: expected one of \[3\], got 4"):
        experts.forward(4, rows, offsets, row_weights, 1, no_clock)
    other: Granularity = "token" if granularity == "token_group" else "token_group"
    with pytest.raises(ValueError, match=f"for granularity {other}"):
        create("reference", {LAYER: layer}, other).forward(LAYER, rows, offsets, row_weights, 1, no_clock)
    with pytest.raises(ValueError, match="offsets: expected"):
        experts.forward(LAYER, rows, offsets[:-1], row_weights, 1, no_clock)
    without = create("reference", {LAYER: LayerExperts(layer.experts, None)}, granularity)
    with pytest.raises(ValueError, match="layer: 3 has no shared expert"):
        without.shared(LAYER, rows)
