"""The shared nouns: how experts and rows are spread over ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_forward.types import DType, ForwardRequest, Routing, Step, TensorRef, expert_range, token_range

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "I64": 8}


@given(st.integers(1, 80), st.integers(0, 600))
def test_ranges_cover_everything_once_in_order_with_sizes_one_apart(ranks: int, total: int) -> None:
    for spread in (expert_range, token_range):
        parts = [spread(rank, ranks, total) for rank in range(ranks)]
        assert [number for part in parts for number in part] == list(range(total))
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1


def test_one_rank_holds_all_experts() -> None:
    assert expert_range(0, 1, 256) == range(256)


def test_uneven_experts_are_spread_evenly() -> None:
    assert [len(expert_range(rank, 3, 8)) for rank in range(3)] == [2, 3, 3]


@pytest.mark.parametrize("dtype", list(DType), ids=lambda dtype: dtype.name)
def test_item_sizes(dtype: DType) -> None:
    assert dtype.itemsize == SIZES[dtype.name]


def test_a_step_counts_the_rows_of_its_requests() -> None:
    ref = TensorRef(0, DType.F32, 8)

    def request(tokens: int) -> ForwardRequest:
        return ForwardRequest(0, tokens, 3, tokens, 1.0, True, ref, None, Routing.SERVER, None, None, ref)

    assert Step(0, 1, 3, (request(3), request(1), request(7))).tokens == 11
    assert Step(0, 1, 3, ()).tokens == 0
