"""Seeded router logits."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def logits() -> torch.Tensor:
    """[67, 64] float32."""
    return torch.randn(67, 64, generator=torch.Generator().manual_seed(7)) * 2
