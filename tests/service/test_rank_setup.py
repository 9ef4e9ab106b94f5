"""The setup of a smaller group, and whether all experts fit into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_forward.rank_setup import RankSetup, all_experts_fit, planned_memory, resized
from moe_forward.types import GateSpec, ModelSpec

from .test_rank_gpu import ON_CPU, setup_of

R1 = ModelSpec("r1", 7168, 2048, 256, 8, 2048, tuple(range(3, 61)), 128, GateSpec("deepseek_v3", 8, 4))
H100_BYTES, H200_BYTES = 79 * 10**9, 149 * 10**9


def on_gpus(ranks: int, exchange: str = "deepep") -> RankSetup:
    setup = setup_of(ON_CPU, ranks, exchange, "cuda", Path("nowhere"))
    return replace(setup, spec=R1, max_tokens=1024, max_graph_tokens=512)


@pytest.mark.parametrize(
    ("exchange", "ranks", "smaller"),
    [("deepep", 3, "nccl"), ("deepep", 4, "deepep"), ("nccl", 3, "nccl"), ("nccl", 1, "local"), ("gloo", 2, "gloo")],
)
def test_fewer_ranks_exchange_in_a_way_that_needs_no_compiler(exchange: str, ranks: int, smaller: str) -> None:
    setup = resized(on_gpus(4, exchange), ranks, (1, 2))
    assert (setup.ranks, setup.exchange, setup.missing) == (ranks, smaller, (1, 2))


def test_a_whole_group_is_what_was_set_up() -> None:
    assert resized(on_gpus(4), 4, ()) == on_gpus(4)


@pytest.mark.parametrize(
    ("ranks", "left", "capacity_bytes", "fits"),
    [(8, 7, H100_BYTES, True), (8, 5, H100_BYTES, False), (4, 3, H200_BYTES, True), (4, 2, H200_BYTES, False)],
)
def test_all_experts_fit_where_the_memory_plan_says_so(ranks: int, left: int, capacity_bytes: int, fits: bool) -> None:
    assert all_experts_fit(on_gpus(ranks), left, capacity_bytes) == fits


def test_without_the_experts_of_the_lost_ranks_a_smaller_group_needs_hardly_more() -> None:
    whole = planned_memory(on_gpus(8)).total_bytes
    without = planned_memory(resized(on_gpus(8), 6, tuple(range(64)))).total_bytes
    assert without < planned_memory(resized(on_gpus(8), 6, ())).total_bytes - 10 * 10**9
    assert without == pytest.approx(whole, rel=0.1)


def test_memory_of_the_host_sets_no_limit() -> None:
    assert all_experts_fit(setup_of(ON_CPU, 4, "gloo", "cpu", Path("nowhere")), 1, 0)
