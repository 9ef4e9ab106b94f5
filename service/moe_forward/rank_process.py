"""A rank's process: load, join the group, say hello to the engine, then step after step until it hangs up."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moe_forward import checkpoint, exchange, experts
from moe_forward.channel import BlockingChannel, connect
from moe_forward.errors import ChannelClosed, StartError
from moe_forward.messages import AttachSlab, DetachSlab, Message, RankHello
from moe_forward.rank import Rank
from moe_forward.slab_rows import attach
from moe_forward.types import PHASES, ActivationScale, ModelSpec, RankInfo, Step, StepResult, expert_range

log = logging.getLogger(__name__)

JOIN_SECONDS = 60.0
JOIN_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class RankSetup:
    """Everything a rank's process is told at its start.

    folder: the checkpoint. socket_path: where the engine listens. rendezvous: the group's meeting file.
    exchange, experts: names as resolved, never `auto`. threads: for torch. step_timeout_seconds: of one collective.
    """

    rank: int
    ranks: int
    generation: int
    folder: Path
    spec: ModelSpec
    socket_path: Path
    rendezvous: Path
    exchange: str
    experts: str
    activation_scale: ActivationScale
    threads: int
    step_timeout_seconds: float


def run_rank(setup: RankSetup) -> None:
    """Serve steps until the engine hangs up.

    Raises: CheckpointError or StartError when the shard cannot be loaded; whatever broke a step, after telling the
    engine, since the group's collectives cannot go on without this rank.
    """
    # Gloo listens on the address of the host's name unless told otherwise: keep to loopback on one host.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(setup.threads)
    started = time.monotonic()
    mine = expert_range(setup.rank, setup.ranks, setup.spec.num_experts)
    layers = _load(setup, mine)
    group = exchange.create(
        setup.exchange,
        exchange.Place(setup.rank, setup.ranks, setup.spec.num_experts, setup.rendezvous, setup.step_timeout_seconds),
    )
    local_experts = experts.create(
        setup.experts,
        {layer: experts.LayerExperts(weights.experts, weights.shared) for layer, weights in layers.items()},
        setup.activation_scale,
    )
    rank = Rank(setup.rank, setup.ranks, setup.spec, layers, group, local_experts, setup.activation_scale)
    rank.warm_up()
    info = RankInfo(
        setup.rank,
        "ready",
        time.time(),
        pid=os.getpid(),
        node=socket.gethostname(),
        device="cpu",
        experts=(mine.start, mine.stop),
        memory_bytes=sum(weights.nbytes for weights in layers.values()),
        load_seconds=time.monotonic() - started,
    )
    hello = RankHello(setup.generation, info, group.name, setup.experts)
    try:
        channel, message, fds = _join(setup, hello)
        with contextlib.closing(channel):
            _serve(channel, message, fds, rank, setup)
    except ChannelClosed:
        log.info("rank %d: the engine hung up", setup.rank)
    finally:
        group.close()


def _join(setup: RankSetup, hello: RankHello) -> tuple[BlockingChannel, Message, list[int]]:
    """Say hello until the engine takes this rank in, and return the channel with the first message and descriptors.

    All processes start at once: the engine may not listen yet, or hang up because it has not heard of the group yet.
    """
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        with contextlib.ExitStack() as on_failure:
            try:
                channel = BlockingChannel(connect(setup.socket_path))
                on_failure.callback(channel.close)
                channel.send(hello)
                message, fds = channel.receive()
            except (OSError, ChannelClosed) as error:
                if time.monotonic() >= deadline:
                    raise StartError(f"the engine did not take the rank in for {JOIN_SECONDS:g} s: {error}") from error
            else:
                on_failure.pop_all()
                return channel, message, fds
        time.sleep(JOIN_POLL_SECONDS)


def _load(setup: RankSetup, mine: range) -> dict[int, checkpoint.LayerWeights]:
    with tqdm(
        desc=f"loading rank {setup.rank}", unit="B", unit_scale=True, mininterval=1.0, disable=setup.rank != 0
    ) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        return checkpoint.load_shard(setup.folder, setup.spec, setup.spec.layers, mine, show)


def _serve(channel: BlockingChannel, message: Message, fds: list[int], rank: Rank, setup: RankSetup) -> None:
    slabs: dict[int, Tensor] = {}
    while True:
        if isinstance(message, Step):
            try:
                result = rank.step(message, slabs)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:2000]
                failed = (0.0,) * len(PHASES)
                channel.send(StepResult(message.step, message.generation, setup.rank, failed, 0, error=reason))
                raise
            channel.send(result)
        elif isinstance(message, AttachSlab):
            (fd,) = fds
            slabs[message.front] = attach(fd, message.slab_bytes)
            os.close(fd)
        elif isinstance(message, DetachSlab):
            slabs.pop(message.front, None)
        else:
            raise TypeError(f"the engine sent a {type(message).__name__}, which ranks do not take")
        message, fds = channel.receive()
