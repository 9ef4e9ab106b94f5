"""What is known of one forward request when it ends; its log line, its metrics and its spans are made from it."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from typing import Any

from moe_forward.errors import ErrorCode
from moe_forward.types import ForwardResult

_NOT_LOGGED = ("sampled", "moments", "result")


@dataclass(slots=True)
class Moments:
    """When the parts of a request began (time.perf_counter); None for a part that was not reached.

    handed_over, answered: by and to the front end, the engine's part between them. sending: the reply.
    """

    started: float = 0.0
    decoding: float | None = None
    handed_over: float | None = None
    answered: float | None = None
    encoding: float | None = None
    sending: float | None = None


@dataclass(slots=True)
class RequestRecord:
    """One forward request, filled in on its way.

    route: path template. model: the served model, whatever name the client sent.
    status: HTTP status, 499 where the client went away. code: None when answered.
    encoding, layer, tokens, body_bytes: None until known.
    error: the sentence of a 5xx; that of a 4xx may quote what the client sent, so it is not kept.
    *_seconds: None for a part that was not reached; `duration_seconds` is the whole request.
    trace_id: of the trace it is part of, as hex, or None. sampled: somebody keeps that trace.
    caller: name of the API key it came with, None where nobody is asked for one.
    moments, result: for its spans; the log line does not repeat them.
    """

    route: str
    request_id: str
    model: str
    status: int = 200
    code: ErrorCode | None = None
    encoding: str | None = None
    layer: int | None = None
    tokens: int | None = None
    body_bytes: int | None = None
    decode_seconds: float | None = None
    encode_seconds: float | None = None
    queue_seconds: float | None = None
    step_seconds: float | None = None
    duration_seconds: float = 0.0
    error: str | None = None
    trace_id: str | None = None
    caller: str | None = None
    sampled: bool = False
    moments: Moments = field(default_factory=Moments)
    result: ForwardResult | None = None

    def fields(self) -> dict[str, Any]:
        """Return what the log line of the request says, the code as its slug."""
        fields = dict(zip(_LOGGED, _logged_values(self), strict=True))
        fields["code"] = None if self.code is None else self.code.slug
        return fields


_LOGGED = tuple(field.name for field in dataclasses.fields(RequestRecord) if field.name not in _NOT_LOGGED)
_logged_values = operator.attrgetter(*_LOGGED)
