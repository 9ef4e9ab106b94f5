"""The intake of usual steps as CUDA graphs, one for each layer and bucket: the host launches one thing, not ten."""

from __future__ import annotations

from functools import partial

import torch

from moe_forward.cuda_graphs import Record, Work, buckets
from moe_forward.graphs import GraphedForward
from moe_forward.intake import Intake, Laid
from moe_forward.layer_forward import Room
from moe_forward.slab_rows import Run, wait
from moe_forward.stopwatch import Clock, Untimed
from moe_forward.types import Routing


class GraphedIntake:
    """Lays rows into what `GraphedForward` reads.

    Usual is a step of bfloat16 rows without experts, up to `max_graph_tokens` on the fullest rank, in a group that
    lacks no experts; timed steps are not, whose phases are told apart. Graphs write whatever they read but their input.

    intake: does it for all other steps. forward: whose room it is. layers: ids of the served layers.
    record: how work is captured.
    """

    def __init__(
        self, intake: Intake, forward: GraphedForward, max_graph_tokens: int, layers: tuple[int, ...], record: Record
    ) -> None:
        self._intake = intake
        self._forward = forward
        self._layers = layers
        self._record = record
        self._buckets = buckets(max_graph_tokens) if max_graph_tokens and intake.numbers is None else ()
        self._graphs: dict[tuple[int, int], Work] = {}  # by layer and bucket
        shape = intake.shape
        most = self._buckets[-1] if self._buckets else 0
        self._hidden = torch.zeros(most, shape.hidden_size, dtype=torch.bfloat16, device=shape.device)
        self._rows = torch.arange(most, device=shape.device).unsqueeze(1)
        self._tokens = torch.zeros(1, dtype=torch.int64, device=shape.device)
        self._told_tokens = 0  # what `_tokens` holds
        self._nobody = torch.full((1, 1), -1, device=shape.device)
        self._room_address = 0

    def lay(self, layer: int, runs: list[Run], room: Room, clock: Clock) -> Laid:
        """See `Intake.lay`."""
        graph = self._graphs.get((layer, len(room.ids)))
        usual = len(runs) == 1 and _usual(runs[0]) and isinstance(clock, Untimed)
        if graph is None or not usual or room.ids.data_ptr() != self._room_address:  # a step in chunks has its own room
            return self._intake.lay(layer, runs, room, clock)
        self._fill(runs[0].hidden)
        graph()
        return Laid(0, None)

    def warm_up(self) -> None:
        """Capture the graphs."""
        self._intake.warm_up()
        for bucket in reversed(self._buckets):
            room = self._forward.room(bucket, bucket)
            if len(room.ids) != bucket:
                continue  # the forward pads to other sizes
            self._room_address = room.ids.data_ptr()
            for layer in self._layers:
                self._lay(layer, room)
                wait(self._intake.shape.device)
                self._graphs[layer, bucket] = self._record(partial(self._lay, layer, room))

    def _fill(self, hidden: torch.Tensor) -> None:
        tokens = len(hidden)
        self._hidden[:tokens].copy_(hidden)
        if tokens != self._told_tokens:
            self._tokens.fill_(tokens)
            self._told_tokens = tokens

    def _lay(self, layer: int, room: Room) -> None:
        """Lay all rows of a bucket; those behind the tokens, whatever they are, get no expert and are not read."""
        bucket = len(room.ids)
        hidden, flags = self._hidden[:bucket], room.notes.non_finite
        self._intake.experts.quantize(hidden, out=(room.tokens, flags))
        routes = self._intake.router.by_hidden(layer, hidden)
        flags.logical_or_(routes.non_finite)
        room.weights.copy_(routes.weights)
        torch.where(self._rows[:bucket] < self._tokens, routes.ids, self._nobody, out=room.ids)


def _usual(run: Run) -> bool:
    return run.routing == Routing.SERVER and run.hidden.dtype == torch.bfloat16
