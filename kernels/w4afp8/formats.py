"""The formats of w4afp8 in one place: the nouns, int4 and fp8 weights, fp8 activations."""

from __future__ import annotations

from w4afp8.activations import (
    check_quantized,
    dequantize_tokens,
    quantize_intermediate,
    quantize_tokens,
    requantize,
    scale_columns,
    zero_rows,
)
from w4afp8.tensors import (
    ACTIVATION_GROUP,
    FP8_BLOCK,
    FP8_MAX,
    ExpertWeights,
    Fp8BlockWeight,
    Granularity,
    Int4Weight,
    Quantized,
    SharedExpert,
)
from w4afp8.weights import (
    dequantize_fp8_block,
    dequantize_int4,
    pack_int4,
    quantize_fp8_block,
    quantize_int4,
    unpack_int4,
)

__all__ = [
    "ACTIVATION_GROUP",
    "FP8_BLOCK",
    "FP8_MAX",
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
    "quantize_intermediate",
    "quantize_tokens",
    "requantize",
    "scale_columns",
    "unpack_int4",
    "zero_rows",
]
