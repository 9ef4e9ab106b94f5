"""Captures on a GPU; what is captured when is in test_graphs.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from moe_forward.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.gpu


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Let the garbage collector run at every chance."""
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("eager_collector")
def test_a_graph_that_is_garbage_does_not_end_the_capture_of_another() -> None:
    numbers = torch.zeros(8, device="cuda")
    freed: list[bool] = []

    def add() -> None:
        numbers.add_(1)

    class Owner:
        """Owns a graph, and is garbage that only the collector finds."""

        def __init__(self) -> None:
            self.itself = self
            self.replay = CudaGraphs()(add)

        def __del__(self) -> None:
            freed.append(torch.cuda.is_current_stream_capturing())

    def add_and_make_objects() -> None:
        Owner.kept = None  # type: ignore[attr-defined]
        assert [[number] for number in range(1000)]
        add()

    add()
    Owner.kept = Owner()  # type: ignore[attr-defined]
    replay = CudaGraphs()(add_and_make_objects)
    gc.collect()
    assert freed == [False]
    replay()
    assert numbers.tolist() == [2.0] * 8
    assert gc.isenabled()
