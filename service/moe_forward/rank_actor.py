"""What runs in the Ray process of a rank, in one call that lasts as long as the rank."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import Any

import ray

from moe_forward import handshake
from moe_forward.devices import cuda_index
from moe_forward.exchange import Meeting
from moe_forward.rank_process import run_rank
from moe_forward.rank_setup import RankSetup


class RankProcess:
    """What a rank's actor does."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def meet(self, host: str) -> int:
        """Bind the port at which the group will meet, on rank 0; returns the port."""
        self._listener = handshake.listen(host, 0)
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


# Ray must not restart it by itself: the supervisor replaces a group as a whole.
RankActor: Any = ray.remote(num_cpus=1, max_restarts=0)(RankProcess)
