"""What the gates share: ranking with ties by lowest id, and a division by the sum in a fixed order."""

from __future__ import annotations

import torch


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the `count` largest scores of each row, best first, equals by ascending column.

    torch.topk leaves the order of equals open, and which of them it takes.

    scores: [T, C] floating point.
    Returns: [T, count] int64.
    """
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def normalized(weights: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Divide each row by its sum plus `floor`, the columns added from left to right.

    torch.sum may order the additions by the shape of the whole batch.

    weights: [T, K] float32.
    Returns: [T, K] float32.
    """
    total = weights[:, 0].clone()
    for column in range(1, weights.shape[1]):
        total = total + weights[:, column]
    return weights / (total + floor).unsqueeze(1)
