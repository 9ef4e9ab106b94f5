"""How an error becomes an HTTP reply: the one table of statuses, and the one body all errors share."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from moe_forward.errors import ErrorCode, ForwardError

STATUS = {
    ErrorCode.MALFORMED_REQUEST: 400,
    ErrorCode.MALFORMED_BODY: 400,
    ErrorCode.MISSING_TENSOR: 400,
    ErrorCode.UNEXPECTED_TENSOR: 400,
    ErrorCode.WRONG_DTYPE: 400,
    ErrorCode.WRONG_SHAPE: 400,
    ErrorCode.OUT_OF_RANGE: 400,
    ErrorCode.INVALID_PARAMETER: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.LAYER_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.HEADER_TIMEOUT: 408,
    ErrorCode.BODY_TIMEOUT: 408,
    ErrorCode.LENGTH_REQUIRED: 411,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    ErrorCode.NON_FINITE: 422,
    ErrorCode.QUEUE_FULL: 429,
    ErrorCode.HEADERS_TOO_LARGE: 431,
    ErrorCode.CANCELLED: 499,  # counted, seldom sent: the client that would read it has left
    ErrorCode.INTERNAL: 500,
    ErrorCode.NOT_READY: 503,
    ErrorCode.DRAINING: 503,
    ErrorCode.RANK_LOST: 503,
    ErrorCode.TOO_MANY_CONNECTIONS: 503,
    ErrorCode.DEADLINE_EXCEEDED: 504,
}

RETRY_AFTER_SECONDS = {
    ErrorCode.QUEUE_FULL: 1.0,
    ErrorCode.NOT_READY: 5.0,
    ErrorCode.DRAINING: 5.0,
    ErrorCode.RANK_LOST: 5.0,
    ErrorCode.TOO_MANY_CONNECTIONS: 1.0,
}
"""When to try again, where whoever raised the error did not say."""

EXTRA_HEADERS = {
    ErrorCode.UNAUTHORIZED: (("www-authenticate", "Bearer"),),
    ErrorCode.METHOD_NOT_ALLOWED: (("allow", "POST"),),  # of the tensor routes; the framework names its own
    # the rest of the body never came: whatever follows on this connection cannot be told from it
    ErrorCode.BODY_TIMEOUT: (("connection", "close"),),
    # refused before there was a request: nothing can follow on this connection
    ErrorCode.MALFORMED_REQUEST: (("connection", "close"),),
    ErrorCode.HEADERS_TOO_LARGE: (("connection", "close"),),
    ErrorCode.HEADER_TIMEOUT: (("connection", "close"),),
    ErrorCode.TOO_MANY_CONNECTIONS: (("connection", "close"),),
}

FRAMEWORK_CODES = {
    400: ErrorCode.MALFORMED_BODY,
    401: ErrorCode.UNAUTHORIZED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    413: ErrorCode.TOO_LARGE,
    415: ErrorCode.UNSUPPORTED_MEDIA_TYPE,
}
"""Code for an HTTP status that the framework raised by itself."""


class ErrorReply(NamedTuple):
    """status: HTTP. headers: names in lower case. body: the JSON object, UTF-8."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def retry_after(error: ForwardError) -> str | None:
    """Return the Retry-After value, whole seconds and at least 1 (RFC 9110 10.2.3), or None."""
    seconds = error.retry_after_seconds
    if seconds is None:
        seconds = RETRY_AFTER_SECONDS.get(error.code)
    return None if seconds is None else str(max(1, math.ceil(seconds)))


def render(error: ForwardError, request_id: str) -> ErrorReply:
    """Render a refusal as every route answers it: `{"error", "code", "request_id"}`."""
    fields = {"error": error.message, "code": error.code.slug, "request_id": request_id}
    body = json.dumps(fields, separators=(",", ":")).encode()
    headers = [("content-type", "application/json")]
    wait = retry_after(error)
    if wait is not None:
        headers.append(("retry-after", wait))
    headers.extend(EXTRA_HEADERS.get(error.code, ()))
    return ErrorReply(STATUS[error.code], tuple(headers), body)
