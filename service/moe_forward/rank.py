"""One rank: it holds a shard of the experts and does its part of every step, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import w4afp8
from moe_forward.copy_streams import AtOnce, Copies, Pending
from moe_forward.expert_map import expert_map, place_routes, shard
from moe_forward.experts import Experts
from moe_forward.graphed_router import GraphedRouter
from moe_forward.graphs import GraphedForward
from moe_forward.layer_forward import LayerForward, StepCounts
from moe_forward.router import Router
from moe_forward.segments import Segment
from moe_forward.slab_rows import Run, convert_runs, read_runs, to_host, write_runs
from moe_forward.stopwatch import Clock, DeviceStopwatch, Untimed
from moe_forward.types import ModelSpec, Routing, Step, StepResult
from w4afp8 import Quantized


class _Counted(NamedTuple):
    """What a step leaves on the host beside its outputs.

    bad_rows: [T] bool. counts: of the step. missing_rows: [T] int64 routes to missing experts; None: none is missing.
    """

    bad_rows: Tensor
    counts: StepCounts
    missing_rows: Tensor | None


class _Routed(NamedTuple):
    """A run's experts. ids: [n, K] int64 or int32. weights: [n, K] float32. non_finite: [n] bool, None: none is."""

    ids: Tensor
    weights: Tensor
    non_finite: Tensor | None


class Launched:
    """A step under way: on a GPU its kernels and copies run on, on a CPU it is done.

    pending: the copies that end it. tell: makes the result. held: device memory that the copies read, kept for them.
    """

    def __init__(
        self, pending: Pending[_Counted], tell: Callable[[_Counted], StepResult], held: tuple[Tensor, ...]
    ) -> None:
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
    router: chooses experts for tokens that come without. experts: whose `quantize` makes tokens fp8.
    forward: the layer over all ranks, as it is or as graphs; its shape says where this rank computes.
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
        router: Router | GraphedRouter,
        experts: Experts,
        forward: LayerForward | GraphedForward,
        start_clock: Callable[[int], Clock],
        expert_metrics: bool = False,
        missing: tuple[int, ...] = (),
        copies: Copies | None = None,
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._spec = spec
        self._router = router
        self._experts = experts
        self._forward = forward
        self._shape = forward.shape
        self._start_clock = start_clock
        self._expert_metrics = expert_metrics
        self._copies = copies or AtOnce()
        self._timed: Launched | None = None
        self._local_experts = len(shard(rank, ranks, spec.num_experts, missing))
        self._expert_map = expert_map(spec.num_experts, missing, self._shape.device) if missing else None

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
        with clock("quantize"):
            tokens, bad_tokens, requantized_tokens = self._quantize(runs)
        with clock("route"):
            topk_ids, topk_weights, bad_routes = self._route(step.layer, runs)
            topk_ids, missing_rows = self._place(topk_ids)
        counts = StepCounts.empty(self._shape)
        output = self._forward.forward(
            step.layer,
            tokens,
            topk_ids,
            topk_weights,
            self._wanting_shared(runs),
            clock,
            most_tokens=-(-step.tokens // self._ranks),
            counts=counts,
        )
        rows = convert_runs(output, runs)
        bad_rows = bad_tokens if bad_routes is None else bad_tokens | bad_routes
        counted = _Counted(bad_rows, counts, missing_rows)
        pending = self._copies.write(partial(_write, rows, runs, slabs, counted, clock))
        # `tell` holds the rows that were read; both sides of every copy live until the step is finished.
        tell = partial(self._tell, step, runs, clock, requantized_tokens)
        held = (*rows, counted.bad_rows, counts.values, *(() if missing_rows is None else (missing_rows,)))
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

    def _read(self, step: Step, slabs: Mapping[int, Tensor], clock: Clock) -> list[Run]:
        with clock("host_copy"):
            return read_runs(step, self._rank, self._ranks, slabs, self._shape.device)

    def _tell(
        self, step: Step, runs: list[Run], clock: Clock, requantized_tokens: int, counted: _Counted
    ) -> StepResult:
        """Make the result of a step that is done."""
        dispatch_bytes, combine_bytes = counted.counts.moved_bytes.tolist()
        offsets = counted.counts.offsets[: self._local_experts + 1]
        segments = [segment for run in runs for segment in run.segments]
        missing = () if counted.missing_rows is None else _added(counted.missing_rows, segments, len(step.requests))
        return StepResult(
            step.step,
            step.generation,
            self._rank,
            clock.phase_seconds,
            routed_rows=int(offsets[-1]),
            requantized_tokens=requantized_tokens,
            non_finite=_requests_with(counted.bad_rows, segments),
            dispatch_bytes=dispatch_bytes,
            combine_bytes=combine_bytes,
            expert_rows=tuple(offsets.diff().tolist()) if self._expert_metrics else (),
            missing_routes=missing,
        )

    def warm_up(self) -> None:
        """Do everything a first step would pay for; collective."""
        self._router.warm_up()
        self._forward.warm_up(self._spec.layers)

    def close(self) -> None:
        """Leave the group, with every other rank."""
        self._forward.close()

    def _quantize(self, runs: list[Run]) -> tuple[Quantized, Tensor, int]:
        """Return ([T, H] fp8 with scales, [T] bool rows with NaN or Inf, rows that came with the other granularity)."""
        shape = self._shape
        values, scales, bad = list[Tensor](), list[Tensor](), list[Tensor]()
        requantized_tokens = 0
        if not runs:
            values.append(torch.empty(0, shape.hidden_size, dtype=torch.uint8, device=shape.device))
            scales.append(torch.empty(0, shape.scale_columns, device=shape.device))
            bad.append(torch.empty(0, dtype=torch.bool, device=shape.device))
        for run in runs:
            if run.hidden_scales is None:
                tokens, non_finite = self._experts.quantize(run.hidden)
            else:
                received = Quantized(run.hidden, run.hidden_scales)
                non_finite = w4afp8.check_quantized(received)
                tokens = w4afp8.zero_rows(received, non_finite)
                if run.hidden_scales.shape[1] != shape.scale_columns:
                    tokens = self._requantize(tokens)
                    requantized_tokens += run.tokens
            values.append(tokens.values.view(torch.uint8))
            scales.append(tokens.scales)
            bad.append(non_finite)
        joined = Quantized(_joined(values).view(torch.float8_e4m3fn), _joined(scales))
        return joined, _joined(bad), requantized_tokens

    def _requantize(self, tokens: Quantized) -> Quantized:
        """Give fp8 tokens this service's granularity; a token that exceeds float32 gets NaN scales."""
        quantized, overflowed = self._experts.quantize(w4afp8.dequantize_tokens(tokens))
        return Quantized(quantized.values, quantized.scales.masked_fill(overflowed.unsqueeze(1), torch.nan))

    def _route(self, layer: int, runs: list[Run]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ([T, K] int64 or int32 expert ids, [T, K] float32 weights, [T] bool rows whose logits are not finite).

        The last is None where clients chose for all of them.
        """
        shape = self._shape
        if not runs:
            no_ids = torch.empty(0, shape.top_k, dtype=torch.int64, device=shape.device)
            return no_ids, torch.empty(0, shape.top_k, device=shape.device), None
        routes = [self._route_run(layer, run) for run in runs]
        bad = None
        if any(route.non_finite is not None for route in routes):
            bad = _joined([self._flags(run, route) for run, route in zip(runs, routes, strict=True)])
        ids = [route.ids for route in routes]
        if len({part.dtype for part in ids}) > 1:
            ids = [part.long() for part in ids]
        return _joined(ids), _joined([route.weights for route in routes]), bad

    def _route_run(self, layer: int, run: Run) -> _Routed:
        if run.segments[0].request.routing == Routing.TOPK:
            assert run.chosen is not None
            assert run.weights is not None
            return _Routed(run.chosen, run.weights, None)
        if run.chosen is not None:
            return _Routed(*self._router.by_logits(layer, run.chosen))
        return _Routed(*self._router.by_hidden(layer, _floats(run)))

    def _flags(self, run: Run, routed: _Routed) -> Tensor:
        if routed.non_finite is not None:
            return routed.non_finite
        return torch.zeros(run.tokens, dtype=torch.bool, device=self._shape.device)

    def _place(self, topk_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ids as the group numbers experts and, where it lacks some, [T] int64 routes to those."""
        return (topk_ids, None) if self._expert_map is None else place_routes(topk_ids.long(), self._expert_map)

    def _wanting_shared(self, runs: list[Run]) -> Tensor | None:
        """Return [T] bool: rows whose request wants the shared experts' output; None where no row gets it."""
        segments = [segment for run in runs for segment in run.segments]
        if not self._shape.shared or not any(segment.request.shared_experts for segment in segments):
            return None
        # Filled on the device: a tensor made on the host would be waited for on its way there.
        wanting = torch.zeros(sum(run.tokens for run in runs), dtype=torch.bool, device=self._shape.device)
        row = 0
        for segment in segments:
            if segment.request.shared_experts:
                wanting[row : row + segment.tokens].fill_(True)
            row += segment.tokens
        return wanting


def _write(
    rows: list[Tensor], runs: list[Run], slabs: Mapping[int, Tensor], counted: _Counted, clock: Clock
) -> _Counted:
    with clock("host_copy"):
        write_runs(rows, runs, slabs)
        missing_rows = None if counted.missing_rows is None else to_host(counted.missing_rows)
        return _Counted(to_host(counted.bad_rows), StepCounts(to_host(counted.counts.values)), missing_rows)


def _floats(run: Run) -> Tensor:
    """Return the hidden states [n, H] that a run stands for, in a float type that has all of their bits."""
    if run.hidden_scales is None:
        return run.hidden
    return w4afp8.dequantize_tokens(Quantized(run.hidden, run.hidden_scales))


def _joined(parts: list[Tensor]) -> Tensor:
    """Join the runs' rows. parts: at least one, mostly a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _requests_with(bad_rows: Tensor, segments: list[Segment]) -> tuple[int, ...]:
    """Return the indexes of the requests that own a flagged row."""
    if not bool(bad_rows.any()):
        return ()
    parts = torch.split(bad_rows, [segment.tokens for segment in segments])
    return tuple(segment.index for segment, part in zip(segments, parts, strict=True) if bool(part.any()))


def _added(row_counts: Tensor, segments: list[Segment], requests: int) -> tuple[int, ...]:
    """Add counts of rows up by request; empty where all of them are 0."""
    totals = [0] * requests
    for segment, part in zip(segments, torch.split(row_counts, [s.tokens for s in segments]), strict=True):
        totals[segment.index] += int(part.sum())
    return tuple(totals) if any(totals) else ()
