"""A rank's rows of a step: read out of the front ends' slabs, and the outputs written back into them.

On a CPU each byte of a body is copied once, into memory of the step, and each byte of an output once, from where it was
converted to its type. On a GPU a slab is registered with CUDA once, so both copies are the device's own (DMA) from and
to the slab, asynchronous, and the host touches no byte; `moe_forward.copy_streams` says when they have ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from moe_forward.errors import StartError
from moe_forward.moves import Mover, Scattered, TorchMover
from moe_forward.segments import INPUTS, Segment, segments
from moe_forward.slab import map_slab
from moe_forward.types import DType, ForwardRequest, Routing, Step, TensorRef

log = logging.getLogger(__name__)

_TORCH = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.I32: torch.int32,
    DType.I64: torch.int64,
}

_MAPPED = 2
"""cudaHostRegisterMapped: kernels reach the memory by its own address."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive segments whose tensors have the same types, read as one.

    segments: in row order. first: where their rows start among this rank's rows.
    hidden: [n, H] in the requests' type. hidden_scales: [n, 1 or H/128] float32 for fp8, else None.
    chosen: expert ids or router logits or None. weights: [n, K] float32 or None.
    """

    segments: tuple[Segment, ...]
    first: int
    hidden: Tensor
    hidden_scales: Tensor | None
    chosen: Tensor | None
    weights: Tensor | None

    @property
    def tokens(self) -> int:
        """Rows of all segments."""
        return self.hidden.shape[0]

    @property
    def routing(self) -> Routing:
        """Who chooses the experts of these rows."""
        return self.segments[0].request.routing


def attach(fd: int, slab_bytes: int, device: torch.device) -> Tensor:
    """Map a front end's slab as a tensor [slab_bytes] uint8 that shares its memory, ready for copies to `device`.

    Raises: ValueError when the file is shorter; StartError when CUDA does not take the memory.
    """
    memory = torch.frombuffer(map_slab(fd, slab_bytes), dtype=torch.uint8)
    if device.type == "cuda":
        started = time.monotonic()
        code = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
            memory.data_ptr(), slab_bytes, _MAPPED
        )
        if int(code) != 0:
            raise StartError(
                f"cudaHostRegister refused a slab of {slab_bytes} bytes: {_cuda_words(code)}; "
                "copies to the GPU would be slow and synchronous without it. Lower slab_bytes, or raise the limit of "
                "locked memory (ulimit -l) and the memory of the container"
            )
        log.info("registered a slab of %d bytes in %.2f s", slab_bytes, time.monotonic() - started)
    return memory


def detach(memory: Tensor, device: torch.device) -> None:
    """Undo `attach`; no copy may be under way.

    Raises: StartError when CUDA does not know the memory.
    """
    if device.type == "cuda":
        code = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
        if int(code) != 0:
            raise StartError(f"cudaHostUnregister refused a slab of {len(memory)} bytes: {_cuda_words(code)}")


def read_runs(
    step: Step, rank: int, ranks: int, slabs: Mapping[int, Tensor], device: torch.device, mover: Mover | None = None
) -> list[Run]:
    """Copy this rank's rows of a step out of the slabs to `device`; on a GPU the copies are under way on return.

    slabs: front end -> [bytes] uint8, as `attach` returns it. mover: makes the copies; None: torch does.
    Returns: the runs in row order; together they are `token_range(rank, ranks, step.tokens)`.
    """
    runs: list[Run] = []
    wanted: list[Scattered] = []
    first = 0
    for _, group in groupby(segments(step, rank, ranks), key=lambda segment: _form(segment.request)):
        members = tuple(group)
        hidden, *others = (_read(members, name, slabs, device, wanted) for name in INPUTS)
        assert hidden is not None
        runs.append(Run(members, first, hidden, *others))
        first += len(hidden)
    (mover or TorchMover()).gather(wanted)
    return runs


def convert_runs(output: Tensor, runs: list[Run]) -> list[Tensor]:
    """Return each run's rows of `output` [T, H] in its requests' float type, as [n, H] in their own memory.

    Own, since the next step may write over `output` while these rows leave for their slabs.
    """
    rows = []
    for run in runs:
        part = output[run.first : run.first + run.tokens]
        dtype = _TORCH[run.segments[0].request.output.dtype]
        rows.append(part.to(dtype, copy=True, memory_format=torch.contiguous_format))
    return rows


def write_runs(rows: list[Tensor], runs: list[Run], slabs: Mapping[int, Tensor], mover: Mover | None = None) -> None:
    """Write each request's rows, as `convert_runs` returned them, to where it wants them.

    On a GPU the copies are under way on return. mover: as for `read_runs`.
    """
    (mover or TorchMover()).scatter(
        [Scattered(data, _places(run.segments, "output", slabs)) for run, data in zip(runs, rows, strict=True)]
    )


def to_host(tensor: Tensor) -> Tensor:
    """Copy a small tensor to the host; on a GPU the copy is under way on return."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def wait(device: torch.device) -> None:
    """Wait until everything that was started on `device`, on any stream, is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _form(request: ForwardRequest) -> tuple[object, ...]:
    """What requests of one run have in common: the type and width of each tensor, and who routes."""
    refs = (request.hidden, request.hidden_scales, request.chosen, request.weights, request.output)
    return (request.routing, *(ref and (ref.dtype, ref.columns) for ref in refs))


def _read(
    members: tuple[Segment, ...], name: str, slabs: Mapping[int, Tensor], device: torch.device, wanted: list[Scattered]
) -> Tensor | None:
    """Make room for one tensor of a run, and add it to what is wanted."""
    ref: TensorRef | None = getattr(members[0].request, name)
    if ref is None:
        return None
    # Memory of its own: aligned, which a tensor inside a request's body need not be.
    tokens = sum(segment.tokens for segment in members)
    data = torch.empty(tokens, ref.columns, dtype=_TORCH[ref.dtype], device=device)
    wanted.append(Scattered(data, _places(members, name, slabs)))
    return data


def _places(members: tuple[Segment, ...], name: str, slabs: Mapping[int, Tensor]) -> list[tuple[Tensor, int, int]]:
    """Return where the rows of one tensor of a run lie: what `Segment.window` says, in a third of the time."""
    ref: TensorRef = getattr(members[0].request, name)
    row_bytes = ref.columns * ref.dtype.itemsize
    return [
        (slabs[request.front], getattr(request, name).offset + first * row_bytes, tokens * row_bytes)
        for _, request, first, tokens in members
    ]


def _cuda_words(code: object) -> str:
    words: str = torch.cuda.cudart().cudaGetErrorString(code)  # type: ignore[no-untyped-call]
    return words
