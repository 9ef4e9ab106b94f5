"""One rank of bench_layer.py: `python layer_rank.py TASK`, TASK being a `Task` in JSON; rank 0 writes the result."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from layer_case import LayerShape, draw_tokens, find_needs, random_layer

from moe_forward import exchange, experts
from moe_forward.experts import PhaseClock
from moe_forward.layer_forward import LayerForward, TokenShape
from moe_forward.stopwatch import DeviceStopwatch, Stopwatch, Untimed
from moe_forward.types import PHASES
from w4afp8 import Granularity
from w4afp8.activations import scale_columns

LAYERS = 3
"""Taken in turn, so that no weight is in L2."""
ROUNDS = 2
PHASE_REPLAYS = 20
TIMEOUT_SECONDS = 60.0

Work = Callable[[], object]


class Task(NamedTuple):
    """What a rank does.

    rank, ranks: who, of how many. device: cuda or cpu. exchange, experts: backends by name.
    shape: of the layer. tokens: of a rank, the counts to measure. replays: of a graph.
    rendezvous, out: files, for all ranks to meet and for the result.
    """

    rank: int
    ranks: int
    device: str
    exchange: str
    experts: str
    granularity: Granularity
    shape: LayerShape
    tokens: list[int]
    replays: int
    rendezvous: str
    out: str


class Gpu:
    """Times work as CUDA graphs by events."""

    def __init__(self, device: torch.device) -> None:
        self._flag = torch.zeros(1, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, work: Sequence[Work]) -> Work:
        """Capture `work` once it has run twice, and return its replay."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for each in (*work, *work):
                each()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            for each in work:
                each()
        return graph.replay

    def seconds(self, run: Work, times: int) -> list[float]:
        """Time `run` some times; ranks start each together, by a collective before it."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]  # type: ignore[no-untyped-call]
        for begin, end in pairs:
            if dist.is_initialized():
                dist.all_reduce(self._flag)
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def clock(self) -> DeviceStopwatch:
        """A clock whose events become nodes of the graph that is being captured."""
        return DeviceStopwatch(lambda phase: (_external_event(), _external_event()))


class Cpu:
    """The same on a CPU, for trying the benchmark itself: work is repeated instead of replayed."""

    def record(self, work: Sequence[Work]) -> Work:
        """Return a call that does all of it."""
        return lambda: [each() for each in work]

    def seconds(self, run: Work, times: int) -> list[float]:
        """Time `run` some times."""
        taken = []
        for _ in range(times):
            if dist.is_initialized():
                dist.barrier()
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
        return taken

    def clock(self) -> Stopwatch:
        """The host's clock."""
        return Stopwatch()


class Layer:
    """This rank's part of the layer, with random weights."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.device = torch.device(task.device, task.rank if task.device == "cuda" else None)
        self.columns = scale_columns(task.shape.hidden, task.granularity)
        if task.device == "cuda":
            torch.cuda.set_device(self.device)
        torch.manual_seed(task.rank)
        held = {layer: random_layer(task.rank, task.ranks, task.shape, self.device) for layer in range(LAYERS)}
        self.experts = experts.create(task.experts, held, task.granularity, self.device)
        del held
        place = exchange.Place(
            rank=task.rank,
            ranks=task.ranks,
            num_experts=task.shape.experts,
            rendezvous=Path(task.rendezvous),
            timeout_seconds=TIMEOUT_SECONDS,
            device=self.device,
            hidden_size=task.shape.hidden,
            top_k=task.shape.top_k,
            max_tokens=max(task.tokens),
            scale_columns=self.columns,
        )
        self.exchange = exchange.create(task.exchange, place)
        shape = TokenShape(
            task.shape.hidden, task.shape.top_k, task.shape.experts, self.columns, shared=False, device=self.device
        )
        self._forward = LayerForward(self.exchange, self.experts, shape)

    def forward(self, layer: int, tokens: Any, clock: PhaseClock) -> torch.Tensor:
        """bf16 tokens in, bf16 out: [T, H]."""
        with clock("quantize"):
            quantized, _ = self.experts.quantize(tokens.x)
        output = self._forward.compute(layer, quantized, tokens.ids, tokens.weights, None, clock)
        return output.to(torch.bfloat16)


def measure(layer: Layer, timer: Gpu | Cpu, tokens: int) -> dict[str, Any]:
    """Time the layer with one number of tokens a rank; collective.

    Returns: microseconds of one layer, the slowest rank's; of its phases; and what it needs at least.
    """
    task = layer.task
    drawn = [draw_tokens(task.rank, tokens, variant, task.shape, layer.device) for variant in range(LAYERS)]
    output = layer.forward(0, drawn[0], Untimed())
    if not bool(output.isfinite().all()):
        raise RuntimeError(f"{tokens} tokens a rank: NaN or Inf in rank {task.rank}'s output of the layer")

    def whole(index: int) -> object:
        return layer.forward(index, drawn[index], Untimed())

    calls = [partial(whole, index) for _ in range(ROUNDS) for index in range(LAYERS)]
    replay = timer.record(calls)
    timer.seconds(replay, 5)
    seconds = _slowest(timer.seconds(replay, task.replays), layer.device)
    del replay
    ids = [
        [draw_tokens(rank, tokens, variant, task.shape, layer.device).ids.cpu() for rank in range(task.ranks)]
        for variant in range(LAYERS)
    ]
    needs = [find_needs(each, task.shape, layer.columns) for each in ids]
    floor = statistics.mean(each.floor_seconds for each in needs)
    found = sorted(each / len(calls) for each in seconds)
    return {
        "tokens": tokens,
        "us": 1e6 * statistics.median(found),
        "p10_us": 1e6 * found[len(found) // 10],
        "p90_us": 1e6 * found[len(found) * 9 // 10],
        "floor_us": 1e6 * floor,
        "percent": 100 * floor / statistics.median(found),
        "phases_us": _phases(layer, timer, drawn),
        "sent_bytes": {name: max(getattr(each, name) for each in needs) for name in needs[0]._fields[1:]},
    }


def _phases(layer: Layer, timer: Gpu | Cpu, drawn: Sequence[Any]) -> dict[str, float]:
    """Microseconds of each phase of a layer, the slowest rank's; events keep kernels from overlapping."""
    samples = []
    if isinstance(timer, Gpu):
        clock = timer.clock()
        clocks: list[PhaseClock] = [Untimed(), Untimed(), clock]  # two runs before the capture
        replay = timer.record([partial(_all_layers, layer, drawn, clocks)])
        for _ in range(PHASE_REPLAYS):
            timer.seconds(replay, 1)
            samples.append(clock.phase_seconds)
        del replay
    else:
        for _ in range(3):
            host_clock = timer.clock()
            _all_layers(layer, drawn, [host_clock])
            samples.append(host_clock.phase_seconds)
    medians = [statistics.median(each) / LAYERS for each in zip(*samples, strict=True)]
    worst = _slowest(medians, layer.device)
    return {phase: 1e6 * seconds for phase, seconds in zip(PHASES, worst, strict=True) if seconds > 0}


def _all_layers(layer: Layer, drawn: Sequence[Any], clocks: list[PhaseClock]) -> None:
    clock = clocks.pop(0)
    for index, tokens in enumerate(drawn):
        layer.forward(index, tokens, clock)


def _slowest(seconds: Sequence[float], device: torch.device) -> list[float]:
    """Each figure's maximum over the ranks; collective."""
    figures = torch.tensor(seconds, device=device, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return figures.tolist()


def _external_event() -> Any:
    return torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]


def main() -> None:
    """Do one task."""
    given = json.loads(sys.argv[1])
    task = Task(**given | {"shape": LayerShape(*given["shape"])})
    started = time.monotonic()
    layer = Layer(task)
    timer = Gpu(layer.device) if task.device == "cuda" else Cpu()
    rows: list[dict[str, Any]] = []
    for tokens in task.tokens:
        rows.append(measure(layer, timer, tokens))
        if task.rank == 0:
            Path(task.out).write_text(json.dumps(rows))
            print(f"[{time.monotonic() - started:5.1f} s] {task.exchange} {json.dumps(rows[-1])}", flush=True)
    layer.exchange.close()


if __name__ == "__main__":
    main()
