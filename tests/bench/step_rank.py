"""One rank of bench_steps.py: `python step_rank.py TASK`, TASK being a `Task` in JSON; rank 0 writes the result."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from layer_case import LayerShape, draw_tokens, random_layer
from torch import Tensor

from moe_forward import experts
from moe_forward.checkpoint import LayerWeights
from moe_forward.rank import Launched, Rank
from moe_forward.rank_setup import RankSetup, join_group
from moe_forward.router import Router
from moe_forward.slab import Slab
from moe_forward.slab_rows import attach, detach, wait
from moe_forward.types import DType, ForwardRequest, GateSpec, ModelSpec, Routing, Step, TensorRef

LAYER = 0
IN_FLIGHT = (1, 2)
WARM_STEPS = 10
LAYER_CALLS = 30
TIMEOUT_SECONDS = 60.0


class Task(NamedTuple):
    """What a rank does.

    rank, ranks: who, of how many. device: cuda or cpu. exchange, experts: backends by name. shape: of the layer.
    tokens: of a step, over all ranks, the counts to measure. steps: of each count to time.
    requests: that a step's tokens are spread over, if there are as many. gate: the ranks choose the experts.
    rendezvous, out: files, for all ranks to meet and for the result.
    """

    rank: int
    ranks: int
    device: str
    exchange: str
    experts: str
    shape: LayerShape
    tokens: list[int]
    steps: int
    rendezvous: str
    out: str
    requests: int = 1
    gate: bool = False


class Listening:
    """A rank's forward that remembers what it was last called with, so that the layer can be timed by itself."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self.shape = forward.shape
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def room(self, *args: Any) -> Any:
        """Make room, as the rank wants it."""
        return self._forward.room(*args)

    def forward(self, *args: Any, **named: Any) -> Tensor:
        """Forward, as the rank wants it."""
        self._call = (args, named)
        output: Tensor = self._forward.forward(*args, **named)
        return output

    def again(self) -> None:
        """Forward the same once more."""
        args, named = self._call
        self._forward.forward(*args, **named)

    def close(self) -> None:
        """Leave the group."""
        self._forward.close()


@dataclass(frozen=True)
class Bodies:
    """Requests in a slab, for each step that can be under way. slabs: front end -> its memory."""

    slabs: Mapping[int, Tensor]
    steps: tuple[tuple[ForwardRequest, ...], ...]

    def step(self, number: int) -> Step:
        """Return a step."""
        return Step(number, 1, LAYER, self.steps[number % len(self.steps)])


def start(task: Task) -> tuple[Rank, Listening]:
    """Put this rank together as `rank_process` does, with random weights."""
    device = device_of(task)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(task.rank)
    shape = task.shape
    spec = ModelSpec(
        *("bench", shape.hidden, shape.intermediate, shape.experts, shape.top_k, 0, (LAYER,), 128),
        GateSpec("deepseek_v3", 8, 4, True, 2.5) if shape.experts >= 64 else GateSpec("softmax"),
    )
    most = max(task.tokens)
    setup = RankSetup(
        rank=task.rank,
        ranks=task.ranks,
        generation=1,
        device=str(device),
        folder=Path(),
        spec=spec,
        socket_path=Path(),
        rendezvous=Path(task.rendezvous),
        exchange=task.exchange,
        experts=task.experts,
        activation_scale="token",
        threads=1,
        max_tokens=-(-most // task.ranks),
        max_graph_tokens=512,
        phase_sample_steps=0,
        step_timeout_seconds=TIMEOUT_SECONDS,
        start_timeout_seconds=TIMEOUT_SECONDS,
    )
    held = {LAYER: random_layer(task.rank, task.ranks, shape, device)}
    local = experts.create(task.experts, held, "token", device)
    del held
    weights = {LAYER: LayerWeights((), None, torch.randn(shape.experts, shape.hidden) * shape.hidden**-0.5, None)}
    rank = join_group(setup, Router(spec, weights, device), local)
    rank.warm_up()
    listening = Listening(rank._forward)
    rank._forward = listening  # type: ignore[assignment]  # a seam for this benchmark alone
    return rank, listening


def device_of(task: Task) -> torch.device:
    """Where a rank computes."""
    return torch.device(task.device, task.rank if task.device == "cuda" else None)


def lay_out(task: Task, tokens: int, slab: Slab, memory: Tensor) -> Bodies:
    """Write bodies of bf16 rows, with expert ids and weights unless ranks choose them, as requests have them."""
    at, steps = 0, []
    for number in range(max(IN_FLIGHT)):
        drawn = draw_tokens(0, tokens, number, task.shape, torch.device("cpu"))
        requests = []
        for rows in torch.arange(tokens).tensor_split(min(task.requests, tokens)):
            x, ids, weights = drawn.x[rows], drawn.ids[rows].int(), drawn.weights[rows]
            refs = []
            for tensor, dtype in ((x, DType.BF16), (ids, DType.I32), (weights, DType.F32), (x, DType.BF16)):
                data = tensor.contiguous().view(torch.uint8).flatten()
                memory[at : at + len(data)] = data
                refs.append(TensorRef(at, dtype, tensor.shape[1]))
                at += len(data)
            hidden, chosen, weighed, output = refs
            routed = (Routing.SERVER, None, None) if task.gate else (Routing.TOPK, chosen, weighed)
            requests.append(
                ForwardRequest(0, len(requests), LAYER, len(rows), 1e9, False, hidden, None, *routed, output)
            )
        steps.append(tuple(requests))
    return Bodies({0: memory}, tuple(steps))


def slab_bytes(task: Task) -> int:
    """Room for what `lay_out` writes."""
    return max(IN_FLIGHT) * max(task.tokens) * (4 * task.shape.hidden + 8 * task.shape.top_k) + (1 << 20)


def measure(task: Task, rank: Rank, layer: Listening, bodies: Bodies, in_flight: int) -> dict[str, Any]:
    """Time steps of one size, launched so many at a time; collective.

    Returns: microseconds. us: from one result to the next. latency_us: of a step from its launch to its result, median
        and 90th percentile. launch_us: of the host, to launch it. layer_us: of the layer by itself, call behind call on
        the device. added_us: what a step takes beyond its layer, with one in flight its latency, with two from result
        to result.
    """
    run(rank, bodies, WARM_STEPS, in_flight)
    layer_us = 1e6 * layer_seconds(layer, device_of(task))
    together(task)
    started = time.perf_counter()
    times = run(rank, bodies, task.steps, in_flight)
    us = 1e6 * (time.perf_counter() - started) / task.steps
    latencies = sorted(seconds for _, seconds in times)
    latency_us = 1e6 * statistics.median(latencies)
    return {
        "tokens": bodies.step(0).tokens,
        "requests": len(bodies.step(0).requests),
        "gate": task.gate,
        "in_flight": in_flight,
        "us": us,
        "latency_us": latency_us,
        "latency_p90_us": 1e6 * latencies[len(latencies) * 9 // 10],
        "launch_us": 1e6 * statistics.median(seconds for seconds, _ in times),
        "layer_us": layer_us,
        "added_us": (latency_us if in_flight == 1 else us) - layer_us,
    }


def run(rank: Rank, bodies: Bodies, steps: int, in_flight: int) -> list[tuple[float, float]]:
    """Do steps; returns for each the seconds that the host took to launch it, and from there to its result."""
    times = []
    under_way: deque[tuple[float, float, Launched]] = deque()
    for number in range(steps + in_flight - 1):
        if number < steps:
            began = time.perf_counter()
            launched = rank.launch(bodies.step(number), bodies.slabs)
            under_way.append((began, time.perf_counter() - began, launched))
        if len(under_way) == in_flight or number >= steps:
            began, launch_seconds, launched = under_way.popleft()
            result = launched.finish()
            times.append((launch_seconds, time.perf_counter() - began))
            if result.non_finite:
                raise RuntimeError(f"step {number}: NaN or Inf was found in random rows")
    return times


def layer_seconds(layer: Listening, device: torch.device) -> float:
    """Time the forward of the last step by itself: the host only launches, and the device has no gap; collective."""
    layer.again()
    wait(device)
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(3):
            layer.again()
        return (time.perf_counter() - started) / 3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(LAYER_CALLS):
        layer.again()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / LAYER_CALLS


def together(task: Task) -> None:
    """Let the ranks begin at the same time."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=device_of(task)))
        wait(device_of(task))


def main() -> None:
    """Do one task."""
    given = json.loads(sys.argv[1])
    task = Task(**given | {"shape": LayerShape(*given["shape"])})
    started = time.monotonic()
    rank, layer = start(task)
    slab = Slab(slab_bytes(task))
    memory = attach(slab.fd, slab.nbytes, device_of(task))
    rows: list[dict[str, Any]] = []
    for tokens in task.tokens:
        bodies = lay_out(task, tokens, slab, memory)
        for in_flight in IN_FLIGHT:
            rows.append(measure(task, rank, layer, bodies, in_flight))
            if task.rank == 0:
                Path(task.out).write_text(json.dumps(rows))
                print(f"[{time.monotonic() - started:5.1f} s] {json.dumps(rows[-1])}", flush=True)
    detach(memory, device_of(task))
    rank.close()


if __name__ == "__main__":
    main()
