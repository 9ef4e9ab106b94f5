"""Load a rank's part of a checkpoint: memory-mapped, so that only what it holds is ever read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

from moe_forward.checkpoint.expected import Gate, LayerTensors, Matrix, layer_tensors
from moe_forward.checkpoint.index import TensorInfo, open_index
from moe_forward.checkpoint.shards import available_cores
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec
from w4afp8 import ExpertWeights, Fp8BlockWeight, Int4Weight, SharedExpert

MAX_READERS = 16  # more readers than this wait for each other at the file system


@dataclass(frozen=True)
class LayerWeights:
    """What a rank holds of one MoE layer.

    experts: the rank's routed experts in id order. shared: the shared expert, or None.
    gate_weight: [E, H] float32, router. gate_bias: [E] float32, correction bias, or None.
    """

    experts: tuple[ExpertWeights, ...]
    shared: SharedExpert | None
    gate_weight: torch.Tensor
    gate_bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        experts = (*self.experts, *([self.shared] if self.shared is not None else []))
        matrices = sum(tensor.nbytes for expert in experts for matrix in expert for tensor in matrix)
        return matrices + self.gate_weight.nbytes + (self.gate_bias.nbytes if self.gate_bias is not None else 0)


class MappedFiles:
    """Shards mapped into memory; a tensor keeps its mapping alive by itself."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Map each file once.

        Raises: CheckpointError naming a file that safetensors refuses.
        """
        self._files: Mapping[Path, Any] = MappingProxyType({file: _mapped(file) for file in sorted(set(files))})

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """View a tensor; private to this process, nothing is read before it is touched."""
        tensor: torch.Tensor = self._files[info.file].get_tensor(info.name)
        return tensor


def load_shard(
    folder: Path,
    spec: ModelSpec,
    layers: Sequence[int],
    experts: range,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[int, LayerWeights]:
    """Load the experts of one rank, with the routers and shared experts, which every rank holds.

    folder: in the layout of `checkpoint.layout`. layers: ids to load. experts: ids this rank holds.
    on_progress: called in this thread with (bytes done, bytes in total).
    Returns: layer id -> weights on the CPU. They are views of the mapped files; do not write to them.
    Raises: CheckpointError naming the tensor that is missing, damaged or of a format that cannot be served exactly.
    """
    index = open_index(folder)
    plans = {layer: layer_tensors(index, spec, layer, experts) for layer in layers}
    files = MappedFiles(tensor.file for plan in plans.values() for tensor in plan.all())
    total_bytes = sum(tensor.size_bytes for plan in plans.values() for tensor in plan.all())
    done_bytes = 0
    loaded: dict[tuple[int, int], ExpertWeights] = {}
    others = {layer: (_shared(files, plan.shared), *_gate(files, plan.gate)) for layer, plan in plans.items()}
    done_bytes += sum(_size_bytes(plan._replace(experts=())) for plan in plans.values())
    pool = ThreadPoolExecutor(min(MAX_READERS, available_cores()))
    try:
        futures = {
            pool.submit(_expert, files, matrices): (layer, number, sum(t.size_bytes for m in matrices for t in m))
            for layer, plan in plans.items()
            for number, matrices in enumerate(plan.experts)
        }
        for future in as_completed(futures):
            layer, number, size_bytes = futures[future]
            loaded[layer, number] = future.result()
            done_bytes += size_bytes
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    if on_progress is not None and not futures:
        on_progress(done_bytes, total_bytes)
    return {
        layer: LayerWeights(tuple(loaded[layer, number] for number in range(len(plan.experts))), *others[layer])
        for layer, plan in plans.items()
    }


def _mapped(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except Exception as error:  # the library raises its own type, OSError and others
        raise CheckpointError(f"cannot map {file}: {error}") from error


def _size_bytes(plan: LayerTensors) -> int:
    return sum(tensor.size_bytes for tensor in plan.all())


def _expert(files: MappedFiles, matrices: tuple[Matrix, ...]) -> ExpertWeights:
    return ExpertWeights(*(_int4(files, matrix) for matrix in matrices))


def _int4(files: MappedFiles, matrix: Matrix) -> Int4Weight:
    _read_ahead(matrix.values)
    codes, scales = files.tensor(matrix.values), _scales(files, matrix.scales)
    if bool((scales.numpy() == 0).any()):
        # TensorRT-LLM's writer divides by the zero scale of an all-zero group: its codes are undefined there
        rows, groups = scales.shape
        codes = (codes.view(rows, groups, -1) * (scales != 0).unsqueeze(-1)).view(rows, -1)
    return Int4Weight(codes, scales)


def _scales(files: MappedFiles, info: TensorInfo) -> torch.Tensor:
    scales = files.tensor(info)
    array = scales.numpy()  # numpy stays in this thread, torch would start a team of threads in each reader
    if array.size and not (array.min() >= 0 and array.max() < float("inf")):  # false for NaN too
        raise CheckpointError(f"{info}: scales must be finite and not negative")
    return scales


def _shared(files: MappedFiles, matrices: tuple[Matrix, ...]) -> SharedExpert | None:
    if not matrices:
        return None
    return SharedExpert(*(Fp8BlockWeight(files.tensor(m.values), _scales(files, m.scales)) for m in matrices))


def _gate(files: MappedFiles, gate: Gate) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _finite(files, gate.weight), None if gate.bias is None else _finite(files, gate.bias)


def _finite(files: MappedFiles, info: TensorInfo) -> torch.Tensor:
    tensor = files.tensor(info).to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{info}: holds NaN or Inf")
    return tensor


def _read_ahead(info: TensorInfo) -> None:
    """Ask the kernel to read a tensor now, in parallel with the others, instead of page by page when it is used."""
    handle = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(handle, info.offset, info.size_bytes, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)
