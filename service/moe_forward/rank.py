"""One rank: it holds a shard of the experts and does its part of every step, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moe_forward.copy_streams import AtOnce, Copies, Pending
from moe_forward.expert_map import shard
from moe_forward.graphed_intake import GraphedIntake
from moe_forward.graphs import GraphedForward
from moe_forward.intake import Intake
from moe_forward.layer_forward import LayerForward, Room, StepNotes
from moe_forward.moves import Mover
from moe_forward.segments import Segment
from moe_forward.slab_rows import Run, convert_runs, read_runs, to_host, write_runs
from moe_forward.stopwatch import Clock, DeviceStopwatch, Untimed
from moe_forward.types import ModelSpec, Step, StepResult


class _Told(NamedTuple):
    """What a step leaves on the host beside its outputs.

    notes: of the step. missing_rows: [T] int64 routes to missing experts; None: none is missing.
    """

    notes: StepNotes
    missing_rows: Tensor | None


class Launched:
    """A step under way: on a GPU its kernels and copies run on, on a CPU it is done.

    pending: the copies that end it. tell: makes the result. held: device memory that the copies read, kept for them.
    """

    def __init__(self, pending: Pending[_Told], tell: Callable[[_Told], StepResult], held: tuple[Tensor, ...]) -> None:
        self._pending = pending
        self._tell = tell
        self._held = held
        self.finished = False

    def done(self) -> bool:
        """Whether `finish` returns at once."""
        return self._pending.done()

    def finish(self) -> StepResult:
        """Wait for this step, not for those behind it: its outputs are in the slabs, and nothing touches them now."""
        result = self._tell(self._pending.result())
        self._held = ()
        self.finished = True
        return result


class Rank:
    """A step of one rank, without the process around it.

    rank, ranks: place in the group. spec: the model.
    intake: makes rows what the forward takes. forward: the layer over all ranks, as it is or as graphs; its shape says
        where this rank computes.
    start_clock: makes the clock of a step by its number.
    expert_metrics: report the rows of every expert with each step.
    missing: ids of the experts that the group lacks; routes to them are counted and add nothing.
    copies: between the slabs and where this rank computes.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        spec: ModelSpec,
        intake: Intake | GraphedIntake,
        forward: LayerForward | GraphedForward,
        start_clock: Callable[[int], Clock],
        expert_metrics: bool = False,
        missing: tuple[int, ...] = (),
        copies: Copies | None = None,
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._spec = spec
        self._intake = intake
        self._forward = forward
        self._shape = forward.shape
        self._start_clock = start_clock
        self._expert_metrics = expert_metrics
        self._copies = copies or AtOnce()
        self._timed: Launched | None = None
        self._local_experts = len(shard(rank, ranks, spec.num_experts, missing))

    def step(self, step: Step, slabs: Mapping[int, Tensor]) -> StepResult:
        """Launch a step and finish it. See `launch`."""
        return self.launch(step, slabs).finish()

    def launch(self, step: Step, slabs: Mapping[int, Tensor]) -> Launched:
        """Read this rank's rows, forward them with all other ranks, write the outputs; on a GPU without waiting for it.

        More steps may be launched before this one is finished. Phases that are timed keep their meaning: `host_copy`
        runs beside the phases of other steps, so that phases can add up to more than the time between two steps.

        slabs: front end -> its memory as [bytes] uint8. Collective: every rank launches the same steps in one order.
        """
        clock = self._clock(step.step)
        runs = self._copies.read(partial(self._read, step, slabs, clock))
        most_tokens = -(-step.tokens // self._ranks)
        room = self._forward.room(sum(run.tokens for run in runs), most_tokens)
        requantized_tokens, missing_rows = self._intake.lay(step.layer, runs, room, clock)
        with_shared = self._want_shared(runs, room)
        output = self._forward.forward(step.layer, room, with_shared, clock, most_tokens=most_tokens)
        rows = convert_runs(output, runs)
        # On the stream that computes: the next step writes over what is noted.
        told = _Told(
            room.notes.over(to_host(room.notes.memory)), None if missing_rows is None else to_host(missing_rows)
        )
        pending = self._copies.write(partial(_write, rows, runs, slabs, told, clock))
        # `tell` holds the rows that were read; both sides of every copy live until the step is finished.
        tell = partial(self._tell, step, runs, clock, requantized_tokens)
        held = (*rows, room.notes.memory, *(() if missing_rows is None else (missing_rows,)))
        launched = Launched(pending, tell, held)
        if isinstance(clock, DeviceStopwatch):
            self._timed = launched
        return launched

    def _clock(self, step: int) -> Clock:
        """Start a step's clock; while a timed step is not finished, the next one goes untimed.

        Timed graphs share their events: another replay would write over figures that were not read yet.
        """
        clock = self._start_clock(step)
        under_way = self._timed is not None and not self._timed.finished
        return Untimed() if under_way and isinstance(clock, DeviceStopwatch) else clock

    def _read(self, step: Step, slabs: Mapping[int, Tensor], clock: Clock, mover: Mover) -> list[Run]:
        with clock("host_copy"):
            return read_runs(step, self._rank, self._ranks, slabs, self._shape.device, mover)

    def _tell(self, step: Step, runs: list[Run], clock: Clock, requantized_tokens: int, told: _Told) -> StepResult:
        """Make the result of a step that is done."""
        counts = told.notes.values[: self._local_experts + 3].tolist()
        dispatch_bytes, combine_bytes, *offsets = counts
        segments = [segment for run in runs for segment in run.segments]
        missing = () if told.missing_rows is None else _added(told.missing_rows, segments, len(step.requests))
        return StepResult(
            step.step,
            step.generation,
            self._rank,
            clock.phase_seconds,
            routed_rows=offsets[-1],
            requantized_tokens=requantized_tokens,
            non_finite=_requests_with(told.notes.non_finite, segments),
            dispatch_bytes=dispatch_bytes,
            combine_bytes=combine_bytes,
            expert_rows=tuple(end - start for start, end in pairwise(offsets)) if self._expert_metrics else (),
            missing_routes=missing,
        )

    def warm_up(self) -> None:
        """Do everything a first step would pay for; collective."""
        self._intake.warm_up()
        self._forward.warm_up(self._spec.layers)

    def close(self) -> None:
        """Leave the group, with every other rank."""
        self._forward.close()

    def _want_shared(self, runs: list[Run], room: Room) -> bool:
        """Mark rows whose request wants the shared experts' output. Returns: whether any row gets it."""
        segments = [segment for run in runs for segment in run.segments]
        wanting = [segment.request.shared_experts for segment in segments]
        if not self._shape.shared or not any(wanting):
            return False
        # Filled on the device: a tensor made on the host would be waited for on its way there.
        room.shared.fill_(True)
        row = 0
        for segment, wants in zip(segments, wanting, strict=True):
            if not wants:
                room.shared[row : row + segment.tokens].fill_(False)
            row += segment.tokens
        return True


def _write(
    rows: list[Tensor], runs: list[Run], slabs: Mapping[int, Tensor], told: _Told, clock: Clock, mover: Mover
) -> _Told:
    with clock("host_copy"):
        write_runs(rows, runs, slabs, mover)
    return told


def _requests_with(bad_rows: Tensor, segments: list[Segment]) -> tuple[int, ...]:
    """Return the indexes of the requests that own a flagged row."""
    if not bool(bad_rows.any()):
        return ()
    parts = torch.split(bad_rows, [segment.tokens for segment in segments])
    return tuple(segment.position for segment, part in zip(segments, parts, strict=True) if bool(part.any()))


def _added(row_counts: Tensor, segments: list[Segment], requests: int) -> tuple[int, ...]:
    """Add counts of rows up by request; empty where all of them are 0."""
    totals = [0] * requests
    for segment, part in zip(segments, torch.split(row_counts, [s.tokens for s in segments]), strict=True):
        totals[segment.position] += int(part.sum())
    return tuple(totals) if any(totals) else ()
