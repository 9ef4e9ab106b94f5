"""Exchanges: local against plain loops, gloo on 1 to 4 processes against local, bit for bit."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward import exchange
from moe_forward.errors import StartError
from moe_forward.exchange.local import LocalExchange
from moe_forward.exchange.rows import add_slots, expert_order
from moe_forward.types import expert_range
from w4afp8 import Quantized, dequantize_tokens, quantize_tokens

HIDDEN = 256
TOP_K = 3

# name -> (num_experts, rows of each of 4 ranks, how experts are chosen)
SHAPES: dict[str, tuple[int, tuple[int, int, int, int], str]] = {
    "even": (8, (5, 5, 5, 5), "random"),
    "uneven experts": (11, (3, 6, 1, 4), "random"),
    "a rank without tokens": (8, (4, 0, 7, 0), "random"),
    "no tokens at all": (8, (0, 0, 0, 0), "random"),
    "a single token": (8, (0, 0, 1, 0), "random"),
    "one hot expert": (8, (6, 5, 4, 3), "hot"),
    "last rank receives nothing": (8, (3, 3, 3, 3), "low"),
    "first rank receives nothing": (8, (3, 3, 3, 3), "high"),
    "same expert in every slot": (8, (2, 3, 2, 3), "repeated"),
}


def tokens_of(count: int, per_group: bool, generator: torch.Generator) -> Quantized:
    hidden = torch.randn(count, HIDDEN, generator=generator) * torch.rand(count, 1, generator=generator) * 10
    return quantize_tokens(hidden, "token_group" if per_group else "token")[0]


def choose_ids(kind: str, count: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    scores = torch.rand(count, num_experts, generator=generator)
    if kind == "hot":
        scores[:, 5] = 2.0
    elif kind == "low":
        scores[:, num_experts // 2 - 1 :] = -1.0
    elif kind == "high":
        scores[:, : num_experts // 2 + 1] = -1.0
    ids = scores.topk(TOP_K, dim=1).indices
    return ids[:, :1].expand(-1, TOP_K).contiguous() if kind == "repeated" else ids


def make_cases() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(11)
    cases = []
    for ranks, (name, (num_experts, rows, kind)) in itertools.product(range(1, 5), SHAPES.items()):
        counts = [*rows[: ranks - 1], sum(rows[ranks - 1 :])]
        for per_group in (False, True):
            tokens = tokens_of(sum(counts), per_group, generator)
            cases.append(
                {
                    "name": name,
                    "ranks": ranks,
                    "num_experts": num_experts,
                    "counts": counts,
                    "values": tokens.values.view(torch.uint8),
                    "scales": tokens.scales,
                    "ids": choose_ids(kind, sum(counts), num_experts, generator),
                    "weights": torch.rand(sum(counts), TOP_K, generator=generator),
                }
            )
    return cases


def of_case(case: dict[str, Any]) -> tuple[Quantized, torch.Tensor, torch.Tensor]:
    return Quantized(case["values"].view(torch.float8_e4m3fn), case["scales"]), case["ids"], case["weights"]


def combined_by_hand(tokens: Quantized, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token's sum over its slots in order, experts scaling their rows by (id + 1) * weight."""
    hidden = dequantize_tokens(tokens)
    total = torch.zeros_like(hidden)
    for slot in range(ids.shape[1]):
        total = total + hidden * (ids[:, slot, None] + 1.0) * weights[:, slot, None]
    return total


CASES = make_cases()


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of 4 processes got in every case."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.save(CASES, folder / "cases.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    program = Path(__file__).with_name("gloo_group.py")
    subprocess.run([sys.executable, str(program), str(folder)], check=True, timeout=120, env=environment)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]


def numbers_where(**wanted: Any) -> list[int]:
    return [index for index, case in enumerate(CASES) if all(case[key] == value for key, value in wanted.items())]


def test_local_groups_rows_by_expert_in_order_of_token_and_slot() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = tokens_of(4, False, generator)
    ids = torch.tensor([[2, 0], [0, 2], [2, 2], [3, 0]])
    weights = torch.arange(8.0).view(4, 2)
    received = LocalExchange(5).dispatch(tokens, ids, weights)
    assert received.offsets.tolist() == [0, 3, 3, 7, 8, 8]
    source = [0, 1, 3, 0, 1, 2, 2, 3]
    assert torch.equal(received.rows.values.view(torch.uint8), tokens.values.view(torch.uint8)[source])
    assert torch.equal(received.rows.scales, tokens.scales[source])
    assert received.weights.tolist() == [1.0, 2.0, 7.0, 0.0, 3.0, 4.0, 5.0, 6.0]


def test_local_combine_adds_slots_in_order_not_in_order_of_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = tokens_of(1, False, generator)
    local = LocalExchange(3)
    received = local.dispatch(tokens, torch.tensor([[2, 1, 0]]), torch.ones(1, 3))
    rows = torch.tensor([[1.0], [-1e8], [1e8]])  # of experts 0, 1, 2: slots 2, 1, 0
    assert local.combine(rows, received.handle).item() == 1.0  # (1e8 - 1e8) + 1, not (1 - 1e8) + 1e8


@pytest.mark.parametrize("index", numbers_where(ranks=1), ids=lambda index: CASES[index]["name"])
def test_local_combines_to_the_sum_over_slots(index: int) -> None:
    tokens, ids, weights = of_case(CASES[index])
    local = LocalExchange(CASES[index]["num_experts"])
    received = local.dispatch(tokens, ids, weights)
    factors = torch.repeat_interleave(torch.arange(CASES[index]["num_experts"]) + 1.0, received.offsets.diff())
    rows = dequantize_tokens(received.rows) * factors[:, None] * received.weights[:, None]
    assert torch.equal(local.combine(rows, received.handle), combined_by_hand(tokens, ids, weights))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gloo_brings_each_rank_the_rows_of_its_experts(gloo: list[dict[Any, Any]], ranks: int, name: str) -> None:
    indexes = numbers_where(ranks=ranks, name=name)
    assert len(indexes) == 2, "one for each granularity"
    for index in indexes:
        case = CASES[index]
        whole = LocalExchange(case["num_experts"]).dispatch(*of_case(case))
        for rank in range(ranks):
            mine = expert_range(rank, ranks, case["num_experts"])
            first, last = whole.offsets[mine.start], whole.offsets[mine.stop]
            got = gloo[rank][index]
            assert torch.equal(got["offsets"], whole.offsets[mine.start : mine.stop + 1] - first)
            assert torch.equal(got["values"], whole.rows.values.view(torch.uint8)[first:last])
            assert torch.equal(got["scales"], whole.rows.scales[first:last])
            assert torch.equal(got["weights"], whole.weights[first:last])
    shapes = [CASES[index]["scales"].shape[1] for index in indexes]
    assert shapes == [1, HIDDEN // 128]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gloo_combines_to_the_bits_of_one_rank(gloo: list[dict[Any, Any]], ranks: int, name: str) -> None:
    for index in numbers_where(ranks=ranks, name=name):
        parts = [gloo[rank][index]["combined"] for rank in range(ranks)]
        assert [len(part) for part in parts] == CASES[index]["counts"]
        assert torch.equal(torch.cat(parts), combined_by_hand(*of_case(CASES[index])))


def test_some_rank_really_received_nothing(gloo: list[dict[Any, Any]]) -> None:
    for name, rank in (("last rank receives nothing", 3), ("first rank receives nothing", 0)):
        for index in numbers_where(ranks=4, name=name):
            assert gloo[rank][index]["offsets"].tolist() == [0, 0, 0]
            assert len(gloo[rank][index]["values"]) == 0


def test_a_rank_that_leaves_without_a_word_raises_at_the_others(gloo: list[dict[Any, Any]]) -> None:
    assert gloo[0]["lost"] != ""


def test_expert_order_skips_slots_of_other_ranks() -> None:
    order, offsets = expert_order(torch.tensor([[-1, 1], [0, -1], [1, 0]]), 3)
    assert order.tolist() == [2, 5, 1, 4]
    assert offsets.tolist() == [0, 2, 4, 4]


def test_slots_are_added_from_first_to_last() -> None:
    contributions = torch.tensor([[[1e8], [-1e8], [1.0]], [[1.0], [1e8], [-1e8]]])
    assert add_slots(contributions).flatten().tolist() == [1.0, 0.0]


def test_auto_takes_local_for_one_rank_and_gloo_on_cpu() -> None:
    assert exchange.choose("auto", 1, "cpu") == "local"
    assert exchange.choose("auto", 2, "cpu") == "gloo"
    assert exchange.choose("gloo", 1, "cpu") == "gloo"


@pytest.mark.parametrize(
    ("name", "ranks", "device", "message"),
    [
        ("nccl", 2, "cuda", "exchange nccl is not part of this version; it has gloo, local"),
        ("auto", 2, "cuda", "exchange deepep is not part of this version"),
        ("local", 2, "cpu", "exchange local serves one rank, not 2"),
        ("gloo", 2, "cuda", "exchange gloo serves CPU ranks, not cuda"),
    ],
)
def test_an_exchange_that_cannot_serve_is_refused_by_name(name: str, ranks: int, device: str, message: str) -> None:
    with pytest.raises(StartError, match=message):
        exchange.choose(name, ranks, device)
