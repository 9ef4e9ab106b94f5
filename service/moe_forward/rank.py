"""One rank: it holds a shard of the experts and does its part of every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import w4afp8
from moe_forward import gates
from moe_forward.checkpoint import LayerWeights
from moe_forward.exchange import Exchange
from moe_forward.experts import Experts
from moe_forward.slab_rows import Segment, read_segments, write_segments
from moe_forward.stopwatch import Stopwatch
from moe_forward.types import SCALE_GROUP, ActivationScale, ModelSpec, Routing, Step, StepResult
from w4afp8 import Quantized, portable


class Rank:
    """A step of one rank, without the process around it.

    rank, ranks: place in the group. layers: gate weights of every served layer (experts are `experts`' business).
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        spec: ModelSpec,
        layers: Mapping[int, LayerWeights],
        exchange: Exchange,
        experts: Experts,
        activation_scale: ActivationScale,
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._spec = spec
        self._layers = layers
        self._exchange = exchange
        self._experts = experts
        self._activation_scale = activation_scale

    def step(self, step: Step, slabs: Mapping[int, Tensor]) -> StepResult:
        """Read this rank's rows, forward them with all other ranks, write the outputs.

        slabs: front end -> its memory as [bytes] uint8. Collective: every rank of the group is in the same step.
        """
        clock = Stopwatch()
        with clock("host_copy"):
            segments = read_segments(step, self._rank, self._ranks, slabs)
        with clock("quantize"):
            tokens, bad_tokens, requantized_tokens = self._quantize(segments)
        with clock("route"):
            topk_ids, topk_weights, bad_routes = self._route(step.layer, segments)
        with clock("dispatch"):
            received = self._exchange.dispatch(tokens, topk_ids, topk_weights)
        rows = self._experts.forward(step.layer, received.rows, received.offsets, received.weights, clock)
        with clock("combine"):
            output = self._exchange.combine(rows, received.handle)
        with clock("shared_experts"):
            self._add_shared_experts(step.layer, tokens, segments, output)
        with clock("host_copy"):
            write_segments(output, segments, slabs)
        return StepResult(
            step.step,
            step.generation,
            self._rank,
            clock.phase_seconds,
            routed_rows=len(rows),
            requantized_tokens=requantized_tokens,
            non_finite=_requests_with(bad_tokens | bad_routes, segments),
        )

    def warm_up(self) -> None:
        """Forward a few random tokens through every layer, so that the first request pays for no first call."""
        generator = torch.Generator().manual_seed(self._rank)
        for layer in self._spec.layers:
            hidden = torch.randn(2, self._spec.hidden_size, generator=generator)
            tokens, _ = w4afp8.quantize_tokens(hidden, self._activation_scale)
            topk_ids, topk_weights = self._gate(layer, self._logits(layer, hidden))
            received = self._exchange.dispatch(tokens, topk_ids, topk_weights)
            rows = self._experts.forward(layer, received.rows, received.offsets, received.weights, Stopwatch())
            self._exchange.combine(rows, received.handle)

    def _quantize(self, segments: list[Segment]) -> tuple[Quantized, Tensor, int]:
        """Return ([T, H] fp8 with scales, [T] bool rows with NaN or Inf, rows that came with the other granularity)."""
        columns = 1 if self._activation_scale == "token" else self._spec.hidden_size // SCALE_GROUP
        values = [torch.empty(0, self._spec.hidden_size, dtype=torch.float8_e4m3fn)]
        scales = [torch.empty(0, columns)]
        bad = [torch.empty(0, dtype=torch.bool)]
        requantized_tokens = 0
        for segment in segments:
            if segment.hidden_scales is None:
                tokens, non_finite = w4afp8.quantize_tokens(segment.hidden, self._activation_scale)
            else:
                received = Quantized(segment.hidden, segment.hidden_scales)
                non_finite = w4afp8.check_quantized(received)
                tokens = w4afp8.zero_rows(received, non_finite)
                if segment.hidden_scales.shape[1] != columns:
                    tokens = w4afp8.requantize(tokens, self._activation_scale)
                    requantized_tokens += segment.tokens
            values.append(tokens.values)
            scales.append(tokens.scales)
            bad.append(non_finite)
        joined = torch.cat([part.view(torch.uint8) for part in values]).view(torch.float8_e4m3fn)
        return Quantized(joined, torch.cat(scales)), torch.cat(bad), requantized_tokens

    def _route(self, layer: int, segments: list[Segment]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ([T, K] int64 expert ids, [T, K] float32 weights, [T] bool rows whose logits are not finite)."""
        ids = [torch.empty(0, self._spec.top_k, dtype=torch.int64)]
        weights = [torch.empty(0, self._spec.top_k)]
        bad = [torch.empty(0, dtype=torch.bool)]
        for segment in segments:
            if segment.request.routing == Routing.TOPK:
                assert segment.chosen is not None
                assert segment.weights is not None
                chosen, weighted = segment.chosen.long(), segment.weights
                bad.append(torch.zeros(segment.tokens, dtype=torch.bool))
            else:
                logits = self._logits_of(layer, segment)
                chosen, weighted = self._gate(layer, logits)
                bad.append(~torch.isfinite(logits).all(1))
            ids.append(chosen)
            weights.append(weighted)
        return torch.cat(ids), torch.cat(weights), torch.cat(bad)

    def _logits_of(self, layer: int, segment: Segment) -> Tensor:
        if segment.chosen is not None:
            return segment.chosen.float()
        if segment.hidden_scales is None:
            return self._logits(layer, segment.hidden.float())
        return self._logits(layer, w4afp8.dequantize_tokens(Quantized(segment.hidden, segment.hidden_scales)))

    def _logits(self, layer: int, hidden: Tensor) -> Tensor:
        return portable.linear(hidden, self._layers[layer].gate_weight)

    def _gate(self, layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        return gates.choose(self._spec.gate, self._spec.top_k, logits, self._layers[layer].gate_bias)

    def _add_shared_experts(self, layer: int, tokens: Quantized, segments: list[Segment], output: Tensor) -> None:
        """Add the shared experts' output to the rows of requests that want it, in place."""
        if self._spec.shared_intermediate_size == 0:
            return
        wanted = _spread([segment.request.shared_experts for segment in segments], segments)
        if bool(wanted.any()):
            values = tokens.values.view(torch.uint8)[wanted].view(torch.float8_e4m3fn)
            output[wanted] += self._experts.shared(layer, Quantized(values, tokens.scales[wanted]))


def _spread(flags: list[bool], segments: list[Segment]) -> Tensor:
    """Repeat one flag for each of its segment's rows."""
    lengths = torch.tensor([segment.tokens for segment in segments], dtype=torch.int64)
    return torch.repeat_interleave(torch.tensor(flags, dtype=torch.bool), lengths)


def _requests_with(bad_rows: Tensor, segments: list[Segment]) -> tuple[int, ...]:
    """Return the indexes of the requests that own a flagged row."""
    lengths = [segment.tokens for segment in segments]
    parts = torch.split(bad_rows, lengths) if segments else ()
    return tuple(segment.index for segment, part in zip(segments, parts, strict=True) if bool(part.any()))
