"""Every request has an id: the client's, where it sent a usable one, else a new one. Every reply carries it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
MAX_CHARACTERS = 128
_ACCEPTED = re.compile(rb"[ -~]{1,%d}" % MAX_CHARACTERS)


def _numbered() -> Callable[[], str]:
    start, numbers = os.urandom(10).hex(), itertools.count(int.from_bytes(os.urandom(5), "little"))
    return lambda: f"{start}{next(numbers):012x}"


new_request_id = _numbered()
"""Return an id of 32 hex digits that no other process and no earlier request has: random, then counting."""


def accepted(value: bytes) -> bool:
    """Whether a client's id is 1 to 128 printable ASCII characters, so safe in a header, a log line and JSON."""
    return _ACCEPTED.fullmatch(value) is not None


def request_id(scope: Scope) -> str:
    """Return the id that `RequestIdMiddleware` gave to this request."""
    value: str = scope["state"]["request_id"]
    return value


def note_request_id(scope: Scope) -> str:
    """Choose the id of a request, note it in the scope's state, and return it."""
    value = ""
    for name, sent in scope["headers"]:
        if name == HEADER:
            value = sent.decode("ascii") if accepted(sent) else ""
            break
    value = value or new_request_id()
    scope.setdefault("state", {})["request_id"] = value
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
        value = note_request_id(scope).encode("ascii")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                if all(name != HEADER for name, _ in headers):
                    message = {**message, "headers": [*headers, (HEADER, value)]}
            await send(message)

        await self._app(scope, receive, send_with_id)
