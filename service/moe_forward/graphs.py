"""Steps of usual sizes as CUDA graphs: captured once for each layer and bucket of token counts, then only replayed.

A device exchange needs the same number of tokens on every rank, and a graph has a fixed size. Both are met by padding
to a bucket, which every rank derives from the step alone. Padding tokens have expert ids of -1: they go nowhere.
Graphs share one memory pool: each writes whatever it reads, inputs and outputs lie outside, and one runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_forward.cuda_graphs import Record, Work, buckets
from moe_forward.errors import StartError
from moe_forward.experts import PhaseClock
from moe_forward.layer_forward import LayerForward, Room, StepNotes
from moe_forward.slab_rows import wait
from moe_forward.stopwatch import DeviceStopwatch, Event, Span, Untimed, graph_pairs
from w4afp8 import Quantized


class _Graph(NamedTuple):
    replay: Work
    spans: list[Span]


class GraphedForward:
    """The layer at the sizes of the buckets, as graphs up to `max_graph_tokens` and kernel by kernel above.

    layer_forward: what is captured. max_tokens: the largest number of tokens a rank forwards at once; more go in
    chunks. timed: also capture graphs that record the phases, for `DeviceStopwatch`es. record: how work is captured.
    pair: event pairs of the phases in timed graphs.
    """

    def __init__(
        self,
        layer_forward: LayerForward,
        max_tokens: int,
        max_graph_tokens: int,
        timed: bool,
        record: Record,
        pair: Callable[[str], tuple[Event, Event]] | None = None,
    ) -> None:
        self._forward = layer_forward
        self._buckets = buckets(max_tokens)
        self._max_graph_tokens = max_graph_tokens
        self._timed = timed
        self._record = record
        self._pair = pair or graph_pairs()
        self._graphs: dict[tuple[int, int, bool, bool], _Graph] = {}  # by layer, bucket, shared experts, timed
        shape = self.shape = layer_forward.shape
        self._tokens, self._ids, self._weights = shape.example(max_tokens)
        self._shared = torch.zeros(max_tokens, dtype=torch.bool, device=shape.device)
        self._output = torch.empty(max_tokens, shape.hidden_size, device=shape.device)
        self._notes = StepNotes.zeros(shape, max_tokens)
        self._rooms: dict[int, Room] = {}  # the last one of each bucket: views take longer to make than to use

    def room(self, tokens: int, most_tokens: int) -> Room:
        """Return where to lay a step in which this rank has `tokens`: what graphs read, unless it goes in chunks.

        most_tokens: the largest number of tokens of all ranks.
        """
        if most_tokens > self._buckets[-1]:
            return Room.new(self.shape, tokens)
        bucket = self._bucket(most_tokens)
        room = self._rooms.get(bucket)
        if room is None or len(room.shared) != tokens:
            room = self._rooms[bucket] = Room(
                Quantized(self._tokens.values[:tokens], self._tokens.scales[:tokens]),
                self._ids[:bucket],
                self._weights[:bucket],
                self._shared[:tokens],
                self._notes.first(tokens),
            )
        return room

    def forward(self, layer: int, room: Room, with_shared: bool, clock: PhaseClock, *, most_tokens: int) -> Tensor:
        """Forward this rank's tokens; collective. See `LayerForward.forward`.

        room, most_tokens: what `room` returned last, and was asked with; the same `most_tokens` on every rank.
        Returns: [T, H] float32, valid until the next call.
        """
        tokens = room.tokens.values.shape[0]
        if most_tokens > self._buckets[-1]:
            return self._forward_chunks(layer, room, with_shared, clock, most_tokens)
        self._run(layer, self._bucket(most_tokens), with_shared, clock, alone=True)
        return self._output[:tokens]

    def _forward_chunks(self, layer: int, room: Room, with_shared: bool, clock: PhaseClock, most_tokens: int) -> Tensor:
        tokens, largest = room.tokens.values.shape[0], self._buckets[-1]
        parts = []
        for first in range(0, most_tokens, largest):
            part = slice(min(first, tokens), min(first + largest, tokens))
            bucket = self._bucket(min(most_tokens - first, largest))
            chunk = Quantized(room.tokens.values[part], room.tokens.scales[part])
            self._fill(bucket, chunk, room.ids[part], room.weights[part])
            if with_shared:
                self._shared[: part.stop - part.start].copy_(room.shared[part])
            self._run(layer, bucket, with_shared, clock, alone=False)
            parts.append(self._output[: part.stop - part.start].clone())
            room.notes.values.add_(self._notes.values)
        return torch.cat(parts)

    def warm_up(self, layers: Sequence[int]) -> None:
        """Run every bucket once and capture the graphs; collective, in the same order on every rank.

        layers: ids of the served layers.
        Raises: StartError naming the layer and the bucket.
        """
        for bucket in reversed(self._buckets):  # the largest first: the others fit into its memory
            for shared in sorted({False, self.shape.shared}):
                with _named(layers[0], bucket):
                    self._fill(bucket, *self.shape.example(bucket))
                    self._compute(layers[0], bucket, shared, Untimed())
                    wait(self.shape.device)
                for layer in layers if bucket <= self._max_graph_tokens else ():
                    for timed in sorted({False, self._timed}):
                        with _named(layer, bucket):
                            self._capture(layer, bucket, shared, timed)

    def close(self) -> None:
        """Drop the graphs, which hold the group's collectives, and leave the group with every other rank."""
        self._graphs.clear()
        self._forward.close()

    def _capture(self, layer: int, bucket: int, shared: bool, timed: bool) -> None:
        clock = DeviceStopwatch(self._pair) if timed else Untimed()
        replay = self._record(partial(self._compute, layer, bucket, shared, clock))
        spans = clock.spans if isinstance(clock, DeviceStopwatch) else []
        self._graphs[layer, bucket, shared, timed] = _Graph(replay, list(spans))
        replay()
        wait(self.shape.device)

    def _run(self, layer: int, bucket: int, shared: bool, clock: PhaseClock, alone: bool) -> None:
        """Run one chunk. alone: the step's only one; only then can a timed graph's events be read after the step."""
        timed = isinstance(clock, DeviceStopwatch)
        graph = self._graphs.get((layer, bucket, shared, timed)) if alone or not timed else None
        if graph is None:
            self._compute(layer, bucket, shared, clock)
            return
        graph.replay()
        if isinstance(clock, DeviceStopwatch):
            clock.add(graph.spans)

    def _compute(self, layer: int, bucket: int, shared: bool, clock: PhaseClock) -> None:
        self._forward.compute(
            layer,
            Quantized(self._tokens.values[:bucket], self._tokens.scales[:bucket]),
            self._ids[:bucket],
            self._weights[:bucket],
            self._shared[:bucket] if shared else None,
            clock,
            notes=self._notes,
            out=self._output[:bucket],
        )

    def _fill(self, bucket: int, tokens: Quantized, ids: Tensor, weights: Tensor) -> None:
        """Copy a chunk into what graphs read; what it leaves of the bucket becomes padding."""
        count = ids.shape[0]
        self._tokens.values[:count].view(torch.uint8).copy_(tokens.values.view(torch.uint8))
        self._tokens.scales[:count].copy_(tokens.scales)
        self._ids[:count].copy_(ids)
        self._ids[count:bucket].fill_(-1)
        self._weights[:count].copy_(weights)

    def _bucket(self, tokens: int) -> int:
        return next(bucket for bucket in self._buckets if bucket >= tokens)


@contextmanager
def _named(layer: int, bucket: int) -> Iterator[None]:
    """Say which layer and bucket a failure of the block belongs to."""
    try:
        yield
    except Exception as error:
        raise StartError(
            f"warming up layer {layer} for {bucket} tokens a rank failed: {type(error).__name__}: {error}"
        ) from error
