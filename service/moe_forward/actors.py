"""What runs in Ray's processes: the engine, the gateway and the ranks, each in one call that lasts as long as it."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from moe_forward import handshake
from moe_forward.batcher import BatchLimits
from moe_forward.channel import listen
from moe_forward.devices import cuda_index
from moe_forward.engine import run_engine
from moe_forward.errors import StartError
from moe_forward.exchange import Meeting
from moe_forward.gateway import Gateway
from moe_forward.handshake import Address
from moe_forward.rank_process import run_rank
from moe_forward.rank_setup import RankSetup

BACKLOG_CONNECTIONS = 1024
"""More than there are ranks: all of them connect at once."""


class EngineProcess:
    """What the engine's actor does."""

    def run(
        self, socket_path: Path, limits: BatchLimits, step_timeout_seconds: float, rank_silence_seconds: float
    ) -> None:
        """Serve until killed."""
        # epoll rounds timeouts up to a millisecond, select does not; the engine has few sockets and short waits.
        loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        serving = run_engine(listen(socket_path), limits, step_timeout_seconds, rank_silence_seconds)
        loop.run_until_complete(serving)


class GatewayProcess:
    """What the gateway's actor does, beside the engine."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def listen(self, host: str, port: int) -> int:
        """Listen for ranks of other hosts; returns the port. Raises: StartError when it cannot be had."""
        try:
            self._listener = handshake.listen(host, port, BACKLOG_CONNECTIONS)
        except OSError as error:
            raise StartError(f"remote_ranks_port {port} on {host}: {error.strerror}") from error
        return int(self._listener.getsockname()[1])

    def run(self, address: Address, port: int, socket_path: Path, ranks: int) -> None:
        """Let ranks in until killed. address: its port is `port`, as `listen` returned it."""
        assert self._listener is not None
        Gateway(replace(address, port=port), socket_path, ranks).serve(self._listener)


class RankProcess:
    """What a rank's actor does."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def meet(self, host: str) -> int:
        """Bind the port at which the group will meet, on rank 0; returns the port."""
        self._listener = handshake.listen(host, 0, BACKLOG_CONNECTIONS)
        return int(self._listener.getsockname()[1])

    def run(self, setup: RankSetup, gateway_port: int | None, meeting_port: int | None) -> None:
        """Serve steps until the engine hangs up or this process is killed.

        gateway_port, meeting_port: where `setup` lacks them, as they were not known before.
        """
        if setup.gateway is not None and gateway_port is not None:
            setup = replace(setup, gateway=replace(setup.gateway, port=gateway_port))
        if isinstance(setup.rendezvous, Meeting) and meeting_port is not None:
            listener = self._listener.detach() if self._listener is not None else None
            setup = replace(setup, rendezvous=replace(setup.rendezvous, port=meeting_port, listener=listener))
        if setup.device == "cuda":
            (gpu,) = ray.get_gpu_ids()
            setup = replace(setup, device=f"cuda:{cuda_index(str(gpu), os.environ.get('CUDA_VISIBLE_DEVICES'))}")
        run_rank(setup)


# Ray must not restart them by itself: the supervisor replaces a group as a whole.
EngineActor: Any = ray.remote(num_cpus=0, max_restarts=0)(EngineProcess)
GatewayActor: Any = ray.remote(num_cpus=0, max_restarts=0)(GatewayProcess)
RankActor: Any = ray.remote(num_cpus=1, max_restarts=0)(RankProcess)
