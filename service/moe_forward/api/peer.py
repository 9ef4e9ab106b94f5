"""The client of one tensor call: its body comes in, the reply goes out, and it may leave.

Over a server of ours (`moe_forward.api.connections`) the bytes go between socket and slab without an application
server's copies; over any other server they go by ASGI messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from moe_forward.api.body import disconnected, receive_body
from moe_forward.api.reply import send_reply

EXTENSION = "moe_forward.peer"
"""Where a connection of ours puts its `Peer` into a scope's extensions."""

Headers = Sequence[tuple[str, str]]


class Peer(Protocol):
    """Who sent a request.

    notes: what was made of the request's head where the same one came before; who adds to it uses a key of his own,
        and adds only what follows from the head.
    """

    notes: dict[object, Any]

    async def receive_body(self, target: memoryview, timeout_seconds: float) -> None:
        """Fill `target` with the body; nothing writes to it after this has returned or raised.

        Raises: ForwardError BODY_TIMEOUT or MALFORMED_BODY; ClientDisconnected.
        """

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Have `on_gone` called once when the client leaves; only after its whole body has come."""

    def unwatch(self) -> None:
        """Nobody wants to know any more."""

    async def send_reply(
        self,
        status: int,
        headers: Headers,
        head: bytes,
        body: memoryview | bytes,
        release: Callable[[], None],
        chunk_timeout_seconds: float,
    ) -> None:
        """Send `head` and `body` as one reply; `release` is called once nothing of `body` is needed any more.

        Raises: ClientDisconnected when the client takes too long to make room for one more chunk.
        """


class AsgiPeer:
    """A client behind any ASGI server."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.notes: dict[object, Any] = {}
        self._receive = receive
        self._send = send
        self._watching: asyncio.Task[None] | None = None

    async def receive_body(self, target: memoryview, timeout_seconds: float) -> None:
        """See `Peer`."""
        await receive_body(self._receive, target, timeout_seconds)

    def watch(self, on_gone: Callable[[], None]) -> None:
        """See `Peer`."""

        def ended(watching: asyncio.Task[None]) -> None:
            if not watching.cancelled():
                on_gone()
                watching.result()

        self._watching = asyncio.ensure_future(disconnected(self._receive))
        self._watching.add_done_callback(ended)

    def unwatch(self) -> None:
        """See `Peer`."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def send_reply(
        self,
        status: int,
        headers: Headers,
        head: bytes,
        body: memoryview | bytes,
        release: Callable[[], None],
        chunk_timeout_seconds: float,
    ) -> None:
        """See `Peer`."""
        await send_reply(self._send, status, headers, head, body, release, chunk_timeout_seconds)


def peer_of(scope: Scope, receive: Receive, send: Send) -> Peer:
    """Return who sent the request of `scope`."""
    extensions = scope.get("extensions")
    peer: Peer | None = None if extensions is None else extensions.get(EXTENSION)
    return AsgiPeer(receive, send) if peer is None else peer
