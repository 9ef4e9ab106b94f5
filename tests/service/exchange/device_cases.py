"""The cases of `device_group`: tokens of all ranks, made alike by every rank, and what must become of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moe_forward.exchange import Dispatched
from moe_forward.types import expert_range


@dataclass(frozen=True)
class Shape:
    """tokens: values of T. columns: scales of a token. repeats: of one step, to see whether its bits ever change."""

    hidden: int
    num_experts: int
    top_k: int
    tokens: tuple[int, ...]
    columns: tuple[int, ...]
    repeats: int

    def sizes(self) -> Iterator[tuple[int, int]]:
        """(T, scales of a token): each T with one scale, one of them with the other granularity too."""
        yield from ((count, self.columns[0]) for count in self.tokens)
        yield self.tokens[-2], self.columns[-1]


SHAPES = {
    "deepseek": Shape(7168, 256, 8, (1, 8, 64, 128, 1024), (1, 56), 200),
    "small": Shape(256, 11, 3, (1, 2, 7, 20), (1, 2), 5),
}
KINDS = ("uniform", "hot expert", "hot rank", "holes", "padding")


class Inputs(NamedTuple):
    """Tokens of one rank [T, ...] or of all ranks [ranks * T, ...]."""

    values: torch.Tensor
    scales: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def make_inputs(
    shape: Shape, ranks: int, device: torch.device, seed: int, count: int, columns: int, kind: str
) -> Inputs:
    """Make the tokens of all ranks. count: T. columns: scales of a token. kind: one of `KINDS`."""
    total = ranks * count
    generator = torch.Generator(device).manual_seed(seed)
    random: dict[str, Any] = {"generator": generator, "device": device}
    values = (torch.randn(total, shape.hidden, **random) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.rand(total, columns, **random) + 0.1
    scores = torch.rand(total, shape.num_experts, **random)
    if kind == "hot expert":
        scores[:, shape.num_experts // 2] = 2.0
    elif kind == "hot rank":
        held = expert_range(ranks - 1, ranks, shape.num_experts)
        scores[:, held.start : held.stop] += 2.0
    ids = scores.topk(shape.top_k, dim=1).indices
    # All different, so that a received row tells which (token, slot) it is.
    weights = (torch.randperm(total * shape.top_k, **random) + 1.0).view(total, shape.top_k) / (1 << 20)
    if kind == "holes":
        ids = ids.masked_fill(torch.rand(total, shape.top_k, **random) < 0.3, -1)
    elif kind == "padding":
        ids = ids.masked_fill((torch.arange(total, device=device) % 3 > 0)[:, None], -1)
    return Inputs(values, scales, ids, weights)


def judge_sums(got: torch.Tensor, wanted: torch.Tensor, nobody: torch.Tensor) -> dict[str, Any]:
    """Compare [T, H] sums. nobody: [T] bool, tokens without an expert."""
    error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    return {
        "exact": bool(torch.equal(got.float(), wanted)),
        "error": float(error),
        "nobody_zero": bool((got[nobody] == 0).all()),
        "finite": bool(torch.isfinite(got).all()),
    }


def judge_rows(whole: Inputs, mine: range, received: Dispatched) -> dict[str, Any]:
    """Compare received rows with what the experts `mine` must get, in any order inside an expert."""
    flat = whole.ids.flatten()
    places = ((flat >= mine.start) & (flat < mine.stop)).nonzero().flatten()
    experts, weights = flat[places] - mine.start, whole.weights.flatten()[places]
    order = _by_expert_and_weight(experts, weights)
    tokens = places[order] // whole.ids.shape[1]
    live, sizes = int(received.offsets[-1]), received.offsets.diff()
    got_experts = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    got = _by_expert_and_weight(got_experts, received.weights[:live])
    same = live == len(places) and all(
        torch.equal(arrived[:live][got], wanted)
        for arrived, wanted in (
            (got_experts, experts[order]),
            (received.weights, weights[order]),
            (received.rows.values.view(torch.uint8), whole.values.view(torch.uint8)[tokens]),
            (received.rows.scales, whole.scales[tokens]),
        )
    )
    return {"rows_right": same, "live": live, "capacity": len(received.weights), "first": int(received.offsets[0])}


def _by_expert_and_weight(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    by_weight = torch.argsort(weights)
    return by_weight[torch.argsort(experts[by_weight], stable=True)]
