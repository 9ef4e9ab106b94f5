"""What to send: everything a load test was asked for, checked, and the points it goes through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moe_forward.bench.arrivals import Arrivals
from moe_forward.bench.mixes import LayerOrder, Mix

BenchDType = Literal["bf16", "f16", "f32", "fp8"]
BenchRouting = Literal["server", "topk", "logits"]


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    tokens: rows of a request; each size is a point of its own. mix: sizes by weight in one point, in place of tokens.
    layers: None takes all that are served. layer_order: how requests go through them.
    concurrency: callers of a closed loop; each number is a point of its own.
    rate: requests a second of an open loop, in place of concurrency; each rate is a point of its own.
    arrivals: of an open loop. max_inflight: its requests that may be unanswered at once; more wait here.
    seconds: of measuring one point, after warmup_seconds. requests: to measure in its place, None for the time.
    dtype: of the hidden states; fp8 comes with one scale per token.
    routing: by the server, or sent as expert ids with weights or as logits.
    timeout_seconds: of a request. slo_milliseconds: what a good request takes at most, None asks nothing.
    processes: that share the load. seed: of hidden states, sizes, layers and arrivals.
    Raises: ValueError naming the field.
    """

    tokens: tuple[int, ...] = (1, 16, 128)
    mix: Mix | None = None
    layers: tuple[int, ...] | None = None
    layer_order: LayerOrder = "round-robin"
    concurrency: tuple[int, ...] = (8,)
    rate: tuple[float, ...] = ()
    arrivals: Arrivals = "poisson"
    max_inflight: int = 256
    seconds: float = 10.0
    requests: int | None = None
    warmup_seconds: float = 2.0
    dtype: BenchDType = "bf16"
    routing: BenchRouting = "server"
    shared_experts: bool = True
    timeout_seconds: float = 30.0
    slo_milliseconds: float | None = None
    processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens must be one or more positive numbers, got {list(self.tokens)}")
        if not self.concurrency or min(self.concurrency) < 1:
            raise ValueError(f"concurrency must be one or more positive numbers, got {list(self.concurrency)}")
        if not all(rate > 0 and math.isfinite(rate) for rate in self.rate):
            raise ValueError(f"rate must be positive numbers of requests a second, got {list(self.rate)}")
        for name, least in (("max_inflight", 1), ("processes", 1), ("requests", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.seconds > 0 or not self.warmup_seconds >= 0:
            got = f"{self.seconds} and {self.warmup_seconds}"
            raise ValueError(f"seconds must be positive and warmup_seconds 0 or more, got {got}")
        for name in ("timeout_seconds", "slo_milliseconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive, got {value}")
        fewest = min((self.max_inflight,) if self.rate else self.concurrency)
        if self.processes > fewest:
            raise ValueError(f"processes must not be more than callers ({fewest}), got {self.processes}")
        _check_choice("dtype", self.dtype, get_args(BenchDType))
        _check_choice("routing", self.routing, get_args(BenchRouting))
        _check_choice("arrivals", self.arrivals, get_args(Arrivals))
        _check_choice("layer_order", self.layer_order, get_args(LayerOrder))


@dataclass(frozen=True, slots=True)
class Point:
    """One run of the load. connections: callers, or requests in flight at most. rate: None in a closed loop."""

    mix: Mix
    connections: int
    rate: float | None

    @property
    def size(self) -> str:
        """The size of its requests, `mix` where they differ."""
        return str(self.mix[0][0]) if len(self.mix) == 1 else "mix"

    @property
    def name(self) -> str:
        """What distinguishes it from the others of a load, the same in every run."""
        sizes = ",".join(f"{tokens}:{share:.4g}" for tokens, share in self.mix)
        sizes = self.size if len(self.mix) == 1 else sizes
        return f"tokens={sizes} " + (f"concurrency={self.connections}" if self.rate is None else f"rate={self.rate:g}")


def points(load: Load) -> Sequence[Point]:
    """Return every run of a load: each mix or size, at each concurrency or rate."""
    mixes = [((size, 1.0),) for size in load.tokens] if load.mix is None else [load.mix]
    if load.rate:
        return [Point(mix, load.max_inflight, rate) for mix in mixes for rate in load.rate]
    return [Point(mix, callers, None) for mix in mixes for callers in load.concurrency]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
