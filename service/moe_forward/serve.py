"""`moe-forward serve`: from a configuration to a running service, and down again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from moe_forward import checkpoint, devices, exchange, experts, memory_plan, tracing
from moe_forward.api import allow_connections, listening, read_keys
from moe_forward.batcher import BatchLimits
from moe_forward.cluster import cluster_gpus, joined_ray, own_ray
from moe_forward.config import Config, parse_layers
from moe_forward.errors import ConfigError, StartError
from moe_forward.expert_tokens import check_series
from moe_forward.front import Front, load_tls
from moe_forward.front_samples import MergedSamples
from moe_forward.front_task import FrontTask
from moe_forward.fronts import Fronts
from moe_forward.link import EngineLink
from moe_forward.metrics import Metrics
from moe_forward.pool import PoolSetup, Supervisor
from moe_forward.rank_setup import RankSetup
from moe_forward.slab import Slab
from moe_forward.types import EngineStatus, ModelSpec

log = logging.getLogger(__name__)

DEFAULT_POLL_US = {"cpu": 0, "cuda": 1000}
"""A host with GPUs has cores to spare; ranks on CPUs want every one."""


def serve(config: Config, runtime_folder: Path) -> None:
    """Serve until SIGTERM or SIGINT.

    runtime_folder: private to this service, as `moe_forward.runtime_folder` makes it.
    Raises: ConfigError, CheckpointError or StartError when the service cannot start.
    """
    admin_token = _read_token(config.admin_token_file)
    if config.api_keys_file is not None:
        read_keys(config.api_keys_file)  # the application reads them again, when it follows their changes
    load_tls(config)  # front ends load it again, and follow its changes
    if config.trace_endpoint is not None:
        tracing.check_installed()
    folder = checkpoint.resolve_model(config.model)
    spec = checkpoint.read_spec(folder, config.served_model_name)
    spec = replace(spec, layers=parse_layers(config.layers, spec.layers))
    with _joined_ray(config):
        setup = _pool_setup(config, spec, folder, runtime_folder)
        # A Ray of our own takes seconds to start: what is wrong with the checkpoint or the ports is said before.
        # Describing every rank's part reads and checks the headers of all of it.
        description = checkpoint.inspect(folder, setup.rank.ranks, spec.layers)
        log.debug("%s", description)
        allow_connections(config.max_connections)
        registry = CollectorRegistry()
        metrics = Metrics(registry, expert_metrics=config.expert_metrics, tracing=config.trace_endpoint is not None)
        merged = None if config.frontends == 1 else MergedSamples(registry)
        with (
            listening(config.host, config.port) as listener,
            _metrics(config, registry if merged is None else merged.registry) as metrics_port,
            _own_ray(config, setup),
        ):
            uvloop.run(_serve(config, spec, setup, listener, metrics_port, metrics, merged, admin_token))


def _joined_ray(config: Config) -> contextlib.AbstractContextManager[None]:
    if config.ray_address is None:
        return contextlib.nullcontext()
    return joined_ray(config.ray_address, config.allow_ray_without_token)


def _own_ray(config: Config, setup: PoolSetup) -> contextlib.AbstractContextManager[None]:
    if config.ray_address is not None:
        return contextlib.nullcontext()
    return own_ray(setup.rank.ranks, setup.rank.device)


async def _serve(
    config: Config,
    spec: ModelSpec,
    setup: PoolSetup,
    listener: socket.socket,
    metrics_port: int,
    metrics: Metrics,
    merged: MergedSamples | None,
    admin_token: str | None,
) -> None:
    # After Ray: it forks to start its processes, and a front end's tracer has a thread.
    path = setup.rank.socket_path
    if merged is None:
        link = EngineLink(
            path,
            Slab(config.slab_bytes),
            poll_seconds=setup.rank.poll_seconds,
            silence_seconds=config.silence_seconds,
        )
        fronts: Front | Fronts = Front(config, spec, link, metrics, admin_token, load_tls(config), [listener])
    else:
        log.info("%d front ends with %.2f GB of shared memory each", config.frontends, config.slab_bytes / 1e9)
        what = FrontTask(0, config, spec, path, admin_token, False, setup.rank.poll_seconds)
        fronts = Fronts(what, config.frontends, listener, metrics, merged)
    supervisor = Supervisor(setup, fronts.link)
    _also_tell(fronts.link, supervisor)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    http = asyncio.create_task(fronts.serve())
    run = asyncio.create_task(_start_and_watch(config, spec, supervisor, fronts, listener, metrics_port))
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([http, run, stopped], return_when=asyncio.FIRST_COMPLETED)
        if run in done:
            await run  # raises what kept the service from starting
            done, _ = await asyncio.wait([http, stopped], return_when=asyncio.FIRST_COMPLETED)  # gave up: live says so
        if http in done:
            await http  # raises what ended the front end
        await fronts.drain(config.drain_timeout_seconds)
    finally:
        for task in (run, stopped):
            task.cancel()
        fronts.end()
        await asyncio.gather(http, run, stopped, return_exceptions=True)
        await supervisor.close()
        await fronts.close()


async def _start_and_watch(
    config: Config,
    spec: ModelSpec,
    supervisor: Supervisor,
    fronts: Front | Fronts,
    listener: socket.socket,
    metrics_port: int,
) -> None:
    await supervisor.start()
    await fronts.up()
    _greet(config, spec, listener.getsockname()[1], metrics_port)
    await supervisor.run()


def _pool_setup(config: Config, spec: ModelSpec, folder: Path, runtime_folder: Path) -> PoolSetup:
    """Resolve every `auto` and say what was chosen."""
    device, ranks = _choose_devices(config)
    if ranks > spec.num_experts:
        raise ConfigError(f"ranks: {ranks} ranks cannot share {spec.num_experts} experts")
    if config.expert_metrics:
        check_series(len(spec.layers), spec.num_experts)
    exchange_name = exchange.choose(config.exchange, ranks, device)
    experts_name = experts.choose(config.experts, device)
    threads = config.rank_threads or max(1, (os.cpu_count() or 1) // ranks)
    layers = ",".join(map(str, spec.layers))
    log.info("model %s: layers %s, %d experts, top-%d", spec.name, layers, spec.num_experts, spec.top_k)
    log.info(
        "%d ranks on %s with %d threads each, exchange %s, experts %s",
        *(ranks, device, threads, exchange_name, experts_name),
    )
    max_tokens = min(-(-config.max_step_tokens // ranks), config.max_rank_tokens)
    plan = memory_plan.plan(
        *(spec, ranks, exchange_name, experts_name, max_tokens, config.activation_scale),
        max_graph_tokens=config.max_graph_tokens,
    )
    for line in str(plan).splitlines():
        log.info("%s", line)
    rank = RankSetup(
        rank=0,
        ranks=ranks,
        generation=0,
        device=device,
        folder=folder,
        spec=spec,
        socket_path=runtime_folder / "engine.sock",
        rendezvous=runtime_folder,
        exchange=exchange_name,
        experts=experts_name,
        activation_scale=config.activation_scale,
        threads=threads,
        max_tokens=max_tokens,
        max_graph_tokens=config.max_graph_tokens,
        phase_sample_steps=config.phase_sample_steps,
        step_timeout_seconds=config.step_timeout_seconds,
        silence_seconds=config.silence_seconds,
        start_timeout_seconds=config.start_timeout_seconds,
        expert_metrics=config.expert_metrics,
        on_load_scales=config.on_load_scales,
        poll_seconds=1e-6 * (DEFAULT_POLL_US[device] if config.poll_us is None else config.poll_us),
    )
    limits = BatchLimits(
        config.max_step_tokens,
        config.max_step_requests,
        config.max_wait_us * 1e-6,
        config.max_queue_requests,
        config.max_queue_tokens,
        config.max_steps_in_flight,
    )
    return PoolSetup(
        rank,
        limits,
        runtime_folder,
        config.max_rank_restarts,
        config.start_timeout_seconds,
        joined=config.ray_address is not None,
        remote_ranks_port=config.remote_ranks_port,
        on_rank_loss=config.on_rank_loss,
    )


def _choose_devices(config: Config) -> tuple[str, int]:
    """Return cpu or cuda, and how many ranks: by this host's GPUs, or by those of the Ray cluster that was joined."""
    if config.ray_address is None:
        device = devices.choose(config.device, kernels=config.experts != "reference")
        return device, devices.choose_ranks(config.ranks, device)
    gpus = cluster_gpus()
    device = ("cuda" if gpus else "cpu") if config.device == "auto" else config.device
    if device == "cpu":
        return device, config.ranks or devices.DEFAULT_CPU_RANKS
    if gpus < (config.ranks or 1):
        raise ConfigError(f"ranks: {config.ranks or 1} ranks need a GPU each, the Ray cluster has {gpus}")
    return device, config.ranks or gpus


def _also_tell(link: EngineLink, supervisor: Supervisor) -> None:
    """Let the supervisor hear every status after whoever listens already."""
    earlier = link.on_status

    def both(status: EngineStatus) -> None:
        earlier(status)
        supervisor.on_status(status)

    link.on_status = both


@contextlib.contextmanager
def _metrics(config: Config, registry: CollectorRegistry) -> Iterator[int]:
    """Serve `registry` on the metrics port while the block runs; yields the port."""
    # the gauges beside every counter and histogram, which nobody reads
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        server, thread = start_http_server(config.metrics_port, config.host, registry)
    except OSError as error:
        raise StartError(f"metrics_port {config.metrics_port} on {config.host}: {error.strerror}") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _read_token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"admin_token_file {path}: {error.strerror}") from error
    if not token:
        raise ConfigError(f"admin_token_file {path} is empty")
    return token


def _greet(config: Config, spec: ModelSpec, port: int, metrics_port: int) -> None:
    """Print where the service is and a command that shows it working."""
    shown_host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http{'' if config.tls_certificate_file is None else 's'}://{shown_host}:{port}"
    key = "" if config.api_keys_file is None else ' -H "X-API-Key: $MOE_FORWARD_API_KEY"'
    body = f'{{\\"hidden_states\\": [[$(seq -s, {spec.hidden_size})]]}}'
    print(f"moe-forward serves {spec.name} at {url} (metrics at http://{shown_host}:{metrics_port}/metrics)")
    print("Try it:")
    print(
        f"  curl -s '{url}/v1/moe/forward?layer={spec.layers[0]}'{key} "
        f"-H 'Content-Type: application/json' -d \"{body}\"",
        flush=True,
    )
