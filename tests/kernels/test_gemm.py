"""What grouped_gemm and quantize_tokens_cuda refuse; the numbers are in test_gemm_gpu.py and test_quantize_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w4afp8 import Quantized, quantize_int4, quantize_tokens
from w4afp8.gemm import grouped_gemm
from w4afp8.packed import PackedWeight, pack
from w4afp8.quantize import quantize_tokens_cuda

ROWS, N, K, EXPERTS = 6, 64, 256, 3


def tokens(rows: int = ROWS, channels: int = K) -> Quantized:
    return quantize_tokens(torch.ones(rows, channels), "token")[0]


def packed(n: int = N, experts: int = EXPERTS) -> PackedWeight:
    return pack([quantize_int4(torch.ones(n, K))] * experts)


OFFSETS = torch.tensor([0, 1, 2, 6])
COUNTS = torch.tensor([1, 0, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": tokens(channels=128)}, "x: expected K = 256 channels"),
        ({"x": Quantized(tokens().values, torch.ones(ROWS, 3))}, "scales: expected"),
        ({"offsets": OFFSETS.int()}, r"offsets: expected torch.int64 \[4\], got torch.int32"),
        ({"offsets": OFFSETS[1:]}, r"offsets: expected torch.int64 \[4\], got torch.int64 \[3\]"),
        ({"offsets": None}, r"expected offsets, or counts and max_rows, got \[\]"),
        ({"counts": COUNTS, "max_rows": 2}, r"got \['offsets', 'counts', 'max_rows'\]"),
        ({"offsets": None, "counts": COUNTS}, r"got \['counts'\]"),
        ({"offsets": None, "counts": COUNTS.long(), "max_rows": 2}, "counts: expected torch.int32"),
        ({"offsets": None, "counts": COUNTS, "max_rows": 3}, "max_rows: expected 1 to 6 rows / 3 experts, got 3"),
        ({"row_weights": torch.ones(ROWS, 1)}, r"row_weights: expected torch.float32 \[6\]"),
        ({"row_weights": torch.ones(ROWS), "epilogue": "swiglu"}, "no row_weights"),
        ({"epilogue": "relu"}, "epilogue: expected plain or swiglu, got 'relu'"),
        ({"epilogue": "swiglu", "out_dtype": torch.bfloat16}, "out_dtype: expected one of .*float32.* got"),
        ({"out_dtype": torch.float16}, "out_dtype: expected one of"),
        ({"out": torch.empty(ROWS, N - 8, dtype=torch.bfloat16)}, r"out: expected torch.bfloat16 \[6, 64\]"),
        ({"out": torch.empty(ROWS, N), "epilogue": "swiglu"}, r"out: expected torch.float32 \[6, 32\]"),
        ({"weight": packed(n=20)}, "N in multiples of 8"),
        ({"weight": packed(n=24), "epilogue": "swiglu"}, "N in multiples of 16"),
        ({"expected_rows": 0}, "expected_rows: expected at least 1"),
        ({}, "x values: expected a CUDA tensor, got one on cpu"),
    ],
)
def test_grouped_gemm_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": tokens(), "weight": packed(), "offsets": OFFSETS} | change
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 12)}, "multiple of 8"),
        ({"x": torch.ones(8)}, r"\[T, K\]"),
        ({"x": torch.ones(2, 256, dtype=torch.float64)}, "got torch.float64"),
        ({"x": torch.ones(2, 136), "granularity": "token_group"}, "multiples of 128"),
        ({"granularity": "tensor"}, "expected token or token_group"),
        ({"num_rows": torch.tensor(1, dtype=torch.int32)}, "num_rows: expected one int64"),
        ({"num_rows": torch.tensor([1, 2])}, "num_rows: expected one int64"),
        ({"out": quantize_tokens(torch.ones(3, 256), "token")}, r"out values: expected torch.float8_e4m3fn \[2, 256\]"),
        ({"out": quantize_tokens(torch.ones(2, 256), "token_group")}, r"out scales: expected torch.float32 \[2, 1\]"),
        ({}, "x: expected a CUDA tensor, got one on cpu"),
    ],
)
def test_quantize_tokens_cuda_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 256), "granularity": "token"} | change
    with pytest.raises(ValueError, match=message):
        quantize_tokens_cuda(**arguments)
