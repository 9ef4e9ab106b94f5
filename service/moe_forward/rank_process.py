"""A rank's process: load, join the group, say hello to the engine, then step after step until it hangs up."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from functools import partial

import torch
from tqdm import tqdm

from moe_forward import checkpoint, experts
from moe_forward.channel import BlockingChannel, connect
from moe_forward.checkpoint.layout import CONFIG_FILE
from moe_forward.errors import ChannelClosed, StartError
from moe_forward.exchange import gpu_checks
from moe_forward.exchange.deadline import deadline
from moe_forward.expert_map import hull
from moe_forward.experts import Experts
from moe_forward.heartbeat import beating
from moe_forward.interfaces import interface_of
from moe_forward.messages import Heartbeat, Message, RankHello
from moe_forward.rank_loop import Channel, RankLoop
from moe_forward.rank_setup import RankSetup, join_group, planned_memory
from moe_forward.remote_channel import RemoteChannel
from moe_forward.router import Router
from moe_forward.types import RankInfo

log = logging.getLogger(__name__)

JOIN_SECONDS = 60.0
JOIN_POLL_SECONDS = 0.05
FREE_MEMORY_SECONDS = 30.0
"""How long the driver may take to give back the GPU memory of a rank that was killed."""


def run_rank(setup: RankSetup) -> None:
    """Serve steps until the engine hangs up.

    Raises: CheckpointError or StartError when the shard cannot be loaded or does not fit; whatever broke a step, after
    telling the engine, since the group's collectives cannot go on without this rank.
    """
    # Gloo and NCCL listen on the address of the host's name unless told otherwise: keep to loopback on one host.
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or interface_of(setup.host)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    check_folder(setup)
    torch.set_num_threads(setup.threads)
    device = torch.device(setup.device)
    capacity_bytes = 0
    if device.type == "cuda":
        gpu_checks.use_device(device)
        capacity_bytes = check_memory(setup)
    started = time.monotonic()
    experts.check(setup.experts, device)
    mine = setup.experts_held
    local_experts, router, weight_bytes = _load(setup, mine, device)
    with deadline(setup.start_timeout_seconds, f"rank {setup.rank}: joining its group and warming up"):
        rank = join_group(setup, router, local_experts)
        rank.warm_up()
    info = RankInfo(
        setup.rank,
        "ready",
        time.time(),
        pid=os.getpid(),
        node=socket.gethostname(),
        device=setup.device,
        experts=hull(mine),
        memory_bytes=weight_bytes,
        load_seconds=time.monotonic() - started,
        capacity_bytes=capacity_bytes,
        **_gpu_memory(device, weight_bytes),
    )
    hello = RankHello(setup.generation, info, setup.exchange, setup.experts)
    try:
        channel, message, fds = _meet_engine(setup, hello)
        beat = partial(channel.send, Heartbeat(setup.generation, setup.rank))
        with contextlib.closing(channel), beating(beat, setup.silence_seconds):
            RankLoop(channel, rank, setup.rank, device, setup.poll_seconds).serve(message, fds)
    except ChannelClosed:
        log.info("rank %d: the engine hung up", setup.rank)
    # Not after an error: a broken step leaves collectives unfinished, and leaving the group would wait for them.
    rank.close()


def check_folder(setup: RankSetup) -> None:
    """See that this host has the checkpoint where the service's host has it.

    Raises: StartError.
    """
    config = setup.folder / CONFIG_FILE
    if not os.access(config, os.R_OK):
        raise StartError(
            f"rank {setup.rank} on node {socket.gethostname()} ({setup.host}) cannot read {config}: every node needs "
            "the checkpoint at the same path, on a shared file system or as a copy"
        )


def check_memory(setup: RankSetup) -> int:
    """Compare what this rank will need with what its GPU has free, before anything is loaded; returns the bytes free.

    Raises: StartError with the numbers where it does not fit.
    """
    device = torch.device(setup.device)
    plan = planned_memory(setup)
    patience_seconds = FREE_MEMORY_SECONDS if setup.generation > 1 else 0.0
    give_up = time.monotonic() + patience_seconds
    while True:
        free_bytes, _ = torch.cuda.mem_get_info(device)
        try:
            plan.check(free_bytes)
        except StartError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(1.0)
        else:
            return free_bytes


def _load(setup: RankSetup, mine: tuple[int, ...], device: torch.device) -> tuple[Experts, Router, int]:
    """Bring this rank's weights to where it computes; returns experts, router and the bytes they hold."""
    on_gpu = device.type == "cuda"
    with tqdm(
        desc=f"loading rank {setup.rank}", unit="B", unit_scale=True, mininterval=1.0, disable=setup.rank != 0
    ) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        # What goes to a GPU is only mapped here: bringing it over reads it.
        layers = checkpoint.load_shard(
            setup.folder, setup.spec, setup.spec.layers, mine, show, not on_gpu, setup.on_load_scales
        )
        held = {layer: experts.LayerExperts(weights.experts, weights.shared) for layer, weights in layers.items()}
        local_experts = experts.create(setup.experts, held, setup.activation_scale, device, show)
    router = Router(setup.spec, layers, device)
    if on_gpu:
        return local_experts, router, torch.cuda.memory_allocated(device)
    return local_experts, router, sum(weights.nbytes for weights in layers.values())


def _gpu_memory(device: torch.device, weight_bytes: int) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {"buffer_bytes": total_bytes - free_bytes - weight_bytes, "free_bytes": free_bytes}


def _meet_engine(setup: RankSetup, hello: RankHello) -> tuple[Channel, Message, list[int]]:
    """Say hello until the engine takes this rank in, and return the channel with the first message and descriptors.

    All processes start at once: the engine may not listen yet, or hang up because it has not heard of the group yet.
    """
    give_up = time.monotonic() + JOIN_SECONDS
    while True:
        with contextlib.ExitStack() as on_failure:
            try:
                channel = _call_engine(setup)
                on_failure.callback(channel.close)
                channel.send(hello)
                message, fds = channel.receive()
            except (OSError, ChannelClosed) as error:
                if time.monotonic() >= give_up:
                    raise StartError(f"the engine did not take the rank in for {JOIN_SECONDS:g} s: {error}") from error
            else:
                on_failure.pop_all()
                return channel, message, fds
        time.sleep(JOIN_POLL_SECONDS)


def _call_engine(setup: RankSetup) -> Channel:
    if setup.gateway is not None:
        return RemoteChannel(setup.gateway, setup.rank, setup.ranks)
    return BlockingChannel(connect(setup.socket_path))
