"""Load a rank's part of a checkpoint: memory-mapped, so that only what it holds is ever read.

What is not served as the file has it is made on the way, expert by expert, and then held in memory of this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_forward.checkpoint.compressed_tensors import clear_unscaled, decode
from moe_forward.checkpoint.convert import Scales, quantize_matrix
from moe_forward.checkpoint.expected import layer_tensors
from moe_forward.checkpoint.index import TensorInfo, open_index
from moe_forward.checkpoint.mapped import MappedFiles, read_ahead
from moe_forward.checkpoint.matrices import Gate, LayerTensors, Matrix
from moe_forward.checkpoint.shards import available_cores
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec
from w4afp8 import ExpertWeights, Fp8BlockWeight, Int4Weight, SharedExpert

log = logging.getLogger(__name__)

MAX_READERS = 16  # more readers than this wait for each other at the file system
MEMORY_FILE = Path("/proc/meminfo")


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


def load_shard(
    folder: Path,
    spec: ModelSpec,
    layers: Sequence[int],
    experts: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
    read: bool = True,
    on_load_scales: Scales = "rtn",
) -> dict[int, LayerWeights]:
    """Load the experts of one rank, with the routers and shared experts, which every rank holds.

    folder: of a format that `checkpoint.layout` or `checkpoint.compressed_tensors` tells of, or not quantized, or fp8
        in blocks: what is not int4 yet is quantized here as `quantize` does it, and said so in the log.
    layers: ids to load. experts: ids this rank holds, ascending.
    on_progress: called in this thread with (bytes done, bytes in total) of what is read here.
    read: have the experts' pages read and check their scales. Without, experts that need no quantization are only
        mapped, for somebody who brings them elsewhere and checks them there: a GPU's memory may be larger than the
        host's, which would read twice. Those of compressed-tensors then stay as they are, for
        `compressed_tensors.decode`.
    on_load_scales: of what is quantized here, as `quantize` takes them.
    Returns: layer id -> weights on the CPU. They may be views of the mapped files; do not write to them.
    Raises: CheckpointError naming the tensor that is missing, damaged or of a format that cannot be served exactly, or
        with the numbers where what is made on the way exceeds the memory there is.
    """
    index = open_index(folder)
    plans = {layer: layer_tensors(index, spec, layer, experts) for layer in layers}
    _tell_of_quantization(folder, plans)
    _require_memory(folder, plans, read)
    files = MappedFiles(tensor.file for plan in plans.values() for tensor in plan.tensors())
    loaded: dict[tuple[int, int], ExpertWeights] = {}
    waiting: dict[tuple[int, int], tuple[Matrix, ...]] = {}
    for layer, plan in plans.items():
        for number, matrices in enumerate(plan.experts):
            if read or _is_quantized_here(matrices):
                waiting[layer, number] = matrices
            else:
                loaded[layer, number] = _mapped(files, matrices)
    total_bytes = sum(_read_bytes(matrices) for matrices in waiting.values())
    done_bytes = 0
    if read:
        done_bytes = sum(_read_bytes(plan.shared) + _size_bytes(plan.gate.tensors) for plan in plans.values())
        total_bytes += done_bytes
    with _readers() as pool:
        shared = {layer: pool.submit(_shared, files, plan.shared, read) for layer, plan in plans.items()}
        gates = {layer: _gate(files, plan.gate) for layer, plan in plans.items()}
        futures = {pool.submit(_expert, files, matrices, on_load_scales): place for place, matrices in waiting.items()}
        for future in as_completed(futures):
            place = futures[future]
            loaded[place] = future.result()
            done_bytes += _read_bytes(waiting[place])
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
        others = {layer: (shared[layer].result(), *gates[layer]) for layer in plans}
    if on_progress is not None and read and not futures:
        on_progress(done_bytes, total_bytes)
    return {
        layer: LayerWeights(tuple(loaded[layer, number] for number in range(len(plan.experts))), *others[layer])
        for layer, plan in plans.items()
    }


@contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """Start threads that read and quantize; torch would start a team of its own in each of them."""
    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(MAX_READERS, available_cores()), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)  # the readers' setting is the default of later threads


def _tell_of_quantization(folder: Path, plans: Mapping[int, LayerTensors]) -> None:
    """Write a log line where weights are quantized as they are loaded."""
    routed = [expert for plan in plans.values() for expert in plan.experts if _is_quantized_here(expert)]
    shared = [plan.shared for plan in plans.values() if _is_quantized_here(plan.shared)]
    if routed:
        log.warning(
            "%s: quantizing %d routed experts from %s to int4, now and at every start; `moe-forward quantize` does it "
            "once and for all",
            folder,
            len(routed),
            routed[0][0].values.dtype,
        )
    if shared:
        log.warning("%s: quantizing %d shared experts from %s to fp8", folder, len(shared), shared[0][0].values.dtype)


def _require_memory(folder: Path, plans: Mapping[int, LayerTensors], read: bool) -> None:
    """Refuse what has to be made in memory and does not fit: the kernel would end the process without a word."""
    made = ("int4", "fp8", "decode") if read else ("int4", "fp8")
    needed_bytes = sum(m.held_bytes for plan in plans.values() for m in plan.matrices() if m.to in made)
    if needed_bytes > (available_bytes := _available_bytes()):
        raise CheckpointError(
            f"{folder}: what is made of it while it is loaded takes {needed_bytes} bytes, and {available_bytes} are "
            "available; run `moe-forward quantize` first, and serve its result, or serve fewer layers, or on more ranks"
        )


def _available_bytes() -> int:
    for line in MEMORY_FILE.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise CheckpointError(f"{MEMORY_FILE} does not tell MemAvailable")


def _is_quantized_here(matrices: tuple[Matrix, ...]) -> bool:
    return any(matrix.to in ("int4", "fp8") for matrix in matrices)


def _read_bytes(matrices: Iterable[Matrix]) -> int:
    return sum(matrix.read_bytes for matrix in matrices)


def _size_bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)


def _mapped(files: MappedFiles, matrices: tuple[Matrix, ...]) -> ExpertWeights:
    """View an expert as the file has it."""
    return ExpertWeights(*(Int4Weight(*(files.tensor(info) for info in matrix.tensors)) for matrix in matrices))


def _expert(files: MappedFiles, matrices: tuple[Matrix, ...], on_load_scales: Scales) -> ExpertWeights:
    return ExpertWeights(*(_int4(files, matrix, on_load_scales) for matrix in matrices))


def _int4(files: MappedFiles, matrix: Matrix, on_load_scales: Scales) -> Int4Weight:
    if matrix.part is None:
        read_ahead(matrix.values)
    if matrix.to == "int4":
        source = (matrix.values, matrix.scales, matrix.part)
        return Int4Weight(*quantize_matrix(files, "int4", *source, int4_scales=on_load_scales))
    values, scales = matrix.tensors
    weight = Int4Weight(files.tensor(values), _scales(files, scales))
    # TensorRT-LLM's writer divides by the zero scale of an all-zero group: its codes are undefined there
    return decode(weight) if matrix.to == "decode" else clear_unscaled(weight)


def _scales(files: MappedFiles, info: TensorInfo) -> torch.Tensor:
    scales = files.tensor(info)
    if scales.numel() and not (scales.min() >= 0 and scales.max() < torch.inf):  # false for NaN too
        raise CheckpointError(f"{info}: scales must be finite and not negative")
    return scales


def _shared(files: MappedFiles, matrices: tuple[Matrix, ...], read: bool) -> SharedExpert | None:
    """Load a shared expert; where it is not read, its scales are not checked."""
    if not matrices:
        return None
    return SharedExpert(*(_fp8(files, matrix, read) for matrix in matrices))


def _fp8(files: MappedFiles, matrix: Matrix, read: bool) -> Fp8BlockWeight:
    if matrix.to == "fp8":
        return Fp8BlockWeight(*quantize_matrix(files, "fp8", matrix.values, None, None))
    values, scales = matrix.tensors
    return Fp8BlockWeight(files.tensor(values), _scales(files, scales) if read else files.tensor(scales))


def _gate(files: MappedFiles, gate: Gate) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _finite(files, gate.weight), None if gate.bias is None else _finite(files, gate.bias)


def _finite(files: MappedFiles, info: TensorInfo) -> torch.Tensor:
    tensor = files.tensor(info).to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{info}: holds NaN or Inf")
    return tensor
