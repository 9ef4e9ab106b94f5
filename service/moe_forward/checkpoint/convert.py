"""Carry out one planned conversion: read a tensor from its mapped file, quantize it, hand it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from moe_forward.checkpoint.device import CPU, Device
from moe_forward.checkpoint.index import TensorInfo
from moe_forward.checkpoint.layout import BLOCK, GROUP_SIZE
from moe_forward.checkpoint.mapped import MappedFiles
from moe_forward.checkpoint.matrices import Part
from moe_forward.checkpoint.plan import Conversion
from moe_forward.errors import CheckpointError
from w4afp8 import Fp8BlockWeight, dequantize_fp8_block, quantize_fp8_block, quantize_int4
from w4afp8.search import search_int4

Scales = Literal["rtn", "search"]
"""Of int4: `rtn` rounds to nearest with scale amax / 7, `search` takes the scale of least squared error."""


def convert(files: MappedFiles, device: Device, conversion: Conversion) -> tuple[torch.Tensor, ...]:
    """Make what a conversion promises.

    Returns: tensors on the CPU, in the order of `conversion.entries`.
    Raises: CheckpointError naming the tensor for NaN or Inf in it.
    """
    if conversion.to == "copy":
        return (files.tensor(conversion.source),)
    return quantize_matrix(files, conversion.to, conversion.source, conversion.scales, conversion.part, device)


def quantize_matrix(
    files: MappedFiles,
    to: Literal["int4", "fp8"],
    source: TensorInfo,
    scales: TensorInfo | None,
    part: Part | None,
    device: Device = CPU,
    int4_scales: Scales = "rtn",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix, strip by strip.

    to: int4 with group scales, or fp8 with block scales. source, scales: float, or fp8 with block scales.
    part: where `source` is fused. device: where to quantize. int4_scales: how they are found, without calibration.
    Returns: codes or values, and scales, on the CPU, as `quantize_int4` or `quantize_fp8_block` makes them of the
        whole.
    Raises: CheckpointError naming the tensor for NaN or Inf in it.
    """
    strips: list[tuple[torch.Tensor, torch.Tensor]] = []
    with device.lane():
        for strip in float_strips(files, source, scales, part, device):
            try:
                if to == "fp8":
                    strips.append(quantize_fp8_block(strip))
                elif int4_scales == "search":
                    strips.append(search_int4(strip, GROUP_SIZE).weight)
                else:
                    strips.append(quantize_int4(strip, GROUP_SIZE))
            except ValueError as error:
                raise CheckpointError(f"{source}: {error}") from error
        values, made_scales = zip(*strips, strict=True)
        joined = torch.cat([strip.view(torch.int8) for strip in values]).view(values[0].dtype)
        return device.download(joined), device.download(torch.cat(made_scales))


def float_strips(
    files: MappedFiles, source: TensorInfo, scales: TensorInfo | None, part: Part | None, device: Device
) -> Iterator[torch.Tensor]:
    """Read a matrix strip by strip, as `quantize_matrix` takes it, inside a lane of the device.

    Returns: strips [rows, K] of floats on the device, rows in whole blocks: neither int4 groups nor fp8 blocks cross
        such a strip, so what is made of strips is what would be made of the whole.
    """
    tensor = files.tensor(source)
    if part is not None:
        tensor = tensor[part.expert, part.first : part.last]
    blocks = None if scales is None else device.upload(files.tensor(scales))
    height = max(BLOCK, device.strip_elements // tensor.shape[1] // BLOCK * BLOCK)
    for row in range(0, tensor.shape[0], height):
        strip = device.upload(tensor[row : row + height])
        if blocks is not None:
            # bf16 in between, as the writer of the published checkpoint does
            within = blocks[row // BLOCK : (row + height) // BLOCK]
            strip = dequantize_fp8_block(Fp8BlockWeight(strip, within), torch.bfloat16)
        yield strip
