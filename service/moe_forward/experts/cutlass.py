"""Experts on Hopper GPUs: the grouped GEMM and the quantization of `w4afp8`'s kernel library."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_forward.errors import StartError
from moe_forward.experts.base import LayerExperts, PhaseClock, Progress, check_granularity, held_layer
from moe_forward.experts.packing import pack_layers
from w4afp8 import Granularity, Quantized
from w4afp8.gemm import grouped_gemm
from w4afp8.library import LibraryMismatch, LibraryNotBuilt, load
from w4afp8.quantize import quantize_tokens_cuda
from w4afp8.routes import pad_routes_cuda

CAPABILITY = (9, 0)
BUSY = 2  # rows of a busy expert over those of an average one, by which the kernel chooses its tile


class CutlassExperts:
    """Computes a rank's experts with the sm_90a kernels; nothing waits for the GPU once it is made.

    Rows that belong to no expert lie in memory that nobody has written, where any bits may be, NaN too. They come no
    further: in the tensor core each token has a column of its own, so what a tile reads beyond its tokens ends in
    columns that are not stored; token scales are read, rows quantized and results written for live rows only.

    layers: layer id -> this rank's weights, on the CPU (mapped from files) or the GPU. They are packed here, layer by
        layer; the plain ones are not kept.
    granularity: of the activation scales, on the way in and between the GEMMs.
    device: the GPU, with its index. on_progress: told of the bytes brought over.
    """

    capturable = True

    def __init__(
        self,
        layers: Mapping[int, LayerExperts],
        granularity: Granularity,
        device: torch.device,
        on_progress: Progress | None = None,
    ) -> None:
        self._layers = pack_layers(layers, device, on_progress)
        self._granularity = granularity

    def quantize(
        self, x: torch.Tensor, out: tuple[Quantized, torch.Tensor] | None = None
    ) -> tuple[Quantized, torch.Tensor]:
        """See `Experts.quantize`."""
        return quantize_tokens_cuda(x, self._granularity, out=out)

    def pad_routes(
        self, ids: torch.Tensor, weights: torch.Tensor, out_ids: torch.Tensor, out_weights: torch.Tensor
    ) -> None:
        """See `Experts.pad_routes`."""
        pad_routes_cuda(ids, weights, out_ids, out_weights)

    def forward(
        self,
        layer: int,
        rows: Quantized,
        offsets: torch.Tensor,
        row_weights: torch.Tensor,
        expected_rows: int,
        clock: PhaseClock,
    ) -> torch.Tensor:
        """See `Experts.forward`."""
        experts = held_layer(self._layers, layer).routed
        check_granularity(rows, self._granularity)
        if experts is None or rows.values.shape[0] == 0:
            return torch.empty(rows.values.shape, dtype=torch.bfloat16, device=rows.values.device)
        busy_rows = BUSY * expected_rows
        with clock("gemm1"):
            activated = grouped_gemm(rows, experts.gate_up, offsets, epilogue="swiglu", expected_rows=busy_rows)
        with clock("activation"):
            hidden, _ = quantize_tokens_cuda(activated, self._granularity, num_rows=offsets[-1:], overflow="nan")
        with clock("gemm2"):
            return grouped_gemm(
                hidden,
                experts.down,
                offsets,
                row_weights=row_weights,
                out_dtype=torch.bfloat16,
                expected_rows=busy_rows,
                early_start=True,
            )

    def shared(self, layer: int, rows: Quantized) -> torch.Tensor:
        """See `Experts.shared`."""
        expert = held_layer(self._layers, layer).shared
        if expert is None:
            raise ValueError(f"layer: {layer} has no shared expert")
        check_granularity(rows, self._granularity)
        tokens, channels = rows.values.shape
        device = rows.values.device
        if tokens == 0:
            return torch.empty(0, channels, dtype=torch.float32, device=device)
        offsets = torch.arange(0, tokens + 1, tokens, device=device)  # [0, tokens], made on the GPU
        activated = grouped_gemm(rows, expert.gate_up, offsets, epilogue="swiglu", expected_rows=tokens)
        hidden, _ = quantize_tokens_cuda(activated, self._granularity, overflow="nan")
        return grouped_gemm(
            hidden, expert.down, offsets, out_dtype=torch.float32, expected_rows=tokens, early_start=True
        )


def check_start(device: torch.device) -> None:
    """Check that the kernels can run on a device.

    Raises: StartError saying what is missing: a GPU of compute capability 9.0, or the library for it.
    """
    if device.type != "cuda":
        raise StartError(f"experts cutlass: needs a GPU, the device is {device}; set experts: reference")
    if not torch.cuda.is_available():
        raise StartError("experts cutlass: no CUDA GPU is visible; set experts: reference and device: cpu")
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        raise StartError(
            f"experts cutlass: needs a GPU of compute capability 9.0 (H100, H200), {device} is a "
            f"{torch.cuda.get_device_name(device)} of {found[0]}.{found[1]}; set experts: reference"
        )
    try:
        load()
    except (LibraryNotBuilt, LibraryMismatch) as error:
        raise StartError(f"experts cutlass: {error}") from error
