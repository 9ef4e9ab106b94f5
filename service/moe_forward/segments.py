"""Which rows of a step belong to a rank, and which bytes of the slabs they are.

Every process works it out from the step alone: the rank that reads them, and the gateway that sends them to its host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moe_forward.types import ForwardRequest, Step, TensorRef, token_range

INPUTS = ("hidden", "hidden_scales", "chosen", "weights")
"""The tensors of a request that ranks read."""


class Window(NamedTuple):
    """Bytes [offset, offset + nbytes) of the slab of front end `front`."""

    front: int
    offset: int
    nbytes: int


class Segment(NamedTuple):
    """The part of one request that a rank reads, routes and answers.

    position: of the request in its step. first, tokens: rows [first, first + tokens) of the request.
    """

    position: int
    request: ForwardRequest
    first: int
    tokens: int

    def window(self, ref: TensorRef) -> Window:
        """Return where these rows of one of the request's tensors lie."""
        row_bytes = ref.columns * ref.dtype.itemsize
        return Window(self.request.front, ref.offset + self.first * row_bytes, self.tokens * row_bytes)


def segments(step: Step, rank: int, ranks: int) -> Iterator[Segment]:
    """Return the parts of the step's requests that make up the rows of `rank`, in row order."""
    mine = token_range(rank, ranks, step.tokens)
    start = 0
    for position, request in enumerate(step.requests):
        first = max(mine.start - start, 0)
        last = min(mine.stop - start, request.tokens)
        if first < last:
            yield Segment(position, request, first, last - first)
        start += request.tokens


def input_windows(step: Step, rank: int, ranks: int) -> list[Window]:
    """Return everything that `rank` reads in a step."""
    return [
        segment.window(ref)
        for segment in segments(step, rank, ranks)
        for ref in (getattr(segment.request, name) for name in INPUTS)
        if ref is not None
    ]


def output_windows(step: Step, rank: int, ranks: int) -> list[Window]:
    """Return everything that `rank` writes in a step."""
    return [segment.window(segment.request.output) for segment in segments(step, rank, ranks)]
