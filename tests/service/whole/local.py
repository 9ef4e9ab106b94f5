"""The same layer computed in the test's own process: bit for bit what the service must answer, and in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import w4afp8
from moe_forward import checkpoint, gates
from moe_forward.checkpoint import LayerWeights
from moe_forward.types import ModelSpec
from w4afp8 import ExpertWeights, Quantized, SharedExpert, portable, reference
from w4afp8.formats import quantize_intermediate

from .forwards import Forward


class Local:
    """All experts of a checkpoint in one process. folder: the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.spec: ModelSpec = checkpoint.read_spec(folder)
        every = range(self.spec.num_experts)
        self.layers: dict[int, LayerWeights] = checkpoint.load_shard(folder, self.spec, self.spec.layers, every)

    def outputs(self, forwards: list[Forward]) -> list[Tensor]:
        """Return the output [T, H] of each forward in its reply's type; forwards of one layer are computed at once."""
        results: dict[int, Tensor] = {}
        for layer in self.spec.layers:
            mine = [index for index, forward in enumerate(forwards) if forward.layer == layer]
            if not mine:
                continue
            parts = [forwards[index] for index in mine]
            tokens = _joined([quantized(part) for part in parts])
            routes = [self.routes(part) for part in parts]
            ids, weights = (torch.cat(column) for column in zip(*routes, strict=True))
            wanted = torch.cat([torch.full((len(part.hidden),), part.shared) for part in parts])
            output = self._layer(layer, tokens, ids, weights, wanted)
            rows = torch.split(output, [len(part.hidden) for part in parts])
            for index, part, mine_rows in zip(mine, parts, rows, strict=True):
                results[index] = mine_rows.to(part.output_dtype)
        return [results[index] for index in range(len(forwards))]

    def output(self, forward: Forward) -> Tensor:
        """Return the output [T, H] of one forward in its reply's type."""
        return self.outputs([forward])[0]

    def exact(self, forward: Forward) -> Tensor:
        """Return the output [T, H] float64 of the specification; hidden states must be floats."""
        weights = self.layers[forward.layer]
        ids, route_weights = self.routes(forward)
        shared = weights.shared if forward.shared else None
        return reference.moe_layer(
            forward.hidden, ids, route_weights, weights.experts, shared, "token", dtype=torch.float64
        )

    def routes(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """Return ids [T, K] int64 and weights [T, K] float32 of a forward, by the layer's gate where it has none."""
        if forward.ids is not None:
            assert forward.weights is not None
            return forward.ids.long(), forward.weights
        layer = self.layers[forward.layer]
        logits = forward.logits
        if logits is None:
            hidden = forward.hidden.float()
            if forward.scales is not None:
                hidden = w4afp8.dequantize_tokens(Quantized(forward.hidden, _columns(forward.scales)))
            logits = portable.linear(hidden, layer.gate_weight)
        return gates.choose(self.spec.gate, self.spec.top_k, logits.float(), layer.gate_bias)

    def _layer(self, layer: int, tokens: Quantized, ids: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
        contributions = torch.zeros(*ids.shape, self.spec.hidden_size)
        for number, expert in enumerate(self.layers[layer].experts):
            token, slot = torch.nonzero(ids == number, as_tuple=True)
            if len(token):
                rows = _expert(_rows(tokens, token), expert)
                contributions[token, slot] = rows * weights[token, slot].unsqueeze(1)
        output = torch.zeros(len(ids), self.spec.hidden_size)
        for column in range(ids.shape[1]):
            output = output + contributions[:, column]
        shared_expert = self.layers[layer].shared
        if shared_expert is not None and bool(shared.any()):
            output[shared] += _expert(_rows(tokens, shared.nonzero().flatten()), shared_expert)
        return output


def quantized(forward: Forward) -> Quantized:
    """Return the tokens of a forward as the ranks quantize them: one scale a token."""
    if forward.scales is None:
        return w4afp8.quantize_tokens(forward.hidden, "token")[0]
    return w4afp8.requantize(Quantized(forward.hidden, _columns(forward.scales)), "token")


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error against `expected`."""
    exact = expected.double()
    return float((output.double() - exact).norm() / exact.norm())


def _expert(rows: Quantized, expert: ExpertWeights | SharedExpert) -> Tensor:
    hidden = portable.silu_mul(portable.gemm(rows, expert.gate), portable.gemm(rows, expert.up))
    return portable.gemm(quantize_intermediate(hidden, "token"), expert.down)


def _columns(scales: Tensor) -> Tensor:
    return scales.unsqueeze(1) if scales.ndim == 1 else scales


def _rows(tokens: Quantized, index: Tensor) -> Quantized:
    values = tokens.values.view(torch.uint8)[index].view(torch.float8_e4m3fn)
    return Quantized(values, tokens.scales[index])


def _joined(parts: list[Quantized]) -> Quantized:
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return Quantized(values, torch.cat([part.scales for part in parts]))
