"""What requests are of: sizes by weight, layers in turn or at random."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

LayerOrder = Literal["round-robin", "random"]

Mix = tuple[tuple[int, float], ...]
"""(rows of a request, share of such requests), shares adding up to 1."""


class Draw(NamedTuple):
    """One request to be. variant: a number that chooses among the prepared inputs of this size."""

    tokens: int
    layer: int
    variant: int


def parse_mix(text: str) -> Mix:
    """Read `TOKENS:WEIGHT,...`. Raises: ValueError with what was expected."""
    expected = f"mix must be TOKENS:WEIGHT,... with positive numbers, like 1:70,64:25,2048:5, got {text!r}"
    weights: dict[int, float] = {}
    for part in text.split(","):
        size, colon, weight = part.partition(":")
        try:
            tokens, share = int(size), float(weight)
        except ValueError:
            raise ValueError(expected) from None
        if not colon or tokens < 1 or not (share > 0 and math.isfinite(share)) or tokens in weights:
            raise ValueError(expected)
        weights[tokens] = share
    total = sum(weights.values())
    return tuple((tokens, weight / total) for tokens, weight in sorted(weights.items()))


def parse_layers(text: str, served: Sequence[int], model: str) -> tuple[int, ...]:
    """Read `all`, or layers and ranges of them like `3,5,7-9`.

    Raises: ValueError for anything else, and for a layer that the model does not serve.
    """
    if text == "all":
        return tuple(served)
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            layers.extend(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise ValueError(f"layers must be 'all' or like 3,5,7-9, got {text!r}") from None
    if not layers or not set(layers) <= set(served):
        raise ValueError(f"layers must be some that {model} serves, {list(served)}, got {text}")
    return tuple(dict.fromkeys(layers))


def draws(mix: Mix, layers: Sequence[int], order: LayerOrder, seed: int, first: int = 0) -> Iterator[Draw]:
    """Yield requests for ever; the same ones for the same arguments.

    first: where round robin starts, so that several processes do not go in step.
    """
    chance = random.Random(seed)
    sizes = [tokens for tokens, _ in mix]
    bounds = list(itertools.accumulate(share for _, share in mix))
    for number in itertools.count(first):
        tokens = sizes[0] if len(sizes) == 1 else chance.choices(sizes, cum_weights=bounds)[0]
        layer = layers[number % len(layers)] if order == "round-robin" else chance.choice(layers)
        yield Draw(tokens, layer, number)
