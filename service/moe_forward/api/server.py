"""How uvicorn serves an application: its settings, and what the event loop sees of each connection."""

from __future__ import annotations

import asyncio
import functools
import math
import ssl
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from moe_forward.api.bounded import ConnectionLimits
from moe_forward.api.buffers import Buffers
from moe_forward.api.connections import Connection
from moe_forward.api.heads import Heads
from moe_forward.api.tensor_paths import is_tensor_path
from moe_forward.config import Config


def server_settings(
    app: ASGIApp,
    config: Config,
    tls: ssl.SSLContext | None,
    takes_body: Callable[[str], bool] = is_tensor_path,
) -> uvicorn.Config:
    """Return how uvicorn serves `app`.

    tls: None serves plain HTTP. takes_body: whether what `app` does at a path asks the request's peer for its body.
    """
    limits = ConnectionLimits(
        config.max_connections, config.max_header_bytes, config.header_timeout_seconds, config.body_timeout_seconds
    )
    settings = uvicorn.Config(
        app,
        # called like the class it makes
        http=functools.partial(_accept, limits, Buffers(), Heads(), takes_body),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # the log says who connected, not what X-Forwarded-For claims
        server_header=False,
        timeout_keep_alive=config.keep_alive_seconds,
        timeout_graceful_shutdown=math.ceil(config.drain_timeout_seconds),
    )
    settings.load()
    settings.ssl = tls  # uvicorn would make one of its own from files
    return settings


def _accept(*arguments: Any, **options: Any) -> Intake:
    return Intake(Connection(*arguments, **options))


class Intake(asyncio.BufferedProtocol):
    """What the event loop sees of a `Connection`: loops take it from its class whether a protocol names the memory that
    is read into, and uvicorn's class says no."""

    def __init__(self, connection: Connection) -> None:
        self.connection_made = connection.connection_made  # type: ignore[assignment]
        self.connection_lost = connection.connection_lost  # type: ignore[method-assign]
        self.eof_received = connection.eof_received  # type: ignore[method-assign]
        self.pause_writing = connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = connection.resume_writing  # type: ignore[method-assign]
        self.get_buffer = connection.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = connection.buffer_updated  # type: ignore[method-assign]
