"""Captures on a GPU; what is captured when is in test_graphs.py."""

from __future__ import annotations

import gc

import pytest
import torch

from moe_forward.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.gpu


class Noted:
    """Notes whether a capture was under way when it was freed."""

    def __init__(self, freed: list[bool]) -> None:
        self._freed = freed

    def __del__(self) -> None:
        self._freed.append(torch.cuda.is_current_stream_capturing())


def test_a_graph_that_becomes_garbage_in_a_capture_does_not_end_it() -> None:
    """As when the collector finds a closed rank's graphs while the next rank of the same process captures its own."""
    numbers = torch.zeros(8, device="cuda")

    def add() -> None:
        numbers.add_(1)

    add()
    freed: list[bool] = []
    graphs = [CudaGraphs()(add)]

    def add_beside_garbage() -> None:
        ring: list[object] = [graphs.pop(), Noted(freed)]  # young, so that the next automatic collection finds it
        ring.append(ring)
        del ring
        assert len([[number] for number in range(10 * gc.get_threshold()[0])]) > gc.get_threshold()[0]
        add()

    replay = CudaGraphs()(add_beside_garbage)
    gc.collect()
    assert freed == [False]
    replay()
    assert numbers.tolist() == [2.0] * 8
    assert gc.isenabled()
