"""A rank's rows of a step: read out of the front ends' slabs, and the outputs written back into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_forward.slab import map_slab
from moe_forward.types import DType, ForwardRequest, Step, TensorRef, token_range

_TORCH = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.I32: torch.int32,
    DType.I64: torch.int64,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of one request that this rank reads, routes and answers.

    index: of the request in its step. first, tokens: rows [first, first + tokens) of the request.
    hidden: [tokens, H] in the request's type. hidden_scales: [tokens, 1 or H/128] float32 for fp8, else None.
    chosen: expert ids or router logits or None. weights: [tokens, K] float32 or None.
    """

    index: int
    request: ForwardRequest
    first: int
    tokens: int
    hidden: Tensor
    hidden_scales: Tensor | None
    chosen: Tensor | None
    weights: Tensor | None


def attach(fd: int, slab_bytes: int) -> Tensor:
    """Map a front end's slab as a tensor [slab_bytes] uint8 that shares its memory."""
    return torch.frombuffer(map_slab(fd, slab_bytes), dtype=torch.uint8)


def read_segments(step: Step, rank: int, ranks: int, slabs: Mapping[int, Tensor]) -> list[Segment]:
    """Copy this rank's rows of a step out of the slabs.

    slabs: front end -> [bytes] uint8, as `attach` returns it.
    Returns: the segments in row order; together they are `token_range(rank, ranks, step.tokens)`.
    """
    return [
        Segment(
            index,
            request,
            first,
            tokens,
            _read(slabs[request.front], request.hidden, first, tokens),
            _read_optional(slabs[request.front], request.hidden_scales, first, tokens),
            _read_optional(slabs[request.front], request.chosen, first, tokens),
            _read_optional(slabs[request.front], request.weights, first, tokens),
        )
        for index, request, first, tokens in _pieces(step, rank, ranks)
    ]


def write_segments(output: Tensor, segments: list[Segment], slabs: Mapping[int, Tensor]) -> None:
    """Write each segment's rows of `output` [T, H] float32 to where its request wants them, in its float type."""
    row = 0
    for segment in segments:
        ref = segment.request.output
        rows = output[row : row + segment.tokens].to(_TORCH[ref.dtype])
        window = _window(slabs[segment.request.front], ref, segment.first, segment.tokens)
        window.copy_(rows.view(torch.uint8).flatten())
        row += segment.tokens


def _pieces(step: Step, rank: int, ranks: int) -> Iterator[tuple[int, ForwardRequest, int, int]]:
    mine = token_range(rank, ranks, step.tokens)
    start = 0
    for index, request in enumerate(step.requests):
        first = max(mine.start - start, 0)
        last = min(mine.stop - start, request.tokens)
        if first < last:
            yield index, request, first, last - first
        start += request.tokens


def _window(slab: Tensor, ref: TensorRef, first: int, tokens: int) -> Tensor:
    row_bytes = ref.columns * ref.dtype.itemsize
    return slab[ref.offset + first * row_bytes : ref.offset + (first + tokens) * row_bytes]


def _read(slab: Tensor, ref: TensorRef, first: int, tokens: int) -> Tensor:
    # The copy is aligned, which a tensor inside a request body need not be.
    return _window(slab, ref, first, tokens).clone().view(_TORCH[ref.dtype]).view(tokens, ref.columns)


def _read_optional(slab: Tensor, ref: TensorRef | None, first: int, tokens: int) -> Tensor | None:
    return None if ref is None else _read(slab, ref, first, tokens)
