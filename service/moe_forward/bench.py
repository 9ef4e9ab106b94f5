"""Closed-loop load: so many callers, each sending its next forward when it has the answer to the last.

Latency is what a Python caller sees, encoding and decoding included. All callers are in one process: a service that is
faster than one Python client needs several runs at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import torch
from tqdm import tqdm

from moe_forward.client import AsyncClient, MoEForwardClientError, TransportFailed, Unavailable, read_api_key

BenchDType = Literal["bf16", "f16", "f32", "fp8"]
Hidden = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states [T, H], and for fp8 their scales [T, 1] float32."""

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "fp8": torch.float8_e4m3fn}
E4M3_MAX = 448.0
DISTINCT_INPUTS = 4
"""Different requests that the callers take turns with: enough to vary the routing, few enough to fit in memory."""
PAUSE_SECONDS = 0.05
"""Wait of a caller after an error that names no wait, so that a dead service is not hammered."""
TICK_SECONDS = 0.2
LATENCIES = ("p50", "p90", "p99", "max")


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    layer: one id; None takes all that are served in turn. tokens: rows of a request; each size is a run of its own.
    concurrency: callers. seconds: of measuring one size, after warmup_seconds.
    dtype: of the hidden states; fp8 comes with one scale per token. seed: of the random hidden states.
    Raises: ValueError naming the field.
    """

    layer: int | None
    tokens: tuple[int, ...]
    concurrency: int
    seconds: float
    warmup_seconds: float
    dtype: BenchDType
    seed: int

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens must be one or more positive numbers, got {list(self.tokens)}")
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {self.concurrency}")
        if not self.seconds > 0 or not self.warmup_seconds >= 0:
            got = f"{self.seconds} and {self.warmup_seconds}"
            raise ValueError(f"seconds must be positive and warmup_seconds 0 or more, got {got}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True, slots=True)
class BenchRow:
    """What was measured with requests of `tokens` rows.

    requests: answered after the warm-up. elapsed_seconds: from the end of the warm-up to the last answer.
    latency_milliseconds: p50, p90, p99 and max over the answered requests; empty when there were none.
    errors: slug, or the client's error class where the server sent none -> how often, after the warm-up.
    """

    tokens: int
    requests: int
    elapsed_seconds: float
    requests_per_second: float
    tokens_per_second: float
    latency_milliseconds: dict[str, float]
    errors: dict[str, int]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A load test: the service, the load, and a row for each request size."""

    url: str
    model: str
    hidden_size: int
    layers: tuple[int, ...]
    load: Load
    rows: tuple[BenchRow, ...]

    def table(self) -> str:
        """The rows as text, one line each."""
        head = ("req/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "max ms")
        titles = f"{'tokens':>7}{''.join(f'{title:>11}' for title in head)}  errors"
        return "\n".join([titles, *map(_line, self.rows)])

    def to_json(self) -> str:
        """The whole report as one JSON document."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


def bench(
    url: str,
    *,
    layer: int | None = None,
    tokens: Sequence[int] = (1, 16, 128),
    concurrency: int = 8,
    seconds: float = 10.0,
    warmup_seconds: float = 2.0,
    dtype: BenchDType = "bf16",
    seed: int = 0,
    json_path: Path | None = None,
    api_key_file: Path | None = None,
    ca_file: Path | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> BenchReport:
    """Load a service with random hidden states, print a table and return the figures.

    layer to seed: as in `Load`. json_path: where to write the report too.
    api_key_file: whose first key to send. ca_file: PEM certificates to trust for https; None: the usual ones.
    transport: httpx transport to use instead of the network, for tests.
    Raises: ValueError naming the argument; MoEForwardClientError when the service does not tell its placement.
    """
    load = Load(layer, tuple(tokens), concurrency, seconds, warmup_seconds, dtype, seed)
    options: dict[str, Any] = {"verify": True if ca_file is None else ca_file, "transport": transport}
    if api_key_file is not None:
        options["api_key"] = read_api_key(api_key_file)
    report = asyncio.run(_bench(url, load, options))
    print(report.table())
    if json_path is not None:
        json_path.write_text(report.to_json() + "\n")
    return report


async def _bench(url: str, load: Load, options: dict[str, Any]) -> BenchReport:
    async with AsyncClient(url, retries=0, **options) as client:  # a retry would hide errors and waiting
        placement = await client.placement()
        try:
            model, hidden_size = str(placement["model"]), int(placement["hidden_size"])
            served = tuple(int(served) for served in placement["layers"])
        except (KeyError, TypeError, ValueError) as error:
            raise TransportFailed(f"the placement needs model, hidden_size and layers: {error!r}") from error
        if not served:
            raise TransportFailed(f"the placement of {model} has no layers")
        if load.layer is not None and load.layer not in served:
            raise ValueError(f"layer must be one that {model} serves, {list(served)}, got {load.layer}")
        layers = served if load.layer is None else (load.layer,)
        with tqdm(total=len(load.tokens) * (load.warmup_seconds + load.seconds), unit="s", disable=None) as bar:
            rows = [await _measure(client, hidden_size, layers, tokens, load, bar) for tokens in load.tokens]
    return BenchReport(url, model, hidden_size, layers, load, tuple(rows))


def _inputs(tokens: int, hidden_size: int, load: Load) -> list[Hidden]:
    generator = torch.Generator().manual_seed(load.seed)
    inputs: list[Hidden] = []
    for _ in range(min(load.concurrency, DISTINCT_INPUTS)):
        hidden = torch.randn(tokens, hidden_size, generator=generator)
        if load.dtype == "fp8":
            scales = hidden.abs().amax(dim=1, keepdim=True) / E4M3_MAX
            inputs.append(((hidden / scales).to(DTYPES["fp8"]), scales))
        else:
            inputs.append((hidden.to(DTYPES[load.dtype]), None))
    return inputs


@dataclass(slots=True)
class _Tally:
    latencies_seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    last_seconds: float = 0.0


async def _measure(
    client: AsyncClient,
    hidden_size: int,
    layers: tuple[int, ...],
    tokens: int,
    load: Load,
    bar: tqdm[Any],
) -> BenchRow:
    bar.set_postfix(tokens=tokens)
    inputs = _inputs(tokens, hidden_size, load)
    measured_from = time.monotonic() + load.warmup_seconds
    until = measured_from + load.seconds
    tally = _Tally(last_seconds=until)
    requests = zip(itertools.cycle(inputs), itertools.cycle(layers), strict=False)
    ticking = asyncio.create_task(_tick(bar))
    await asyncio.gather(*(_caller(client, requests, measured_from, until, tally) for _ in range(load.concurrency)))
    ticking.cancel()
    return _row(tokens, tally, tally.last_seconds - measured_from)


async def _caller(
    client: AsyncClient,
    requests: Iterator[tuple[Hidden, int]],
    measured_from: float,
    until: float,
    tally: _Tally,
) -> None:
    while (sent := time.monotonic()) < until:
        hidden, layer = next(requests)
        failure: MoEForwardClientError | None = None
        try:
            await client.forward(hidden[0], hidden_scales=hidden[1], layer=layer)
        except MoEForwardClientError as error:
            failure = error
        now = time.monotonic()
        if now >= measured_from:
            tally.last_seconds = max(tally.last_seconds, now)
            if failure is None:
                tally.latencies_seconds.append(now - sent)
            else:
                tally.errors[failure.code or type(failure).__name__] += 1
        if failure is not None:
            asked = failure.retry_after_seconds if isinstance(failure, Unavailable) else None
            await asyncio.sleep(max(0.0, min(asked or PAUSE_SECONDS, until - now)))


async def _tick(bar: tqdm[Any]) -> None:
    while True:
        await asyncio.sleep(TICK_SECONDS)
        bar.update(TICK_SECONDS)


def _row(tokens: int, tally: _Tally, elapsed_seconds: float) -> BenchRow:
    requests = len(tally.latencies_seconds)
    latency: dict[str, float] = {}
    if requests:
        points = np.percentile(tally.latencies_seconds, [50, 90, 99, 100]) * 1000
        latency = dict(zip(LATENCIES, points.tolist(), strict=True))
    return BenchRow(
        tokens=tokens,
        requests=requests,
        elapsed_seconds=elapsed_seconds,
        requests_per_second=requests / elapsed_seconds,
        tokens_per_second=requests * tokens / elapsed_seconds,
        latency_milliseconds=latency,
        errors=dict(sorted(tally.errors.items())),
    )


def _line(row: BenchRow) -> str:
    latency = "".join(
        f"{row.latency_milliseconds[name]:>11.2f}" if row.latency_milliseconds else f"{'-':>11}" for name in LATENCIES
    )
    errors = ", ".join(f"{code} {count}" for code, count in row.errors.items()) or "none"
    return f"{row.tokens:>7}{row.requests_per_second:>11.1f}{row.tokens_per_second:>11.0f}{latency}  {errors}"
