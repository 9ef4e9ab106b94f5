"""What bench_service.py starts beside its client: a plain echo, and the service's own front end and engine.

    python bench_front.py echo PORT
    python bench_front.py engine ENGINE_SOCKET MAX_WAIT_US POLL_US
    python bench_front.py front PORT ENGINE_SOCKET RANKS POLL_US [STAGES_JSON]
    python bench_front.py asgi PORT ENGINE_SOCKET RANKS POLL_US

The front end is the service's, with its log written to standard error as in production; no Ray, no supervisor. `asgi`
is the same front end with bodies and replies as ASGI messages, as under any other server.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from profiling import Stages
from prometheus_client import CollectorRegistry

from moe_forward import logs
from moe_forward.api import create_app, server_settings
from moe_forward.batcher import BatchLimits
from moe_forward.channel import listen
from moe_forward.config import Config
from moe_forward.engine import run_engine
from moe_forward.link import EngineLink
from moe_forward.messages import Announce
from moe_forward.metrics import Metrics
from moe_forward.polling import PollingSelector
from moe_forward.slab import Slab
from moe_forward.types import GateSpec, ModelSpec

HIDDEN_SIZE = 7168
NUM_EXPERTS = 256
SPEC = ModelSpec("echo", HIDDEN_SIZE, 2048, NUM_EXPERTS, 8, 2048, (3,), 128, GateSpec("deepseek_v3", 8, 4))


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The least that any ASGI application can do with a body: take it and send the same bytes."""
    parts = []
    more = True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message["more_body"]
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    headers = [(b"content-type", b"application/vnd.safetensors"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def serve_echo(port: int) -> None:
    """Serve `echo` by uvicorn as it is, with the service's loop and parser."""
    settings = uvicorn.Config(
        echo, port=port, http="httptools", loop="uvloop", ws="none", lifespan="off", access_log=False, log_config=None
    )
    uvicorn.Server(settings).run()


def serve_engine(path: Path, max_wait_us: int, poll_us: int) -> None:
    """Run the engine as the service's actor does."""
    config = Config()
    limits = BatchLimits(
        max_step_tokens=config.max_step_tokens,
        max_step_requests=config.max_step_requests,
        max_wait_seconds=max_wait_us * 1e-6,
        max_queue_requests=config.max_queue_requests,
        max_queue_tokens=config.max_queue_tokens,
    )
    loop = asyncio.SelectorEventLoop(PollingSelector(poll_us * 1e-6))
    serving = run_engine(listen(path), limits, config.step_timeout_seconds, config.silence_seconds)
    loop.run_until_complete(serving)


def serve_front(
    port: int, path: Path, ranks: int, poll_us: int, stages: Path | None = None, direct: bool = True
) -> None:
    """Serve HTTP over the engine at `path`, whose ranks are `ranks` echoes.

    stages: write the moments of all requests here at the end. direct: bytes go between socket and slab.
    """
    config = Config(port=port, slab_bytes=256 << 20)
    logs.configure(config.log_level, config.log_format)
    recorder = None if stages is None else Stages()
    uvloop.run(_front(config, path, ranks, poll_us, direct))
    if recorder is not None and stages is not None:
        recorder.write(stages)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would send the signal again when it has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _front(config: Config, path: Path, ranks: int, poll_us: int, direct: bool) -> Coroutine[Any, Any, None]:
    async def serve() -> None:
        link = EngineLink(path, Slab(config.slab_bytes), poll_seconds=poll_us * 1e-6)
        app = create_app(config, SPEC, link, Metrics(CollectorRegistry()), None)
        link.announce(Announce(1, ranks, 0))
        link.start()
        settings = server_settings(app, config, None) if direct else server_settings(app, config, None, lambda _: False)
        settings.port = config.port
        server = _Server(settings)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.handle_exit, signal.SIGTERM, None)
        await server.serve()
        await link.close()

    return serve()


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "echo":
        serve_echo(int(given[0]))
    elif what == "engine":
        serve_engine(Path(given[0]), *map(int, given[1:]))
    elif what == "asgi":
        serve_front(int(given[0]), Path(given[1]), *map(int, given[2:]), direct=False)
    else:
        serve_front(int(given[0]), Path(given[1]), *map(int, given[2:4]), *map(Path, given[4:]))
