"""A service in a thread of this process: front end, engine and one rank as they are, and no Ray to start them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry

from moe_forward import checkpoint
from moe_forward.api import create_app
from moe_forward.batcher import BatchLimits
from moe_forward.channel import listen
from moe_forward.config import Config
from moe_forward.engine import run_engine
from moe_forward.link import EngineLink
from moe_forward.messages import Announce
from moe_forward.metrics import Metrics
from moe_forward.rank_process import run_rank
from moe_forward.rank_setup import RankSetup
from moe_forward.slab import Slab

START_SECONDS = 60.0
STOP_SECONDS = 20.0


class InProcess:
    """Serves a checkpoint on one CPU rank until it is closed.

    model: checkpoint folder. config: further keys of the configuration.
    """

    def __init__(self, model: Path, config: dict[str, Any]) -> None:
        self._config = Config(model=str(model), ranks=1, **config)
        self._spec = checkpoint.read_spec(model)
        self._folder = Path(tempfile.mkdtemp(prefix="moe-"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"service of {self._spec.name}")
        self._thread.start()

    def wait_ready(self) -> None:
        """Wait until it takes requests."""
        assert self._ready.wait(START_SECONDS), f"{self._spec.name} is not ready after {START_SECONDS:g} s"

    def close(self) -> None:
        """Stop all parts and remove what they left."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_SECONDS)
        assert not self._thread.is_alive(), f"the service of {self._spec.name} does not end"
        shutil.rmtree(self._folder)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _serve(self) -> None:
        config, setup = self._config, self._rank_setup()
        slab = Slab(config.slab_bytes)
        link = EngineLink(setup.socket_path, slab)
        app = create_app(config, self._spec, link, Metrics(CollectorRegistry()), None)
        limits = BatchLimits(
            config.max_step_tokens,
            config.max_step_requests,
            config.max_wait_us * 1e-6,
            config.max_queue_requests,
            config.max_queue_tokens,
        )
        engine = asyncio.create_task(run_engine(listen(setup.socket_path), limits, config.step_timeout_seconds))
        rank = asyncio.create_task(asyncio.to_thread(run_rank, setup))
        server = _Server(uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None))
        http = asyncio.create_task(server.serve(sockets=[self._listener]))
        link.start()
        link.announce(Announce(setup.generation, setup.ranks, 0))
        try:
            while not link.status.ready:
                assert not rank.done(), f"the rank ended: {rank.exception()}"
                await asyncio.sleep(0.01)
            self._ready.set()
            await self._stop.wait()
        finally:
            server.should_exit = True
            await http
            await link.close()
            engine.cancel()  # it hangs up on the rank, which ends by that
            await asyncio.gather(engine, rank, return_exceptions=True)
            slab.close()

    def _rank_setup(self) -> RankSetup:
        config = self._config
        return RankSetup(
            rank=0,
            ranks=1,
            generation=1,
            device="cpu",
            folder=Path(config.model),
            spec=self._spec,
            socket_path=self._folder / "engine.sock",
            rendezvous=self._folder / "group-1",
            exchange="local",
            experts="reference",
            activation_scale=config.activation_scale,
            threads=1,
            max_tokens=config.max_step_tokens,
            max_graph_tokens=0,
            phase_sample_steps=config.phase_sample_steps,
            step_timeout_seconds=config.step_timeout_seconds,
            start_timeout_seconds=config.start_timeout_seconds,
        )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which only a main thread can have."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
