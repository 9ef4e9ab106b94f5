"""Exchanges on 1 to 4 CPU processes against local and the sums of `oracle`, bit for bit.

The oracles are functions of one token, so equality with them also says that a token's bits do not depend on what else
is in the step.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward.exchange import nccl
from moe_forward.exchange.local import LocalExchange
from moe_forward.types import expert_range
from w4afp8 import Quantized, quantize_tokens

from .oracle import contributions, in_rank_order, in_slot_order

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
    "more slots than experts on a rank": (5, (4, 2, 3, 1), "random"),
    "more ranks than experts": (3, (2, 1, 3, 2), "random"),
    "some slots of no expert": (8, (5, 2, 4, 3), "holes"),
    "nothing but slots of no expert": (8, (3, 2, 1, 4), "none"),
    "same expert in every slot": (8, (2, 3, 2, 3), "repeated"),
}
NAMES = {"gloo": list(SHAPES), "nccl": [name for name in SHAPES if name != "same expert in every slot"]}


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
    if kind == "holes":
        return ids.masked_fill(torch.rand(count, TOP_K, generator=generator) < 0.4, -1)
    if kind == "none":
        return torch.full_like(ids, -1)
    return ids[:, :1].expand(-1, TOP_K).contiguous() if kind == "repeated" else ids


def case_of(name: str, ranks: int, per_group: bool, generator: torch.Generator) -> dict[str, Any]:
    num_experts, rows, kind = SHAPES[name]
    counts = [*rows[: ranks - 1], sum(rows[ranks - 1 :])]
    tokens = tokens_of(sum(counts), per_group, generator)
    return {
        "exchange": "gloo",
        "name": name,
        "ranks": ranks,
        "num_experts": num_experts,
        "dtype": torch.float32,
        "counts": counts,
        "values": tokens.values.view(torch.uint8),
        "scales": tokens.scales,
        "ids": choose_ids(kind, sum(counts), num_experts, generator),
        "weights": torch.rand(sum(counts), TOP_K, generator=generator),
    }


def padded(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The case for an exchange that needs as many tokens on every rank: padding rows are NaN of no expert."""
    count = max(case["counts"])
    fills = {"values": 0x7F, "scales": torch.nan, "ids": -1, "weights": torch.nan}
    made = {}
    for key, fill in fills.items():
        parts = torch.split(case[key], case["counts"])
        blanks = [part.new_full((count - len(part), *part.shape[1:]), fill) for part in parts]
        made[key] = torch.cat([tensor for pair in zip(parts, blanks, strict=True) for tensor in pair])
    return {**case, **made, "exchange": "nccl", "dtype": dtype, "counts": [count] * case["ranks"]}


def make_cases() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(11)
    gloo = [
        case_of(name, ranks, per_group, generator)
        for ranks, name, per_group in itertools.product(range(1, 5), SHAPES, (False, True))
    ]
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.bfloat16, torch.float32))
    nccl = [padded(case, next(dtypes)) for case in gloo if case["name"] in NAMES["nccl"]]
    return gloo + nccl


def of_case(case: dict[str, Any]) -> tuple[Quantized, torch.Tensor, torch.Tensor]:
    return Quantized(case["values"].view(torch.float8_e4m3fn), case["scales"]), case["ids"], case["weights"]


def combined_by_hand(case: dict[str, Any]) -> torch.Tensor:
    rows = contributions(*of_case(case), case["dtype"])
    if case["exchange"] == "gloo":
        return in_slot_order(rows)
    return in_rank_order(rows, case["ids"], case["ranks"], case["num_experts"])


CASES = make_cases()


@pytest.fixture(scope="module")
def got(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of 4 processes got in every case."""
    folder = tmp_path_factory.mktemp("exchange")
    torch.save(CASES, folder / "cases.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    program = Path(__file__).with_name("cpu_group.py")
    subprocess.run([sys.executable, str(program), str(folder)], check=True, timeout=120, env=environment)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]


def numbers_where(**wanted: Any) -> list[int]:
    return [index for index, case in enumerate(CASES) if all(case[key] == value for key, value in wanted.items())]


every_case = pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in NAMES.items() for shape in shapes]
)
every_group = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@every_case
@every_group
def test_each_rank_gets_the_rows_of_its_experts(got: list[dict[Any, Any]], ranks: int, name: str, shape: str) -> None:
    indexes = numbers_where(exchange=name, ranks=ranks, name=shape)
    assert len(indexes) == 2, "one for each granularity"
    for index in indexes:
        case = CASES[index]
        whole = LocalExchange(case["num_experts"]).dispatch(*of_case(case))
        for rank in range(ranks):
            mine = expert_range(rank, ranks, case["num_experts"])
            first, last = whole.offsets[mine.start], whole.offsets[mine.stop]
            result = got[rank][index]
            assert torch.equal(result["offsets"], whole.offsets[mine.start : mine.stop + 1] - first)
            assert torch.equal(result["values"], whole.rows.values.view(torch.uint8)[first:last])
            assert torch.equal(result["scales"], whole.rows.scales[first:last])
            assert torch.equal(result["weights"], whole.weights[first:last])
    shapes = [CASES[index]["scales"].shape[1] for index in indexes]
    assert shapes == [1, HIDDEN // 128]


@every_case
@every_group
def test_combine_gives_the_bits_of_the_sum_by_hand(
    got: list[dict[Any, Any]], ranks: int, name: str, shape: str
) -> None:
    for index in numbers_where(exchange=name, ranks=ranks, name=shape):
        parts = [got[rank][index]["combined"] for rank in range(ranks)]
        assert [len(part) for part in parts] == CASES[index]["counts"]
        assert torch.equal(torch.cat(parts), combined_by_hand(CASES[index]))


@every_group
def test_payload_is_counted_where_it_comes_from_another_rank_and_goes_back_there(
    got: list[dict[Any, Any]], ranks: int
) -> None:
    for index in numbers_where(ranks=ranks):
        case = CASES[index]
        homes = torch.repeat_interleave(torch.arange(ranks), torch.tensor(case["counts"]))
        for rank in range(ranks):
            mine = expert_range(rank, ranks, case["num_experts"])
            here = (case["ids"] >= mine.start) & (case["ids"] < mine.stop) & (homes != rank)[:, None]
            if case["exchange"] == "gloo":  # a token once, a row for each of its slots back
                columns, copies, returned = case["scales"].shape[1], int(here.any(1).sum()), int(here.sum())
            else:  # every token, and one row back; the group was made for one granularity
                columns = CASES[0]["scales"].shape[1]
                copies = returned = (ranks - 1) * case["counts"][0]
            wanted = [copies * (HIDDEN + 4 * columns + 8 * TOP_K), returned * HIDDEN * case["dtype"].itemsize]
            assert got[rank][index]["moved_bytes"] == wanted
            assert ranks > 1 or wanted == [0, 0]


def test_the_sum_over_ranks_is_near_the_sum_over_slots() -> None:
    """The order differs, and with bfloat16 rows each rank's part is rounded once: half of 2^-8 of it."""
    for index in numbers_where(exchange="nccl", name="even", ranks=4):
        case = CASES[index]
        exact = contributions(*of_case(case)).double().sum(1)
        error = (combined_by_hand(case) - exact).norm() / exact.norm()
        assert error < (3e-7 if case["dtype"] == torch.float32 else 2.5e-3)


@every_group
def test_a_padding_exchange_knows_how_many_rows_come_before_they_come(got: list[dict[Any, Any]], ranks: int) -> None:
    for index in numbers_where(exchange="nccl", ranks=ranks):
        case = CASES[index]
        for rank in range(ranks):
            held = len(expert_range(rank, ranks, case["num_experts"]))
            assert got[rank][index]["capacity"] == ranks * case["counts"][0] * min(TOP_K, held)
            even = -(-ranks * case["counts"][0] * TOP_K // case["num_experts"])
            assert got[rank][index]["expected_rows"] == max(1, even)


def test_some_rank_really_received_nothing(got: list[dict[Any, Any]]) -> None:
    for name, rank in (("last rank receives nothing", 3), ("first rank receives nothing", 0)):
        for index in numbers_where(ranks=4, name=name):
            assert got[rank][index]["offsets"].tolist() == [0, 0, 0]
            assert len(got[rank][index]["values"]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_leaves_without_a_word_raises_at_the_others(got: list[dict[Any, Any]], name: str) -> None:
    assert got[0]["lost"][name] != ""


def test_many_tokens_are_added_in_parts_of_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(40, 16, generator=generator)
    handle = nccl._Handle(torch.randint(60, (20, 3), generator=generator), torch.rand(20, 3, generator=generator) < 0.3)
    whole = nccl._add_rows(rows, handle)
    monkeypatch.setattr(nccl, "ADDED_TOKENS", 7)
    assert torch.equal(nccl._add_rows(rows, handle), whole)
