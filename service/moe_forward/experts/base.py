"""What a rank asks of the code that computes its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeVar

import torch

from w4afp8 import ExpertWeights, Granularity, Quantized, SharedExpert
from w4afp8.activations import scale_columns

Held = TypeVar("Held")

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in total) while weights are brought to where they are used."""


class LayerExperts(NamedTuple):
    """One rank's weights of one layer.

    experts: this rank's routed experts, in id order. shared: the layer's shared expert, or None.
    """

    experts: Sequence[ExpertWeights]
    shared: SharedExpert | None


class PhaseClock(Protocol):
    """Times the parts of a step: `with clock("gemm1"): ...`."""

    def __call__(self, phase: str, /) -> AbstractContextManager[None]:
        """Start timing `phase`, one of `moe_forward.types.PHASES`, until the block ends."""
        ...


class Experts(Protocol):
    """The experts of one rank on one device; the same row gives the same bits in any batch.

    capturable: nothing waits for the host and no shape depends on data, so calls can be captured in a CUDA graph.
    """

    capturable: bool

    def quantize(
        self, x: torch.Tensor, out: tuple[Quantized, torch.Tensor] | None = None
    ) -> tuple[Quantized, torch.Tensor]:
        """Quantize tokens in the service's granularity, as `w4afp8.quantize_tokens` does.

        x: [T, H] bfloat16, float16 or float32, contiguous. out: what is returned, to be written; None: new tensors.
        Returns: the tokens, and non_finite [T] bool: tokens with NaN or Inf, which come out as zeros.
        """
        ...

    def pad_routes(
        self, ids: torch.Tensor, weights: torch.Tensor, out_ids: torch.Tensor, out_weights: torch.Tensor
    ) -> None:
        """Write tokens' routes into memory with room for more tokens, which get no expert.

        ids: [T, K] int32 or int64. weights: [T, K] float32.
        out_ids: [P, K] int64, P at least T: gets ids, and -1 in the rows behind. out_weights: [P, K] float32.
        """
        ...

    def forward(
        self,
        layer: int,
        rows: Quantized,
        offsets: torch.Tensor,
        row_weights: torch.Tensor,
        expected_rows: int,
        clock: PhaseClock,
    ) -> torch.Tensor:
        """Pass each row through its expert.

        layer: id of an MoE layer this rank holds.
        rows: [R, H] in the service's granularity, the rows of local expert e at offsets[e] to offsets[e + 1]; what lies
            from offsets[-1] on belongs to no expert, may be any bits and reaches no row of another.
        offsets: [E_local+1] int64 on the rows' device, ascending from 0 to at most R.
        row_weights: [R] float32, routing weights.
        expected_rows: of an expert if tokens spread evenly, at least 1; may change the speed, never the result.
        clock: times the phases gemm1, activation and gemm2.
        Returns: [R, H] float32 on a CPU, bfloat16 on a GPU, times the routing weight; NaN where a row overflowed
            float32 between the GEMMs, undefined from offsets[-1] on.
        Raises: ValueError for a layer this rank does not hold, or arguments that do not fit.
        """
        ...

    def shared(self, layer: int, rows: Quantized) -> torch.Tensor:
        """Pass tokens through the layer's shared expert.

        layer: id of an MoE layer with a shared expert. rows: [T, H] in the service's granularity.
        Returns: [T, H] float32.
        Raises: ValueError for a layer without one, or rows that do not fit.
        """
        ...


def held_layer(layers: Mapping[int, Held], layer: int) -> Held:
    """Return what is held of `layer`. Raises: ValueError for a layer that is not held."""
    found = layers.get(layer)
    if found is None:
        raise ValueError(f"layer: expected one of {sorted(layers)[:70]}, got {layer}")
    return found


def check_granularity(rows: Quantized, granularity: Granularity) -> None:
    """Raise ValueError where the scales of `rows` are of another granularity."""
    expected = scale_columns(rows.values.shape[1], granularity)
    if rows.scales.ndim != 2 or rows.scales.shape[1] != expected:
        raise ValueError(
            f"rows: expected scales [T, {expected}] for granularity {granularity}, got {list(rows.scales.shape)}"
        )
