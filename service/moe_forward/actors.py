"""What runs in Ray's processes beside the ranks: the engine and the gateway, each in one call that lasts as long as it.

Neither touches a tensor. Without torch, which this must not import, they start in a second and need 60 MB.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from moe_forward import handshake
from moe_forward.batcher import BatchLimits
from moe_forward.channel import listen
from moe_forward.engine import run_engine
from moe_forward.errors import StartError
from moe_forward.gateway import Gateway
from moe_forward.handshake import Address
from moe_forward.polling import PollingSelector


class EngineProcess:
    """What the engine's actor does."""

    def run(
        self,
        socket_path: Path,
        limits: BatchLimits,
        step_timeout_seconds: float,
        silence_seconds: float,
        poll_seconds: float,
    ) -> None:
        """Serve until killed."""
        loop = asyncio.SelectorEventLoop(PollingSelector(poll_seconds))
        serving = run_engine(listen(socket_path), limits, step_timeout_seconds, silence_seconds)
        loop.run_until_complete(serving)


class GatewayProcess:
    """What the gateway's actor does, beside the engine."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def listen(self, host: str, port: int) -> int:
        """Listen for ranks of other hosts; returns the port. Raises: StartError when it cannot be had."""
        try:
            self._listener = handshake.listen(host, port)
        except OSError as error:
            raise StartError(f"remote_ranks_port {port} on {host}: {error.strerror}") from error
        return int(self._listener.getsockname()[1])

    def run(self, address: Address, port: int, socket_path: Path, ranks: int) -> None:
        """Let ranks in until killed. address: its port is `port`, as `listen` returned it."""
        assert self._listener is not None
        Gateway(replace(address, port=port), socket_path, ranks).serve(self._listener)


# Ray must not restart them by itself: the supervisor replaces a group as a whole.
EngineActor: Any = ray.remote(num_cpus=0, max_restarts=0)(EngineProcess)
GatewayActor: Any = ray.remote(num_cpus=0, max_restarts=0)(GatewayProcess)
