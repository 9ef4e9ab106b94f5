"""w4afp8: MoE GEMMs with int4 weights and fp8 activations.

`w4afp8.tensors` says how tensors are stored, `w4afp8.reference` what is computed, `w4afp8.portable` computes it on any
device with bits that do not depend on the batch.
"""

from __future__ import annotations

from w4afp8.activations import check_quantized, dequantize_tokens, quantize_tokens, requantize, zero_rows
from w4afp8.tensors import ExpertWeights, Fp8BlockWeight, Granularity, Int4Weight, Quantized, SharedExpert
from w4afp8.weights import (
    dequantize_fp8_block,
    dequantize_int4,
    pack_int4,
    quantize_fp8_block,
    quantize_int4,
    unpack_int4,
)

__all__ = [
    "ExpertWeights",
    "Fp8BlockWeight",
    "Granularity",
    "Int4Weight",
    "Quantized",
    "SharedExpert",
    "check_quantized",
    "dequantize_fp8_block",
    "dequantize_int4",
    "dequantize_tokens",
    "pack_int4",
    "quantize_fp8_block",
    "quantize_int4",
    "quantize_tokens",
    "requantize",
    "unpack_int4",
    "zero_rows",
]
