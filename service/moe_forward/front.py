"""One front end: application, HTTP server, tracer, and the link to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator

import uvicorn

from moe_forward import tracing
from moe_forward.api import LiveContext, Reports, TlsFiles, create_app, server_settings
from moe_forward.config import Config
from moe_forward.link import EngineLink
from moe_forward.metrics import Metrics
from moe_forward.types import ModelSpec

log = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.02


def load_tls(config: Config) -> LiveContext | None:
    """Return the TLS context that the configuration asks for. Raises: ConfigError naming a file that cannot be used."""
    if config.tls_certificate_file is None or config.tls_key_file is None:
        return None
    return LiveContext(TlsFiles(config.tls_certificate_file, config.tls_key_file, config.tls_client_ca_file))


class Front:
    """Serves HTTP for one engine; made on a running loop.

    listeners: where connections come; none where they are handed over (`take`).
    link: not yet started. metrics: of this front end's requests. tls: None serves plain HTTP.
    reports, drain_others: see `create_app`.
    tracer: of this front end, None where nobody collects traces.
    """

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        link: EngineLink,
        metrics: Metrics,
        admin_token: str | None,
        tls: ssl.SSLContext | None,
        listeners: list[socket.socket],
        reports: Reports | None = None,
        drain_others: Callable[[], Awaitable[int]] | None = None,
    ) -> None:
        self.link = link
        endpoint = config.trace_endpoint
        self.tracer = None if endpoint is None else tracing.start_tracer(endpoint, metrics.export_failed)
        app = create_app(config, spec, link, metrics, admin_token, self.tracer, reports, drain_others)
        self.refuse_new: Callable[[], None] = app.state.drain
        self._availability = app.state.availability
        self._listeners = listeners
        self._server = _Server(server_settings(app, config, tls))

    @property
    def inflight(self) -> int:
        """Forwards being served."""
        return int(self._availability.inflight)

    async def serve(self) -> None:
        """Connect to the engine and serve until `end`."""
        self.link.start()
        await self._server.serve(sockets=self._listeners)

    async def up(self) -> None:
        """Wait until connections are served."""
        await self._server.up.wait()

    async def take(self, connection: socket.socket) -> None:
        """Serve a connection that somebody else accepted; returns when it is closed."""
        if self._server.should_exit:
            connection.close()
            return
        closed = asyncio.Event()
        settings = self._server.config

        def make_protocol() -> asyncio.Protocol:
            protocol: asyncio.Protocol = settings.http_protocol_class(  # type: ignore[call-arg]
                config=settings, server_state=self._server.server_state, app_state=self._server.lifespan.state
            )
            return _telling(protocol, closed.set)

        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(make_protocol, connection, ssl=settings.ssl)
        except (OSError, asyncio.TimeoutError) as error:  # TLS errors are OSErrors; a client may be gone already
            log.debug("a connection was not taken: %s", error)
            connection.close()
            return
        await closed.wait()

    async def drain(self, timeout_seconds: float) -> None:
        """Refuse what is new, and wait for the requests in flight."""
        self.refuse_new()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while self.link.inflight and loop.time() < deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        if self.link.inflight:
            log.warning("stopping with %d requests in flight after %g s", self.link.inflight, timeout_seconds)

    def end(self) -> None:
        """Have `serve` return soon, when replies that are being sent are out."""
        self._server.should_exit = True

    async def close(self) -> None:
        """Hang up on the engine and send the last spans, after `serve` has returned."""
        await self.link.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the service drains first. up: it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Note when it has started."""
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _telling(protocol: asyncio.Protocol, lost: Callable[[], None]) -> asyncio.Protocol:
    """Have `lost` called when a connection is closed, whatever class serves it."""
    inner = protocol.connection_lost

    def connection_lost(error: Exception | None) -> None:
        inner(error)
        lost()

    protocol.connection_lost = connection_lost  # type: ignore[method-assign,assignment]
    return protocol
