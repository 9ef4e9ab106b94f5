"""API keys: who may call, read from a file that may be replaced at any time, and the check before anything is read."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_forward.api.errors import render
from moe_forward.api.request_id import HEADER, request_id
from moe_forward.api.watched import Watched
from moe_forward.errors import ConfigError, ErrorCode, ForwardError
from moe_forward.logs import log_request
from moe_forward.metrics import Metrics

log = logging.getLogger(__name__)

MIN_KEY_CHARACTERS = 16
"""Shorter ones can be guessed, and a file that is still being written may end in a part of one."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LOGGED_CHARACTERS = 200
HEALTH = ("/v2/health/live", "/v2/health/ready")
DOCS = ("/docs", "/docs/oauth2-redirect", "/openapi.json")
DRAIN = "/v1/drain"


def parse_keys(text: str) -> dict[bytes, str]:
    """Read keys, one a line as NAME:KEY or KEY; empty lines and lines that start with # are left out.

    Two keys may have one name, so that a new key can be handed out before the old one is taken away.
    Returns: SHA-256 of the key -> its name; `line N` for a key without one.
    Raises: ConfigError naming the line, never showing a key.
    """
    holders: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, colon, key = entry.partition(":")
        if not colon:
            name, key = f"line {number}", entry
        elif not NAME.fullmatch(name):
            raise ConfigError(f"line {number}: expected NAME:KEY with a name of letters, digits, '.', '_' and '-'")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"line {number}: expected a key of printable ASCII without spaces")
        if len(key) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"line {number}: expected a key of at least {MIN_KEY_CHARACTERS} characters, got {len(key)}"
            )
        digest = hashlib.sha256(key.encode()).digest()
        if digest in holders:
            raise ConfigError(f"line {number}: the same key as that of {holders[digest]}")
        holders[digest] = name
    if not holders:
        raise ConfigError("expected at least one key, got none")
    return holders


def read_keys(path: Path) -> dict[bytes, str]:
    """Return `parse_keys` of a file. Raises: ConfigError naming the file and what is wrong with it."""
    try:
        return parse_keys(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"api_keys_file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"api_keys_file {path}: expected UTF-8 text") from None  # the cause would show the keys
    except ConfigError as error:
        raise ConfigError(f"api_keys_file {path}: {error}") from error


class ApiKeys:
    """The keys of one file as it is now; while it is broken or missing, those it last had.

    path: of the file. clock: seconds.
    Raises: ConfigError when the file cannot be used at the start.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._watched = Watched([path], clock)
        self._holders = read_keys(path)

    def holder(self, key: bytes) -> str | None:
        """Return whose key this is, None for nobody's; how long it takes tells nothing of the keys."""
        self._renew()
        sent = hashlib.sha256(key).digest()
        found = None
        for digest, name in self._holders.items():
            if hmac.compare_digest(digest, sent):
                found = name
        return found

    def _renew(self) -> None:
        if not self._watched.changed():
            return
        try:
            self._holders = read_keys(self._path)
        except ConfigError as error:
            log.error("%s; the keys it had before stay valid", error)
        else:
            log.info("api_keys_file %s: read again, %d keys", self._path, len(self._holders))


class ApiKeyMiddleware:
    """Pure ASGI: refuses who brings no key before a byte of the body is read, and notes in the scope's state who calls.

    open_paths: answered without a key: health, since probes have none; the call that has a token of its own.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics, open_paths: Iterable[str]) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope; anything but HTTP passes untouched, and there is nothing else."""
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        sent = presented(scope["headers"])
        name = next((name for name in map(self._keys.holder, sent) if name is not None), None)
        if name is not None:
            scope["state"]["caller"] = name
            await self._app(scope, receive, send)
            return
        came = "one that is not valid" if sent else "none"
        error = ForwardError(
            ErrorCode.UNAUTHORIZED, f"Authorization (Bearer) or X-API-Key: expected an API key, got {came}"
        )
        self._metrics.rejected(error.code)
        rendered = render(error, request_id(scope))
        headers = {**dict(rendered.headers), HEADER.decode(): request_id(scope)}
        await Response(rendered.body, rendered.status, headers)(scope, receive, send)
        client = scope.get("client")
        fields = {
            "request_id": request_id(scope),
            "status": rendered.status,
            "code": error.code.slug,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:LOGGED_CHARACTERS],
        }
        log_request(log, logging.INFO, lambda: fields)


def presented(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Return the keys that a request brings: at most one in each of the two headers it may stand in."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name == b"x-api-key":
            found.setdefault(name, value.strip())
        elif name == b"authorization":
            scheme, _, credentials = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                found.setdefault(name, credentials.strip())
    return list(found.values())


def caller(scope: Scope) -> str | None:
    """Return the name of the key that a request came with, None where nobody is asked for one."""
    name: str | None = scope["state"].get("caller")
    return name
