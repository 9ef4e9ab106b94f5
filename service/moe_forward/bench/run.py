"""A whole load test: ask the service what it serves, prepare the bodies, go through the points, say what came out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_forward.bench.arrivals import Arrivals
from moe_forward.bench.compare import comparison, read_report
from moe_forward.bench.crew import crew
from moe_forward.bench.environment import environment
from moe_forward.bench.inputs import ModelSizes, make_bodies, reply_bytes
from moe_forward.bench.load import BenchDType, BenchRouting, Load, Point, points
from moe_forward.bench.mixes import LayerOrder, parse_layers, parse_mix
from moe_forward.bench.plot import check_picture, draw
from moe_forward.bench.progress import Bar
from moe_forward.bench.report import Report, make_row
from moe_forward.bench.selfcheck import CHECK_SECONDS, CHECK_WARMUP_SECONDS, ceiling, echoes
from moe_forward.bench.table import table
from moe_forward.bench.target import Target, parse_target
from moe_forward.bench.worker import Job
from moe_forward.client import AsyncClient, TransportFailed, read_api_key


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """What a service says of itself."""

    model: str
    layers: tuple[int, ...]
    sizes: ModelSizes


def bench(
    url: str,
    *,
    tokens: Sequence[int] = (1, 16, 128),
    mix: str | None = None,
    layers: str = "all",
    layer_order: LayerOrder = "round-robin",
    concurrency: Sequence[int] = (8,),
    rate: Sequence[float] = (),
    arrivals: Arrivals = "poisson",
    max_inflight: int = 256,
    seconds: float = 10.0,
    requests: int | None = None,
    warmup_seconds: float = 2.0,
    dtype: BenchDType = "bf16",
    routing: BenchRouting = "server",
    shared_experts: bool = True,
    timeout_seconds: float = 30.0,
    slo_milliseconds: float | None = None,
    processes: int = 1,
    self_check: bool = True,
    seed: int = 0,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    compare_path: Path | None = None,
    api_key_file: Path | None = None,
    ca_file: Path | None = None,
) -> Report:
    """Load a service with random hidden states, print a table and return the figures.

    tokens to seed: as in `Load`; mix: `TOKENS:WEIGHT,...`; layers: `all` or `3,5,7-9`.
    self_check: also measure what the generator can do, a second or two a point.
    json_path, plot_path: where to write the report and its picture. compare_path: a report to print ratios to.
    api_key_file: whose first key to send. ca_file: PEM certificates to trust for https; None: the usual ones.
    Raises: ValueError naming the argument; MoEForwardClientError when the service does not tell its placement.
    """
    load = Load(
        tokens=tuple(tokens),
        mix=None if mix is None else parse_mix(mix),
        layer_order=layer_order,
        concurrency=tuple(concurrency),
        rate=tuple(rate),
        arrivals=arrivals,
        max_inflight=max_inflight,
        seconds=seconds,
        requests=requests,
        warmup_seconds=warmup_seconds,
        dtype=dtype,
        routing=routing,
        shared_experts=shared_experts,
        timeout_seconds=timeout_seconds,
        slo_milliseconds=slo_milliseconds,
        processes=processes,
        seed=seed,
    )
    if plot_path is not None:
        check_picture(plot_path)
    old = None if compare_path is None else read_report(compare_path)
    target = parse_target(url, None if api_key_file is None else read_api_key(api_key_file), ca_file)
    served = asyncio.run(_ask(url, target))
    chosen = parse_layers(layers, served.layers, served.model)
    load = dataclasses.replace(load, layers=None if layers == "all" else chosen)
    report = _measure(url, target, served, chosen, load, self_check)
    print(table(report))
    if old is not None:
        print(comparison(report, old))
    if json_path is not None:
        json_path.write_text(report.to_json() + "\n")
    if plot_path is not None:
        draw(report, plot_path)
    return report


async def _ask(url: str, target: Target) -> Served:
    verify: Any = True if target.ca_file is None else target.ca_file
    async with AsyncClient(url, retries=0, api_key=target.api_key, verify=verify) as client:
        placement = await client.placement()
    try:
        numbers = (int(placement[name]) for name in ("hidden_size", "num_experts", "top_k"))
        served = Served(str(placement["model"]), tuple(map(int, placement["layers"])), ModelSizes(*numbers))
    except (KeyError, TypeError, ValueError) as error:
        expected = "model, hidden_size, num_experts, top_k and layers"
        raise TransportFailed(f"the placement needs {expected}: {error!r}") from error
    if not served.layers:
        raise TransportFailed(f"the placement of {served.model} has no layers")
    return served


def _measure(url: str, target: Target, served: Served, layers: tuple[int, ...], load: Load, self_check: bool) -> Report:
    where = environment()
    todo = points(load)
    sizes = sorted({size for point in todo for size, _ in point.mix})
    bodies = make_bodies(sizes, served.sizes, load.dtype, load.routing, load.seed)
    check_seconds = CHECK_SECONDS + CHECK_WARMUP_SECONDS if self_check else 0.0
    bar = Bar(len(todo) * (load.warmup_seconds + load.seconds + check_seconds))
    rows = []
    with contextlib.closing(bar), crew(load.processes) as clients, contextlib.ExitStack() as stack:
        ports = stack.enter_context(echoes(load.processes)) if self_check else []
        for point in todo:
            jobs = [_job(target, served, layers, load, point, bodies, part) for part in range(load.processes)]
            bar.run(point.name)
            most = ceiling(clients, jobs, ports) if self_check else None
            tally, start_ns = clients.run(jobs, bar.tell)
            rows.append(make_row(point, load, tally, start_ns, most))
    return Report(url, served.model, served.sizes.hidden_size, layers, load, where, tuple(rows))


def _job(
    target: Target,
    served: Served,
    layers: tuple[int, ...],
    load: Load,
    point: Point,
    bodies: dict[int, tuple[bytes, ...]],
    part: int,
) -> Job:
    sizes = [size for size, _ in point.mix]
    shared = "true" if load.shared_experts else "false"
    fixed = f"shared_experts={shared}&timeout_ms={max(1, int(load.timeout_seconds * 1000))}"
    paths = {(layer, size): f"/v1/moe/forward?layer={layer}&{fixed}" for layer in layers for size in sizes}
    return Job(
        target=target,
        mix=point.mix,
        layers=layers,
        layer_order=load.layer_order,
        paths=paths,
        bodies={size: bodies[size] for size in sizes},
        reply_bytes={size: reply_bytes(size, served.sizes, load.dtype) for size in sizes},
        connections=_part(point.connections, part, load.processes),
        rate=point.rate,
        arrivals=load.arrivals,
        warmup_seconds=load.warmup_seconds,
        seconds=load.seconds,
        requests=None if load.requests is None else _part(load.requests, part, load.processes),
        timeout_seconds=load.timeout_seconds,
        slo_ns=None if load.slo_milliseconds is None else round(load.slo_milliseconds * 1e6),
        seed=load.seed,
        part=part,
        parts=load.processes,
    )


def _part(whole: int, part: int, parts: int) -> int:
    return whole // parts + (part < whole % parts)
