"""The calls of the service without any I/O: what each one sends, and how its reply is read."""

from __future__ import annotations

import functools
import math
import urllib.parse
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from moe_forward.client.errors import MissingExperts, TransportFailed
from moe_forward.client.replies import Reply, json_object
from moe_forward.client.tensors import Array, OutputLike, decode_output, encode_forward

T = TypeVar("T")

SAFETENSORS = "application/vnd.safetensors"
DEGRADED, MISSING_ROUTES = "x-moe-degraded", "x-moe-missing-routes"
MAX_REQUEST_ID = 128
"""Characters; the server gives a request with a longer id one of its own."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call of the service.

    timeout_seconds: for the whole call, waits and further attempts included.
    retries: attempts after the first.
    decode: a reply whose status is in `accept` -> the caller's result.
    sends_timeout: tell the server the time that is left, as `timeout_ms`.
    """

    method: str
    path: str
    timeout_seconds: float
    retries: int
    decode: Callable[[Reply], T]
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    accept: tuple[int, ...] = (200,)
    sends_timeout: bool = False
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Calls:
    """Builds the calls of one client.

    timeout_seconds: for a whole call, where the call names no other. retries: attempts after the first.
    """

    timeout_seconds: float
    retries: int

    def __post_init__(self) -> None:
        check_timeout(self.timeout_seconds)
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}")

    def forward(
        self,
        hidden_states: Array,
        *,
        layer: int,
        hidden_scales: Array | None = None,
        topk_ids: Array | None = None,
        topk_weights: Array | None = None,
        router_logits: Array | None = None,
        shared_experts: bool = True,
        timeout_seconds: float | None = None,
        request_id: str | None = None,
    ) -> Call[Array]:
        """`POST /v1/moe/forward`, with tensors as `encode_forward` takes them.

        Raises: TypeError or ValueError naming the argument.
        """
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layer must be an int, got {layer!r}")
        body, like = encode_forward(hidden_states, hidden_scales, topk_ids, topk_weights, router_logits)
        return Call(
            "POST",
            "/v1/moe/forward",
            self.timeout_seconds if timeout_seconds is None else check_timeout(timeout_seconds),
            self.retries,
            functools.partial(_output, like=like),
            params={"layer": str(layer), "shared_experts": "true" if shared_experts else "false"},
            headers={"Content-Type": SAFETENSORS, "Accept": SAFETENSORS},
            body=body,
            sends_timeout=True,
            request_id=uuid.uuid4().hex if request_id is None else _check_request_id(request_id),
        )

    def get(self, path: str) -> Call[dict[str, Any]]:
        """`GET path`, whose reply is a JSON object."""
        return Call("GET", path, self.timeout_seconds, self.retries, json_object)

    def metadata(self, model: str | None) -> Call[dict[str, Any]]:
        """`GET /v2`, or `GET /v2/models/{model}` (Open Inference Protocol v2)."""
        return self.get("/v2" if model is None else f"/v2/models/{urllib.parse.quote(model, safe='')}")

    def ready(self) -> Call[bool]:
        """`GET /v2/health/ready`, asked once: "not ready" is an answer here and nothing to retry."""
        return Call("GET", "/v2/health/ready", self.timeout_seconds, 0, _is_ready, accept=(200, 503))

    def drain(self, admin_token: str) -> Call[dict[str, Any]]:
        """`POST /v1/drain`, sent once: a service that drained may be gone by a second attempt."""
        headers = {"Authorization": f"Bearer {check_token('admin_token', admin_token)}"}
        return Call("POST", "/v1/drain", self.timeout_seconds, 0, json_object, headers=headers, accept=(200, 202))


def check_timeout(timeout_seconds: float) -> float:
    """`timeout_seconds` as it is. Raises: ValueError unless it is positive and finite."""
    if not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
        raise ValueError(f"timeout_seconds must be positive and finite, got {timeout_seconds!r}")
    return timeout_seconds


def check_token(name: str, token: str) -> str:
    """`token` as it is. Raises: ValueError, without showing it, unless it can stand in an HTTP header."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{name} must be printable ASCII without spaces, and not empty")
    return token


def _check_request_id(request_id: str) -> str:
    if not 0 < len(request_id) <= MAX_REQUEST_ID or not request_id.isascii() or not request_id.isprintable():
        raise ValueError(f"request_id must be 1 to {MAX_REQUEST_ID} printable ASCII characters, got {request_id!r}")
    return request_id


def _is_ready(reply: Reply) -> bool:
    return reply.status == 200


def _output(reply: Reply, like: OutputLike) -> Array:
    media_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != SAFETENSORS:
        raise TransportFailed(f"the reply must be {SAFETENSORS}, it is {media_type or 'without a content type'}")
    if MISSING_ROUTES in reply.headers:
        # The same words for every such reply, so that Python's default filter shows them once.
        lacking = reply.headers.get(DEGRADED, "missing-experts unknown")
        warnings.warn(
            f"the service lacks experts ({lacking}); routes to them add nothing", MissingExperts, stacklevel=2
        )
    return decode_output(reply.body, like)
