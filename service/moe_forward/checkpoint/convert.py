"""Carry out one planned conversion: read a tensor from its mapped file, quantize it, hand it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from moe_forward.checkpoint.index import TensorInfo
from moe_forward.checkpoint.layout import BLOCK, GROUP_SIZE
from moe_forward.checkpoint.mapped import MappedFiles
from moe_forward.checkpoint.matrices import Part
from moe_forward.checkpoint.plan import Conversion
from moe_forward.errors import CheckpointError
from w4afp8 import Fp8BlockWeight, dequantize_fp8_block, quantize_fp8_block, quantize_int4

STRIP_ELEMENTS = 1 << 19
"""Elements quantized at a time: float32 temporaries of a strip stay in a core's cache."""


def convert(files: MappedFiles, conversion: Conversion) -> tuple[torch.Tensor, ...]:
    """Make what a conversion promises.

    Returns: tensors in the order of `conversion.entries`.
    Raises: CheckpointError naming the tensor for NaN or Inf in it.
    """
    if conversion.to == "copy":
        return (files.tensor(conversion.source),)
    return quantize_matrix(files, conversion.to, conversion.source, conversion.scales, conversion.part)


def quantize_matrix(
    files: MappedFiles, to: Literal["int4", "fp8"], source: TensorInfo, scales: TensorInfo | None, part: Part | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix, strip by strip.

    to: int4 with group scales, or fp8 with block scales. source, scales: float, or fp8 with block scales.
    part: where `source` is fused.
    Returns: codes or values, and scales, as `quantize_int4` or `quantize_fp8_block` makes them of the whole.
    Raises: CheckpointError naming the tensor for NaN or Inf in it.
    """
    strips: list[tuple[torch.Tensor, torch.Tensor]] = []
    for strip in float_strips(files, source, scales, part):
        try:
            strips.append(quantize_int4(strip, GROUP_SIZE) if to == "int4" else quantize_fp8_block(strip))
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error
    values, made_scales = zip(*strips, strict=True)
    return torch.cat(values), torch.cat(made_scales)


def float_strips(
    files: MappedFiles, source: TensorInfo, scales: TensorInfo | None, part: Part | None
) -> Iterator[torch.Tensor]:
    """Read a matrix strip by strip, as `quantize_matrix` takes it.

    Returns: strips [rows, K] of floats, rows in whole blocks: neither int4 groups nor fp8 blocks cross such a strip, so
        what is made of strips is what would be made of the whole.
    """
    tensor = files.tensor(source)
    if part is not None:
        tensor = tensor[part.expert, part.first : part.last]
    blocks = None if scales is None else files.tensor(scales)
    height = max(BLOCK, STRIP_ELEMENTS // tensor.shape[1] // BLOCK * BLOCK)
    for row in range(0, tensor.shape[0], height):
        strip = tensor[row : row + height]
        if blocks is not None:
            # bf16 in between, as the writer of the published checkpoint does
            within = blocks[row // BLOCK : (row + height) // BLOCK]
            strip = dequantize_fp8_block(Fp8BlockWeight(strip, within), torch.bfloat16)
        yield strip
