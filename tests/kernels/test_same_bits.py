"""Quantizing weights gives the same bits on every device: by the operations it consists of, and on a GPU by result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from w4afp8 import Fp8BlockWeight, dequantize_fp8_block, quantize_fp8_block, quantize_int4
from w4afp8.search import search_int4

ROUNDED_ONCE = {"abs", "add", "add_", "div", "mul", "sub", "sub_", "pow", "pow_", "square", "square_"}
"""Elementwise, and IEEE 754 says the result: on CPU and GPU one operation of two float32 or float64 values."""

EXACT = {
    "round", "round_", "clamp", "clamp_", "amax", "min", "max", "all", "any", "isfinite", "nan_to_num_", "eq", "ge",
    "gt", "le", "lt", "ne", "bitwise_and", "bitwise_or", "__lshift__", "__rshift__", "where",
    "masked_fill", "masked_fill_",
}  # fmt: skip
"""No rounding of the device's own: comparisons, choices, integers, and reductions whose order does not matter."""

MOVED = {
    "_to_copy", "_unsafe_view", "alias", "as_strided", "cat", "clone", "constant_pad_nd", "copy_", "detach", "empty",
    "empty_like", "expand", "fill", "full_like", "index", "index_select", "lift_fresh", "new_empty", "permute",
    "_local_scalar_dense", "repeat_interleave", "reshape", "select", "slice", "split", "squeeze", "stack", "t",
    "transpose", "unfold", "unsqueeze", "view",
}  # fmt: skip
"""Values as they were, or converted by rounding to nearest even."""


class Recorded(TorchDispatchMode):
    """Notes the names of operations, and those that divide by a number, which CUDA turns into a multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.divided_by_numbers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name.startswith("div") and not (isinstance(args[1], torch.Tensor) and args[1].ndim):
            self.divided_by_numbers.append(str(func))
        return func(*args, **(kwargs or {}))


def fp8_to_bf16(weight: torch.Tensor) -> list[torch.Tensor]:
    rows, columns = weight.shape
    scales = weight[: rows // 128, : columns // 128].abs()
    return [
        dequantize_fp8_block(Fp8BlockWeight(weight.clamp(-448, 448).to(torch.float8_e4m3fn), scales), torch.bfloat16)
    ]


def searched(weight: torch.Tensor, importance: torch.Tensor | None = None) -> list[torch.Tensor]:
    found = search_int4(weight, importance=importance)
    errors = (found.weight_errors, found.output_errors or ())
    return [*found.weight, *(column for told in errors for column in told if column is not None)]


QUANTIZED: dict[str, Callable[[torch.Tensor], Sequence[torch.Tensor]]] = {
    "rtn": quantize_int4,
    "search": searched,
    "calibrated": lambda weight: searched(weight, weight[0].abs() * (weight[1] > 0)),
    "fp8": quantize_fp8_block,
    "fp8 to bf16": fp8_to_bf16,
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_nothing_is_used_whose_bits_are_a_devices_own(kind: str, generator: torch.Generator) -> None:
    weight = torch.randn(256, 512, generator=generator)
    with Recorded() as recorded:
        QUANTIZED[kind](weight)
    assert recorded.names <= ROUNDED_ONCE | EXACT | MOVED
    assert not recorded.divided_by_numbers


def test_the_record_sees_sums_and_divisions_by_numbers() -> None:
    with Recorded() as recorded:
        torch.ones(4).sum().div(7)
        torch.ones(4) / 7
    assert "sum" in recorded.names
    assert len(recorded.divided_by_numbers) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("scale", [1.0, 1e-37, 1e36, "bf16"])
def test_a_gpu_gives_the_bits_of_the_cpu(kind: str, scale: float | str, generator: torch.Generator) -> None:
    weight = torch.randn(2048, 512, generator=generator)
    weight = weight.bfloat16().float() if scale == "bf16" else weight * scale
    weight[:, :128] = weight[:, :128].sign()  # ties between scales
    weight[7] = 0
    for ours, theirs in zip(QUANTIZED[kind](weight), QUANTIZED[kind](weight.cuda()), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.cpu().view(torch.uint8))
