"""Seeded tensors and bit comparisons for the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260)


@pytest.fixture
def lognormal(generator: torch.Generator) -> Callable[[int, int], torch.Tensor]:
    """Make Gaussian rows of very different sizes, as activations are."""

    def make(rows: int, columns: int) -> torch.Tensor:
        sizes = torch.randn(rows, 1, generator=generator).exp()
        return torch.randn(rows, columns, generator=generator) * sizes

    return make


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's thread count for the rest of a test; one is quickest for small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
