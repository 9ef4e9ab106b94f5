"""A front end's memory for tests: tensors laid into a slab where a request body might have them."""

from __future__ import annotations

import torch

from moe_forward.slab import Slab
from moe_forward.slab_rows import attach
from moe_forward.types import DType, TensorRef

TORCH = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.I32: torch.int32,
    DType.I64: torch.int64,
}


class Desk:
    """A slab to lay tensors into, one after the other, at odd addresses."""

    def __init__(self, nbytes: int = 8 << 20) -> None:
        self.slab = Slab(nbytes)
        self.memory = attach(self.slab.fd, self.slab.nbytes, torch.device("cpu"))
        self._end = 1

    def put(self, tensor: torch.Tensor, dtype: DType) -> TensorRef:
        ref = self.reserve(len(tensor), tensor.shape[1], dtype)
        data = tensor.to(TORCH[dtype]).contiguous().view(torch.uint8).flatten()
        self.memory[ref.offset : ref.offset + len(data)] = data
        return ref

    def reserve(self, rows: int, columns: int, dtype: DType) -> TensorRef:
        ref = TensorRef(self._end, dtype, columns)
        self._end += rows * columns * dtype.itemsize
        self._end += 1 - self._end % 2  # stay odd
        assert self._end <= self.slab.nbytes, f"a slab of {self.slab.nbytes} bytes is too small for this test"
        return ref

    def bytes(self, ref: TensorRef, rows: int) -> torch.Tensor:
        """The memory itself, [bytes] uint8."""
        return self.memory[ref.offset : ref.offset + rows * ref.columns * ref.dtype.itemsize]

    def get(self, ref: TensorRef, rows: int) -> torch.Tensor:
        data = self.slab.view(ref.offset, rows * ref.columns * ref.dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=TORCH[ref.dtype]).view(rows, ref.columns)
