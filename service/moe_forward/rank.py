"""One rank: it holds a shard of the experts and does its part of every step, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import w4afp8
from moe_forward.experts import Experts
from moe_forward.graphed_router import GraphedRouter
from moe_forward.graphs import GraphedForward
from moe_forward.layer_forward import LayerForward, StepCounts
from moe_forward.router import Router
from moe_forward.segments import Segment
from moe_forward.slab_rows import Run, read_runs, to_host, wait, write_runs
from moe_forward.stopwatch import Clock
from moe_forward.types import ModelSpec, Routing, Step, StepResult, expert_range
from w4afp8 import Quantized


class Rank:
    """A step of one rank, without the process around it.

    rank, ranks: place in the group. spec: the model.
    router: chooses experts for tokens that come without. experts: whose `quantize` makes tokens fp8.
    forward: the layer over all ranks, as it is or as graphs; its shape says where this rank computes.
    start_clock: makes the clock of a step by its number.
    expert_metrics: report the rows of every expert with each step.
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
        self._local_experts = len(expert_range(rank, ranks, spec.num_experts))

    def step(self, step: Step, slabs: Mapping[int, Tensor]) -> StepResult:
        """Read this rank's rows, forward them with all other ranks, write the outputs.

        slabs: front end -> its memory as [bytes] uint8. Collective: every rank of the group is in the same step.
        """
        clock = self._start_clock(step.step)
        with clock("host_copy"):
            runs = read_runs(step, self._rank, self._ranks, slabs, self._shape.device)
        with clock("quantize"):
            tokens, bad_tokens, requantized_tokens = self._quantize(runs)
        with clock("route"):
            topk_ids, topk_weights, bad_routes = self._route(step.layer, runs)
        counts = StepCounts.zeros(self._shape)
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
        with clock("host_copy"):
            write_runs(output, runs, slabs)
            bad_rows, counted = to_host(bad_tokens | bad_routes), StepCounts(to_host(counts.values))
        wait(self._shape.device)
        dispatch_bytes, combine_bytes = counted.moved_bytes.tolist()
        offsets = counted.offsets[: self._local_experts + 1]
        return StepResult(
            step.step,
            step.generation,
            self._rank,
            clock.phase_seconds,
            routed_rows=int(offsets[-1]),
            requantized_tokens=requantized_tokens,
            non_finite=_requests_with(bad_rows, [segment for run in runs for segment in run.segments]),
            dispatch_bytes=dispatch_bytes,
            combine_bytes=combine_bytes,
            expert_rows=tuple(offsets.diff().tolist()) if self._expert_metrics else (),
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
        values = [torch.empty(0, shape.hidden_size, dtype=torch.uint8, device=shape.device)]
        scales = [torch.empty(0, shape.scale_columns, device=shape.device)]
        bad = [torch.empty(0, dtype=torch.bool, device=shape.device)]
        requantized_tokens = 0
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

    def _route(self, layer: int, runs: list[Run]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ([T, K] int64 expert ids, [T, K] float32 weights, [T] bool rows whose logits are not finite)."""
        shape = self._shape
        ids = [torch.empty(0, shape.top_k, dtype=torch.int64, device=shape.device)]
        weights = [torch.empty(0, shape.top_k, device=shape.device)]
        bad = [torch.empty(0, dtype=torch.bool, device=shape.device)]
        for run in runs:
            if run.segments[0].request.routing == Routing.TOPK:
                assert run.chosen is not None
                assert run.weights is not None
                ids.append(run.chosen.long())
                weights.append(run.weights)
                bad.append(torch.zeros(run.tokens, dtype=torch.bool, device=shape.device))
            else:
                if run.chosen is not None:
                    routes = self._router.by_logits(layer, run.chosen.float())
                else:
                    routes = self._router.by_hidden(layer, _floats(run))
                ids.append(routes.ids)
                weights.append(routes.weights)
                bad.append(routes.non_finite)
        return _joined(ids), _joined(weights), _joined(bad)

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


def _floats(run: Run) -> Tensor:
    """Return the hidden states [n, H] float32 that a run stands for."""
    if run.hidden_scales is None:
        return run.hidden.float()
    return w4afp8.dequantize_tokens(Quantized(run.hidden, run.hidden_scales))


def _joined(parts: list[Tensor]) -> Tensor:
    """Join the runs' rows. parts: an empty tensor of the right type, then one a run, mostly a single one."""
    return parts[1] if len(parts) == 2 else torch.cat(parts)


def _requests_with(bad_rows: Tensor, segments: list[Segment]) -> tuple[int, ...]:
    """Return the indexes of the requests that own a flagged row."""
    lengths = [segment.tokens for segment in segments]
    parts = torch.split(bad_rows, lengths) if segments else ()
    return tuple(segment.index for segment, part in zip(segments, parts, strict=True) if bool(part.any()))
