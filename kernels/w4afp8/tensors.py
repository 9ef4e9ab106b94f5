"""The nouns of w4afp8: what quantized activations and weights look like in memory.

`weights` and `activations` say how they are made.

Dimensions everywhere: T tokens, H hidden, I intermediate, E experts, N outputs, K reduction.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Granularity = Literal["token", "token_group"]

ACTIVATION_GROUP = 128
"""Channels that share one activation scale when the granularity is `token_group`."""

FP8_BLOCK = 128
"""Rows and columns that share one scale in a block-scaled fp8 weight."""

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn (OCP 8-bit Floating Point Specification 1.0, table 1)."""


class Quantized(NamedTuple):
    """Activations in fp8: x[t, k] = values[t, k] * scales[t, group of k].

    values: [T, K] float8_e4m3fn.
    scales: [T, 1] (`token`) or [T, K/128] (`token_group`) float32.
    """

    values: torch.Tensor
    scales: torch.Tensor


class Int4Weight(NamedTuple):
    """An int4 weight with a scale per output channel and group of inputs: w[n, k] = q[n, k] * scales[n, k // group].

    codes: [N, K/2] int8, two's complement nibbles, the low nibble holds even k.
    scales: [N, K/group] float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor


class Fp8BlockWeight(NamedTuple):
    """An fp8 weight with a scale per 128 x 128 block: w[n, k] = values[n, k] * scales[n // 128, k // 128].

    values: [N, K] float8_e4m3fn.
    scales: [ceil(N/128), ceil(K/128)] float32.
    """

    values: torch.Tensor
    scales: torch.Tensor


class ExpertWeights(NamedTuple):
    """One routed expert: down(SiLU(gate(x)) * up(x)).

    gate, up: [I, H]. down: [H, I].
    """

    gate: Int4Weight
    up: Int4Weight
    down: Int4Weight


class SharedExpert(NamedTuple):
    """The expert that every token of a layer passes, kept in fp8.

    gate, up: [I, H]. down: [H, I].
    """

    gate: Fp8BlockWeight
    up: Fp8BlockWeight
    down: Fp8BlockWeight
