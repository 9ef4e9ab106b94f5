"""The same layer computed in the test's own process: bit for bit what the service must answer, and in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import w4afp8
from moe_forward import checkpoint, gates
from moe_forward.checkpoint import LayerWeights
from moe_forward.types import ModelSpec
from w4afp8 import ExpertWeights, Quantized, SharedExpert, portable, reference
from w4afp8.activations import quantize_intermediate

from .forwards import Forward


class Local:
    """All experts of a checkpoint in one process. folder: the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.spec: ModelSpec = checkpoint.read_spec(folder)
        every = range(self.spec.num_experts)
        self.layers: dict[int, LayerWeights] = checkpoint.load_shard(folder, self.spec, self.spec.layers, every)

    def outputs(self, forwards: list[Forward]) -> list[Tensor]:
        """Return the output [T, H] of each forward in its reply's type."""
        outputs = self._each_layer(forwards, self._layer)
        return [output.to(forward.output_dtype) for forward, output in zip(forwards, outputs, strict=True)]

    def output(self, forward: Forward) -> Tensor:
        """Return the output [T, H] of one forward in its reply's type."""
        return self.outputs([forward])[0]

    def exacts(self, forwards: list[Forward]) -> list[Tensor]:
        """Return the output [T, H] float64 of the specification; hidden states must be floats."""
        return self._each_layer(forwards, self._exact_layer)

    def exact(self, forward: Forward) -> Tensor:
        """Return the output [T, H] float64 of the specification for one forward."""
        return self.exacts([forward])[0]

    def _each_layer(self, forwards: list[Forward], compute: Callable[[int, list[Forward]], Tensor]) -> list[Tensor]:
        """Compute the forwards of one layer at once: `compute` returns the rows of all of them."""
        results: dict[int, Tensor] = {}
        for layer in self.spec.layers:
            mine = [index for index, forward in enumerate(forwards) if forward.layer == layer]
            if mine:
                rows = compute(layer, [forwards[index] for index in mine])
                results |= dict(
                    zip(mine, torch.split(rows, [len(forwards[index].hidden) for index in mine]), strict=True)
                )
        return [results[index] for index in range(len(forwards))]

    def _exact_layer(self, layer: int, forwards: list[Forward]) -> Tensor:
        held = self.layers[layer]
        hidden = torch.cat([forward.hidden.float() for forward in forwards])
        ids, weights, shared = self._routes(forwards)
        exact = [
            reference.moe_layer(
                hidden[chosen], ids[chosen], weights[chosen], held.experts, expert, "token", torch.float64
            )
            for chosen, expert in ((shared, held.shared), (~shared, None))
        ]
        output = torch.empty(hidden.shape, dtype=torch.float64)
        output[shared], output[~shared] = exact
        return output

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

    def _routes(self, forwards: list[Forward]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and weights of all rows, and which rows [T] bool want the shared expert."""
        ids, weights = (torch.cat(column) for column in zip(*map(self.routes, forwards), strict=True))
        return ids, weights, torch.cat([torch.full((len(part.hidden),), part.shared) for part in forwards])

    def _layer(self, layer: int, forwards: list[Forward]) -> Tensor:
        tokens = _joined([quantized(forward) for forward in forwards])
        ids, weights, shared = self._routes(forwards)
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
