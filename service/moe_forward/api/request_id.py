"""Every request has an id: the client's, where it sent a usable one, else a new one. Every reply carries it."""

from __future__ import annotations

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
MAX_CHARACTERS = 128


def accepted(value: bytes) -> bool:
    """Whether a client's id is 1 to 128 printable ASCII characters, so safe in a header, a log line and JSON."""
    return 0 < len(value) <= MAX_CHARACTERS and all(0x20 <= byte <= 0x7E for byte in value)


def request_id(scope: Scope) -> str:
    """Return the id that `RequestIdMiddleware` gave to this request."""
    value: str = scope["state"]["request_id"]
    return value


class RequestIdMiddleware:
    """Pure ASGI: notes the id in the scope's state and adds the X-Request-Id header to the reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope; anything but HTTP passes untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == HEADER), b"")
        value = sent if accepted(sent) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = value.decode("ascii")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, value)]}
            await send(message)

        await self._app(scope, receive, send_with_id)
