"""What the quantization kernels refuse; the numbers are in test_quantize_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w4afp8 import quantize_tokens
from w4afp8.quantize import quantize_tokens_cuda, silu_mul_quantize


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": torch.ones(2, 3, 256)}, r"gate_up: expected a shape \[T, 2 \* I\]"),
        ({"gate_up": torch.ones(2, 8)}, r"I a positive multiple of 8, got \[2, 8\]"),
        ({"gate_up": torch.ones(2, 0)}, r"I a positive multiple of 8, got \[2, 0\]"),
        (
            {"gate_up": torch.ones(2, 256, dtype=torch.float16)},
            "expected bfloat16 or float32, got torch.float16",
        ),
        ({"gate_up": torch.ones(2, 144), "granularity": "token_group"}, "channels in multiples of 128, got 72"),
        ({"granularity": "tensor"}, "granularity: expected token or token_group"),
        ({"layout": "columns"}, "layout: expected halves or interleaved, got 'columns'"),
        ({"overflow": "inf"}, "overflow: expected zero or nan, got 'inf'"),
        ({"num_rows": torch.tensor(2, dtype=torch.int32)}, "num_rows: expected one int64, got torch.int32"),
        (
            {"out": quantize_tokens(torch.ones(2, 256), "token")},
            r"out values: expected .* \[2, 128\], got",
        ),
        ({}, "gate_up: expected a CUDA tensor, got one on cpu"),
    ],
)
def test_silu_mul_quantize_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"gate_up": torch.ones(2, 256), "granularity": "token", "layout": "halves"} | change
    with pytest.raises(ValueError, match=message):
        silu_mul_quantize(**arguments)


def test_quantize_tokens_cuda_refuses_another_overflow() -> None:
    with pytest.raises(ValueError, match="overflow: expected zero or nan, got 'keep'"):
        quantize_tokens_cuda(torch.ones(2, 256), "token", overflow="keep")  # type: ignore[arg-type]
