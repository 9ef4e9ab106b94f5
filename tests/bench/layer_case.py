"""The layer that bench_layer.py times: its shape, random weights and tokens, and what it cannot do without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from cases import floor_seconds

from moe_forward.experts import LayerExperts
from moe_forward.types import expert_range
from w4afp8 import ExpertWeights, Int4Weight

NVLINK_BYTES_PER_SECOND = 394e9
"""One way between two H200s, as measured; the floor of a rank's sending."""


class LayerShape(NamedTuple):
    """hidden, intermediate, experts, top_k: H, I, E and K."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int


DEEPSEEK = LayerShape(7168, 2048, 256, 8)


class Tokens(NamedTuple):
    """x: [T, H] bfloat16. ids: [T, K] int64. weights: [T, K] float32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Needs(NamedTuple):
    """What a step moves at least.

    floor_seconds: the slowest rank's weights, rows and arithmetic, or its sending where that takes longer.
    dispatch_bytes, bf16_dispatch_bytes: fp8 tokens with scales, and what bf16 tokens would be, that the busiest rank
        sends: each token once to every other rank that has one of its experts. combine_bytes: bf16 sums that come back.
    """

    floor_seconds: float
    dispatch_bytes: int
    bf16_dispatch_bytes: int
    combine_bytes: int


def draw_tokens(rank: int, tokens: int, variant: int, shape: LayerShape, device: torch.device) -> Tokens:
    """Make a rank's tokens; experts are drawn uniformly. The same seeds as the peers' harness, so the same routing."""
    generator = torch.Generator(device=device).manual_seed(77777 + 131 * variant + rank)
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    scores = torch.rand(tokens, shape.experts, device=device, generator=generator)
    values, ids = scores.topk(shape.top_k, dim=-1)
    return Tokens(x, ids, torch.softmax(values * 4, -1).float())


def random_layer(rank: int, ranks: int, shape: LayerShape, device: torch.device) -> LayerExperts:
    """Make a rank's experts where they are used: codes from -7 to 7, scales that keep the size of tokens."""

    def weight(outputs: int, inputs: int) -> Int4Weight:
        nibbles = torch.randint(-7, 8, (2, outputs, inputs // 2), dtype=torch.int8, device=device)
        spread = (torch.rand(outputs, inputs // 128, device=device) + 0.5) / 4.3  # 4.3: deviation of a code
        return Int4Weight((nibbles[1] << 4) | (nibbles[0] & 15), spread * inputs**-0.5)

    held = expert_range(rank, ranks, shape.experts)
    expert = [
        ExpertWeights(
            weight(shape.intermediate, shape.hidden),
            weight(shape.intermediate, shape.hidden),
            weight(shape.hidden, shape.intermediate),
        )
        for _ in held
    ]
    return LayerExperts(expert, None)


def find_needs(ids: Sequence[torch.Tensor], shape: LayerShape, scale_columns: int) -> Needs:
    """Find out what a step needs at least.

    ids: of each rank, [T, K]. scale_columns: scales of a token.
    """
    held = [expert_range(rank, len(ids), shape.experts) for rank in range(len(ids))]
    counts = torch.bincount(torch.cat([each.flatten() for each in ids]), minlength=shape.experts).tolist()
    gate_up, down = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    computing = max(
        floor_seconds(counts[mine.start : mine.stop], gate_up) + floor_seconds(counts[mine.start : mine.stop], down)
        for mine in held
    )
    # [sender][receiver]: tokens that leave the sender because the receiver has one of their experts.
    copies = [
        [_tokens_for(own, held[to]) if to != rank else 0 for to in range(len(ids))] for rank, own in enumerate(ids)
    ]
    sent, returned = [sum(row) for row in copies], [sum(column) for column in zip(*copies, strict=True)]
    fp8, bf16 = shape.hidden + 4 * scale_columns, 2 * shape.hidden
    sending = max(out * fp8 + back * bf16 for out, back in zip(sent, returned, strict=True)) / NVLINK_BYTES_PER_SECOND
    return Needs(max(computing, sending), max(sent) * fp8, max(sent) * bf16, max(returned) * bf16)


def _tokens_for(ids: torch.Tensor, held: range) -> int:
    """Tokens that have an expert among `held`."""
    return int(((ids >= held.start) & (ids < held.stop)).any(dim=1).sum())
