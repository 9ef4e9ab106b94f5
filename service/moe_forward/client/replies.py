"""What came back from the service, and which error it stands for."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from moe_forward.client.errors import (
    DeadlineExceeded,
    MoEForwardClientError,
    RequestRefused,
    ServerFailed,
    TransportFailed,
    Unavailable,
)

QUOTED_CHARACTERS = 200
"""How much of an unexpected body an error message shows."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP reply. headers: looked up without regard to case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def reply_error(reply: Reply, request_id: str) -> MoEForwardClientError:
    """The error that a reply without a result stands for.

    reply: any status that the call does not take as success.
    request_id: what the call was sent with, for replies that name none.
    """
    document = _error_document(reply)
    sentence, code = document.get("error"), document.get("code")
    details: dict[str, Any] = {
        "status": reply.status,
        "code": code if isinstance(code, str) else "",
        "request_id": str(document.get("request_id") or request_id),
    }
    message = sentence if isinstance(sentence, str) and sentence else _describe(reply)
    if reply.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        unavailable = Unavailable(message, **details)
        unavailable.retry_after_seconds = parse_retry_after(reply.headers.get("retry-after"))
        return unavailable
    if reply.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.GATEWAY_TIMEOUT):
        return DeadlineExceeded(message, **details)
    if 400 <= reply.status < 500:
        return RequestRefused(message, **details)
    if 500 <= reply.status < 600:
        return ServerFailed(message, **details)
    return TransportFailed(message, **details)


def json_object(reply: Reply) -> dict[str, Any]:
    """The JSON object of a reply; an empty body is an empty object.

    Raises: TransportFailed when the body is something else.
    """
    if not reply.body:
        return {}
    try:
        document = json.loads(reply.body)
    except ValueError as error:
        raise TransportFailed(f"the reply must be JSON: {_describe(reply)}", status=reply.status) from error
    if not isinstance(document, dict):
        raise TransportFailed(f"the reply must be a JSON object: {_describe(reply)}", status=reply.status)
    return document


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3).

    Returns: at least 0; None when the header is absent or holds neither.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None  # a header nobody can read tells nothing: the client's own backoff applies
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _error_document(reply: Reply) -> dict[str, Any]:
    try:
        document = json.loads(reply.body)
    except ValueError:
        return {}  # a proxy in between answers with a page of its own: the caller quotes it
    return document if isinstance(document, dict) else {}


def _describe(reply: Reply) -> str:
    text = reply.body[:QUOTED_CHARACTERS].decode("utf-8", "replace").strip()
    return f"the server answered {reply.status} with {text!r}" if text else f"the server answered {reply.status}, empty"
