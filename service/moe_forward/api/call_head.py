"""What the head of a tensor call says: all that can be known, and refused, before its body comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from starlette.types import Scope

from moe_forward.api.body import check_content_encoding, content_length, header_map, query_fields
from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.tracing import TraceContext, trace_context
from moe_forward.types import ModelSpec
from moe_forward.wire.base import Encoding
from moe_forward.wire.oip import check_model


class CallHead(NamedTuple):
    """The head of a call; the same for every request of these bytes.

    headers: by lower-case name. query: pairs in their order. model, version: from the path, or None.
    body_bytes: of the body that follows. trace: that the request is part of, or None.
    """

    headers: Mapping[str, str]
    query: tuple[tuple[str, str], ...]
    model: str | None
    version: str | None
    encoding: Encoding
    body_bytes: int
    trace: TraceContext | None


def read_call_head(
    scope: Scope, choose: Callable[[Mapping[str, str]], tuple[Encoding, int]], spec: ModelSpec
) -> CallHead:
    """Read the head in `scope`. choose: headers -> encoding and the largest body of it in bytes.

    Raises: ForwardError.
    """
    if scope["method"] != "POST":
        raise ForwardError(ErrorCode.METHOD_NOT_ALLOWED, f"method: expected POST, got {scope['method']}")
    path_parameters = scope.get("path_params", {})
    model, version = path_parameters.get("model"), path_parameters.get("version")
    check_model(model, version, spec)
    headers = header_map(scope["headers"])
    check_content_encoding(headers)
    encoding, limit_bytes = choose(headers)
    return CallHead(
        MappingProxyType(headers),
        query_fields(scope["query_string"]),
        model,
        version,
        encoding,
        content_length(headers, limit_bytes),
        trace_context(scope["headers"]),
    )
