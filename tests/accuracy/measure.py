"""How good a model is at held-out text, and how far its logits and layers are from another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

import torch
from model import moe_blocks
from torch import Tensor, nn


@dataclass(frozen=True)
class Predictions:
    """What a model says of windows of text. loss: [N] float64, nats a token. log_probabilities: [N, S, V] float32."""

    loss: Tensor
    log_probabilities: Tensor

    def first(self, windows: int) -> Predictions:
        """Return those of the first windows."""
        return Predictions(self.loss[:windows], self.log_probabilities[:windows])


@torch.no_grad()
def predict(model: Any, windows: Tensor, together: int) -> Predictions:
    """Run a model over windows [N, S + 1], some at a time."""
    losses, kept = [], []
    for part in windows.split(together):
        logits = model(part[:, :-1], use_cache=False).logits
        found = torch.log_softmax(logits.float(), dim=-1)
        losses.append(-found.gather(2, part[:, 1:, None]).squeeze(2).double().mean(1))
        kept.append(found)
    return Predictions(torch.cat(losses), torch.cat(kept))


def quality(found: Predictions) -> dict[str, float]:
    """Perplexity of a byte, and bits a byte. Raises: FloatingPointError where a loss is not finite."""
    loss = float(found.loss.mean())
    if not loss < 1e9:
        raise FloatingPointError(f"loss: expected a finite number, got {loss}")
    return {"loss": loss, "perplexity": exp(loss), "bits_per_byte": loss / log(2)}


def difference(found: Predictions, from_: Predictions) -> dict[str, float]:
    """Compare predictions of the same windows.

    Returns: loss_increase, and its standard error, taken over windows; kl, the mean divergence of `found` from
    `from_`, nats; same_choice, how often both hold the same token for the likeliest; logits, the relative Frobenius
    error of the logits, each token's centred.
    """
    increase = found.loss - from_.loss
    divergence, same, error, size = 0.0, 0, 0.0, 0.0
    for ours, theirs in zip(found.log_probabilities, from_.log_probabilities, strict=True):  # one window at a time
        divergence += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        centred = [logits - logits.mean(1, keepdim=True) for logits in (ours, theirs)]
        error += float((centred[0] - centred[1]).square().sum(dtype=torch.float64))
        size += float(centred[1].square().sum(dtype=torch.float64))
    tokens = found.log_probabilities.shape[0] * found.log_probabilities.shape[1]
    return {
        "loss_increase": float(increase.mean()),
        "loss_increase_standard_error": float(increase.std()) / sqrt(len(increase)) if len(increase) > 1 else 0.0,
        "kl": divergence / tokens,
        "same_choice": same / tokens,
        "logits": sqrt(error / size),
    }


@torch.no_grad()
def block_inputs(model: Any, windows: Tensor) -> dict[int, Tensor]:
    """Take what enters each MoE block: layer id -> [T, H]."""
    taken: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: taken.__setitem__(layer, inputs[0].flatten(0, -2))

    with ExitStack() as closing:
        for layer, block in moe_blocks(model).items():
            closing.callback(block.register_forward_pre_hook(keep(layer)).remove)
        model(windows[:, :-1], use_cache=False)
    return taken


@contextmanager
def replaced_blocks(model: Any, blocks: Mapping[int, nn.Module]) -> Any:
    """Put other MoE blocks into a model for a while."""
    own = moe_blocks(model)
    try:
        for layer, block in blocks.items():
            model.model.layers[layer].mlp = block
        yield model
    finally:
        for layer in blocks:
            model.model.layers[layer].mlp = own[layer]


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    exact = expected.double()
    return float((output.double() - exact).norm() / exact.norm())


@torch.no_grad()
def generate(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """Continue prompts [P, S] by the likeliest token each time. Returns: [P, new_tokens] int64."""
    whole = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    return whole[:, prompts.shape[1] :]


def same_texts(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Compare generated tokens [P, N].

    Returns: how many prompts went on the same to the end, out of how many, and the tokens of each until they part.
    """
    together = (ours == theirs).long().cumprod(1).sum(1)
    return {"same": int((together == ours.shape[1]).sum()), "prompts": len(ours), "same_tokens": together.tolist()}
