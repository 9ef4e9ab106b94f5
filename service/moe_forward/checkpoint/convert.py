"""Carry out one planned conversion: read a tensor from its mapped file, quantize it, hand it on."""

from __future__ import annotations

import torch

from moe_forward.checkpoint.layout import BLOCK, GROUP_SIZE
from moe_forward.checkpoint.load import MappedFiles
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
    tensor = files.tensor(conversion.source)
    if conversion.to == "copy":
        return (tensor,)
    if conversion.expert is not None and conversion.rows is not None:
        first, last = conversion.rows
        tensor = tensor[conversion.expert, first:last]
    scales = None if conversion.scales is None else files.tensor(conversion.scales)
    # Rows in whole blocks: neither int4 groups nor fp8 blocks cross such a strip, so the result is that of the whole.
    height = max(BLOCK, STRIP_ELEMENTS // tensor.shape[1] // BLOCK * BLOCK)
    strips: list[tuple[torch.Tensor, ...]] = []
    for row in range(0, tensor.shape[0], height):
        strip = tensor[row : row + height]
        if scales is not None:
            blocks = scales[row // BLOCK : (row + height) // BLOCK]
            # bf16 in between, as the writer of the published checkpoint does
            strip = dequantize_fp8_block(Fp8BlockWeight(strip, blocks), torch.bfloat16)
        try:
            strips.append(quantize_int4(strip, GROUP_SIZE) if conversion.to == "int4" else quantize_fp8_block(strip))
        except ValueError as error:
            raise CheckpointError(f"{conversion.source}: {error}") from error
    return tuple(torch.cat(parts) for parts in zip(*strips, strict=True))
