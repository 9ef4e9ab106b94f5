"""The trace that a client's request is part of: the headers `traceparent` and `tracestate` (W3C Trace Context)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """trace_id, span_id: lower-case hex, 32 and 16 digits. sampled: the client keeps the trace. state: as it came."""

    trace_id: str
    span_id: str
    sampled: bool
    state: str = ""


def trace_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """Find the trace that a request belongs to.

    headers: names in lower case, as ASGI has them.
    Returns: None where the client names none; one that is not well formed, or named twice, counts as none.
    Source: https://www.w3.org/TR/trace-context/ sections 3.2 and 3.3.
    """
    parents = [value for name, value in headers if name == b"traceparent"]
    found = _PARENT.fullmatch(parents[0].strip()) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # Version 00 ends with the flags; a later one may say more, and starts the same.
    if version == b"ff" or (version == b"00" and more) or not trace_id.strip(b"0") or not span_id.strip(b"0"):
        return None
    state = b",".join(value.strip() for name, value in headers if name == b"tracestate")
    return TraceContext(
        trace_id.decode(), span_id.decode(), bool(int(flags, 16) & _SAMPLED), state.decode("ascii", "replace")
    )
