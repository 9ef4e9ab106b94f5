"""CUDA graphs: work that is captured once and replayed, and the sizes it is captured for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Work = Callable[[], None]
Record = Callable[[Work], Work]
"""Takes work and returns what does the same work again; on a GPU a capture, in tests on CPU the work itself."""

_SMALL_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128)


def buckets(max_tokens: int) -> tuple[int, ...]:
    """Token counts that steps are padded to: close together where time is short, doubling from 128, up to the maximum.

    max_tokens: the largest, always one of them.
    """
    sizes = [size for size in _SMALL_BUCKETS if size < max_tokens]
    size = 2 * _SMALL_BUCKETS[-1]
    while size < max_tokens:
        sizes.append(size)
        size *= 2
    return (*sizes, max_tokens)


class CudaGraphs:
    """Captures work on the current GPU as CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._shared: tuple[torch.cuda.Stream, Any] | None = None  # made for the first capture

    def __call__(self, work: Work) -> Work:
        """Capture `work`, which must have run before, and return its replay."""
        if self._shared is None:
            self._shared = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        stream, pool = self._shared
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a capture may take memory from the driver, but not free any
        with torch.cuda.stream(stream), _without_collector():
            # Only this thread is held to what a capture allows: NCCL's watchdog asks its events all the time.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            work()  # where it fails the process ends: ending the capture would only hide the reason
            graph.capture_end()
        return graph.replay


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running: freeing a graph, say of a closed rank, ends a capture."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
