"""DeepSeek-V3's gate: sigmoid scores, a bias for balance, groups of experts."""

from __future__ import annotations

import torch

from moe_forward.gates.ranking import best, normalized
from moe_forward.types import GateSpec
from w4afp8 import portable

SUM_FLOOR = 1e-20
"""Keeps a token whose chosen scores are all 0 from dividing 0 by 0, as DeepSeek's own code does."""


def deepseek_v3(
    spec: GateSpec, top_k: int, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts inside each token's best groups by sigmoid score plus bias; weigh them by the score alone.

    spec: groups, normalization and scaling. top_k: experts a token gets.
    logits: [T, E] float32. bias: [E] float32 correction bias, or None for zeros.
    Returns: ids [T, K] int64, weights [T, K] float32.
    Raises: ValueError where groups do not divide the experts or hold fewer than top_k of them.
    Source: DeepSeek-V3 report, arXiv 2412.19437 section 2.1.2, and its released modeling code (two best per group).
    """
    scores = portable.sigmoid(logits)
    biased = scores if bias is None else scores + bias
    if spec.num_groups > 1:
        biased = _mask_groups(spec, top_k, biased)
    ids = best(biased, top_k)
    weights = scores.gather(1, ids)
    if spec.normalize:
        weights = normalized(weights, SUM_FLOOR)
    return ids, weights * spec.scaling_factor


def _mask_groups(spec: GateSpec, top_k: int, biased: torch.Tensor) -> torch.Tensor:
    """Set scores [T, E] outside each token's best groups to -Inf; a group counts by the sum of its two best."""
    tokens, experts = biased.shape
    size = experts // spec.num_groups
    if experts % spec.num_groups or size < 2:
        raise ValueError(f"num_groups: expected groups of equal size, 2 or more of {experts}, got {spec.num_groups}")
    if not 1 <= spec.top_groups <= spec.num_groups or spec.top_groups * size < top_k:
        raise ValueError(
            f"top_groups: expected at most {spec.num_groups} groups with at least {top_k} experts together, "
            f"got {spec.top_groups} groups of {size}"
        )
    groups = biased.view(tokens, spec.num_groups, size)
    two_best = groups.topk(2, dim=2).values
    chosen = best(two_best[..., 0] + two_best[..., 1], spec.top_groups)
    dropped = torch.ones(tokens, spec.num_groups, dtype=torch.bool, device=biased.device).scatter_(1, chosen, False)
    return groups.masked_fill(dropped.unsqueeze(2), -torch.inf).view(tokens, experts)
