"""What both backends refuse, and in which words."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from w4afp8 import Fp8BlockWeight, Int4Weight, Quantized, portable, quantize_int4, quantize_tokens, reference

BACKENDS = pytest.mark.parametrize("backend", [portable, reference], ids=["portable", "reference"])
X = quantize_tokens(torch.ones(4, 256), "token")[0]
WEIGHT = quantize_int4(torch.ones(8, 256))


@BACKENDS
@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (quantize_tokens(torch.ones(4, 128), "token")[0], WEIGHT, "x: expected K = 256 channels.*got 128"),
        (Quantized(X.values.float(), X.scales), WEIGHT, "values: expected float8_e4m3fn"),
        (Quantized(X.values, X.scales[:3]), WEIGHT, r"scales: expected \[4, 1\] or \[4, 2\]"),
        (X, Int4Weight(WEIGHT.codes.float(), WEIGHT.scales), "codes: expected int8"),
        (X, Int4Weight(WEIGHT.codes, WEIGHT.scales.half()), "weight scales: expected float32"),
        (X, Int4Weight(WEIGHT.codes, torch.ones(8, 3)), "a divisor of K = 256"),
        (X, Int4Weight(WEIGHT.codes, torch.ones(8, 1)), "groups of 2 to 128 inputs that divide 128, got groups of 256"),
        (X, Fp8BlockWeight(torch.ones(8, 256).to(torch.float8_e4m3fn), torch.ones(2, 2)), r"with scales \[1, 2\]"),
    ],
)
def test_gemm_names_what_does_not_fit(
    backend: ModuleType, x: Quantized, weight: Int4Weight | Fp8BlockWeight, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        backend.gemm(x, weight)


@BACKENDS
@pytest.mark.parametrize(
    ("offsets", "weights", "row_weights", "message"),
    [
        (torch.tensor([0, 4]), [], None, "weights: expected at least one"),
        (torch.tensor([0, 4]), [WEIGHT] * 2, None, r"offsets: expected int64 \[3\]"),
        (torch.tensor([0, 2, 4], dtype=torch.int32), [WEIGHT] * 2, None, "offsets: expected int64"),
        (torch.tensor([0, 2, 3]), [WEIGHT] * 2, None, "from 0 to 4 rows"),
        (torch.tensor([1, 2, 4]), [WEIGHT] * 2, None, "from 0 to 4 rows"),
        (torch.tensor([0, 5, 4]), [WEIGHT] * 2, None, "ascending"),
        (torch.tensor([0, 2, 4]), [WEIGHT, quantize_int4(torch.ones(9, 256))], None, "one shape"),
        (torch.tensor([0, 2, 4]), [WEIGHT] * 2, torch.ones(3), r"row_weights: expected float32 \[4\]"),
        (torch.tensor([0, 2, 4]), [WEIGHT] * 2, torch.ones(4).double(), "row_weights: expected float32"),
    ],
)
def test_grouped_gemm_names_what_does_not_fit(
    backend: ModuleType,
    offsets: torch.Tensor,
    weights: list[Int4Weight],
    row_weights: torch.Tensor | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        backend.grouped_gemm(X, offsets, weights, row_weights)
