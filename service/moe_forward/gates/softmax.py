"""Softmax top-k: the gate of Qwen3-MoE and Mixtral."""

from __future__ import annotations

import torch

from moe_forward.gates.ranking import best, normalized
from moe_forward.types import GateSpec
from w4afp8 import portable


def softmax(
    spec: GateSpec, top_k: int, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of the largest probabilities; weigh them by probability.

    spec: normalization and scaling; groups must be 1. top_k: experts a token gets.
    logits: [T, E] float32, finite (a rank refuses a request with others). bias: must be None.
    Returns: ids [T, K] int64, weights [T, K] float32.
    Raises: ValueError for a bias or groups, which this gate does not have.
    Source: Shazeer et al., arXiv 1701.06538 section 2.1; Qwen3 report, arXiv 2505.09388 (renormalized top-k).
    """
    if bias is not None:
        raise ValueError("bias: expected None, the softmax gate has no correction bias, got a tensor")
    if spec.num_groups != 1:
        raise ValueError(f"num_groups: expected 1, the softmax gate has no groups, got {spec.num_groups}")
    powers = portable.exp(logits - logits.amax(dim=1, keepdim=True))
    probabilities = powers / portable.halving_sum(powers).unsqueeze(1)
    ids = best(probabilities, top_k)
    weights = probabilities.gather(1, ids)
    if spec.normalize:
        weights = normalized(weights)
    return ids, weights * spec.scaling_factor
