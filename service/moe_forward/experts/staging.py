"""Weights from memory-mapped files to a GPU, at the speed of the disk.

Each of some reader threads takes a tensor, asks the kernel for all of its pages at once, copies them piece by piece
into pinned memory of its own and sends them on by a stream of its own. While one waits for the disk, others copy, and
the GPU works on what has come. Only some tensors are on their way at a time, so neither the host nor the GPU holds more
than that beside what the caller keeps.

Measured on two cores with a disk of 0.3 to 1.1 GB/s for `cat`: 1.1 to 1.6 GB/s from the disk with 4 or 8 readers, which
is what `pread` into the same buffers gave; 12 GB/s from the page cache, where `cat` gave 9.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import queue
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from moe_forward.checkpoint.compressed_tensors import clear_unscaled, decode
from moe_forward.errors import CheckpointError
from moe_forward.experts.base import LayerExperts, Progress
from w4afp8 import ExpertWeights, Fp8BlockWeight, Int4Weight, SharedExpert

PIECE_BYTES = 4 << 20  # pinned memory of a reader: small beside a tensor, large beside the cost of starting a copy
MIN_READERS, MAX_READERS = 4, 16  # some wait for the disk even on one core; more wait for each other in the file system
TENSORS_AHEAD = 4  # for each reader: codes and scales of two matrices
PROJECTIONS = ExpertWeights._fields

AnyWeight = TypeVar("AnyWeight", Int4Weight, Fp8BlockWeight)


def bring_layers(
    layers: Mapping[int, LayerExperts], device: torch.device, on_progress: Progress | None = None
) -> Iterator[tuple[int, LayerExperts]]:
    """Bring a rank's weights to a device, layer by layer, and check them there.

    layers: layer id -> weights, mapped from files or in memory.
    device: where to, with its index. on_progress: called in this thread.
    Returns: the layers in their order; drop one before asking for the next, or both are held. What a file of
        compressed-tensors has is decoded here: on a GPU it costs no time, and the host need not hold what is not in its
        files. Codes of groups with scale 0 are 0, whatever they were: TensorRT-LLM's writer divides by the zero scale
        of an all-zero group.
    Raises: CheckpointError naming the matrix for scales that are negative, NaN or Inf.
    """
    with Staging(device) as staging:
        tensors = _counted(staging.bring(_in_order(layers.values())), layers, on_progress)
        for number, layer in layers.items():
            yield number, _layer(number, layer, tensors)


class _Lane(NamedTuple):
    buffer: torch.Tensor  # [PIECE_BYTES] uint8, pinned where it goes to a GPU
    stream: torch.cuda.Stream | None


class Staging:
    """Brings tensors to a device; use it as a context manager.

    device: where to, with its index. readers: threads; default as many as torch may use, within bounds.
    """

    def __init__(self, device: torch.device, readers: int | None = None) -> None:
        count = readers or min(MAX_READERS, max(MIN_READERS, torch.get_num_threads()))
        on_gpu = device.type == "cuda"
        self._device = device
        self._consumer = torch.cuda.current_stream(device) if on_gpu else None
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(count):
            buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
            self._lanes.put(_Lane(buffer, torch.cuda.Stream(device) if on_gpu else None))  # type: ignore[no-untyped-call]
        self._most_ahead = TENSORS_AHEAD * count
        # A thread starts with the first GPU as its own, and a stream's end would leave a context there.
        own_gpu = functools.partial(torch.cuda.set_device, device) if on_gpu else None
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="staging", initializer=own_gpu)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def bring(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Bring tensors over in their order, some ahead of the one asked for.

        tensors: contiguous, on the CPU, or on the device already.
        Returns: the same on the device, for use on the stream that was current in the constructor.
        Raises: whatever a reader met. A file that is cut short while it is mapped ends the process (SIGBUS).
        """
        ahead: deque[Future[torch.Tensor]] = deque()
        for source in tensors:
            if source.is_cuda and source.device != self._device:
                raise ValueError(f"weights: expected them on the CPU or on {self._device}, got {source.device}")
            # Allocated here, so that the memory belongs to the stream that will use it.
            target = source if source.is_cuda else torch.empty_like(source, device=self._device)
            ahead.append(self._pool.submit(self._copy, source, target))
            if len(ahead) > self._most_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target is source:
            return target
        _read_ahead(source)
        # numpy copies in this thread; torch would start a team of threads in each reader
        octets, into = source.view(-1).view(torch.uint8).numpy(), target.view(-1).view(torch.uint8)
        lane = self._lanes.get()
        try:
            with torch.cuda.stream(lane.stream):
                if lane.stream is not None and self._consumer is not None:
                    lane.stream.wait_stream(self._consumer)  # it may still read what the memory held before
                for first in range(0, octets.size, PIECE_BYTES):
                    piece = octets[first : first + PIECE_BYTES]
                    np.copyto(lane.buffer.numpy()[: piece.size], piece)
                    into[first : first + piece.size].copy_(lane.buffer[: piece.size], non_blocking=True)
                    if lane.stream is not None:
                        lane.stream.synchronize()  # this thread alone waits; then the buffer is free again
        finally:
            self._lanes.put(lane)
        return target


def _in_order(layers: Iterable[LayerExperts]) -> Iterator[torch.Tensor]:
    """Every tensor of the layers, as `_layer` takes them."""
    for layer in layers:
        for expert in (*layer.experts, *([] if layer.shared is None else [layer.shared])):
            for weight in expert:
                yield from weight


def _layer(number: int, layer: LayerExperts, tensors: Iterator[torch.Tensor]) -> LayerExperts:
    experts = [
        ExpertWeights(*(_int4(tensors, f"layer {number}, expert {index} of this rank, {name}") for name in PROJECTIONS))
        for index in range(len(layer.experts))
    ]
    if layer.shared is None:
        return LayerExperts(experts, None)
    shared = (
        _checked(Fp8BlockWeight(next(tensors), next(tensors)), f"layer {number}, shared expert, {name}")
        for name in PROJECTIONS
    )
    return LayerExperts(experts, SharedExpert(*shared))


def _int4(tensors: Iterator[torch.Tensor], name: str) -> Int4Weight:
    return clear_unscaled(decode(_checked(Int4Weight(next(tensors), next(tensors)), name)))


def _checked(weight: AnyWeight, name: str) -> AnyWeight:
    if not bool(((weight.scales >= 0) & (weight.scales < torch.inf)).all()):  # false for NaN too
        raise CheckpointError(f"{name}: scales must be finite and not negative")
    return weight


def _counted(
    tensors: Iterator[torch.Tensor], layers: Mapping[int, LayerExperts], on_progress: Progress | None
) -> Iterator[torch.Tensor]:
    """Hand tensors on and tell of their bytes."""
    done_bytes, total_bytes = 0, sum(tensor.nbytes for tensor in _in_order(layers.values()))
    for tensor in tensors:
        done_bytes += tensor.nbytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
        yield tensor


def _read_ahead(tensor: torch.Tensor) -> None:
    """Ask the kernel for a mapped tensor's pages now and in large reads, instead of page by page as they are touched.

    It is advice: memory that is not mapped from a file, or a kernel that takes none, changes nothing.
    """
    start = tensor.data_ptr() & -mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
