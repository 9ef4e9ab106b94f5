"""A rank's process: load, join the group, say hello to the engine, then step after step until it hangs up."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from moe_forward import checkpoint, experts, memory_plan
from moe_forward.channel import BlockingChannel, connect
from moe_forward.checkpoint.layout import CONFIG_FILE
from moe_forward.errors import ChannelClosed, StartError
from moe_forward.exchange import gpu_checks
from moe_forward.exchange.deadline import deadline
from moe_forward.experts import Experts
from moe_forward.interfaces import interface_of
from moe_forward.messages import AttachSlab, DetachSlab, Message, RankHello
from moe_forward.rank import Rank
from moe_forward.rank_setup import RankSetup, join_group
from moe_forward.remote_channel import RemoteChannel
from moe_forward.router import Router
from moe_forward.slab_rows import attach, detach
from moe_forward.types import RankInfo, Step, StepResult, expert_range

log = logging.getLogger(__name__)

Channel: TypeAlias = BlockingChannel | RemoteChannel
"""To an engine on this host, or on another."""

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
    if device.type == "cuda":
        gpu_checks.use_device(device)
        check_memory(setup)
    started = time.monotonic()
    experts.check(setup.experts, device)
    mine = expert_range(setup.rank, setup.ranks, setup.spec.num_experts)
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
        experts=(mine.start, mine.stop),
        memory_bytes=weight_bytes,
        load_seconds=time.monotonic() - started,
        **_gpu_memory(device, weight_bytes),
    )
    hello = RankHello(setup.generation, info, setup.exchange, setup.experts)
    try:
        channel, message, fds = _meet_engine(setup, hello)
        with contextlib.closing(channel):
            _serve(channel, message, fds, rank, setup)
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


def check_memory(setup: RankSetup) -> None:
    """Compare what this rank will need with what its GPU has free, before anything is loaded.

    Raises: StartError with the numbers where it does not fit.
    """
    device = torch.device(setup.device)
    plan = memory_plan.plan(
        setup.spec, setup.ranks, setup.exchange, setup.experts, setup.max_tokens, setup.activation_scale
    )
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
            return


def _load(setup: RankSetup, mine: range, device: torch.device) -> tuple[Experts, Router, int]:
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


def _serve(channel: Channel, message: Message, fds: list[int], rank: Rank, setup: RankSetup) -> None:
    device = torch.device(setup.device)
    slabs: dict[int, Tensor] = {}
    try:
        while True:
            if isinstance(message, Step):
                channel.send(_step(channel, message, rank, slabs, setup.rank))
            elif isinstance(message, AttachSlab):
                (fd,) = fds
                slabs[message.front] = attach(fd, message.slab_bytes, device)
                os.close(fd)
            elif isinstance(message, DetachSlab):
                if message.front in slabs:
                    detach(slabs.pop(message.front), device)
            else:
                raise TypeError(f"the engine sent a {type(message).__name__}, which ranks do not take")
            message, fds = channel.receive()
    except ChannelClosed:
        for slab in slabs.values():
            detach(slab, device)
        raise


def _step(channel: Channel, step: Step, rank: Rank, slabs: Mapping[int, Tensor], number: int) -> StepResult:
    """Do a step; what breaks it is told to the engine before it ends this process."""
    try:
        return rank.step(step, slabs)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:2000]
        channel.send(StepResult(step.step, step.generation, number, (), 0, error=reason))
        raise
