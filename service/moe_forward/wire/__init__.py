"""Encodings of a forward: pure functions between bytes and tensors, no I/O.

A new encoding is one module with `name`, `decode` and `encode`, and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.wire import oip, plain_json, safetensors
from moe_forward.wire.base import Encoding, ForwardCall, ReplyNotes, WireLimits, WireReply, WireRequest, WireTensor
from moe_forward.wire.text import shown

__all__ = [
    "ENCODINGS",
    "OIP",
    "Encoding",
    "ForwardCall",
    "ReplyNotes",
    "WireLimits",
    "WireReply",
    "WireRequest",
    "WireTensor",
    "for_content_type",
]

ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {safetensors.CONTENT_TYPE: safetensors, plain_json.CONTENT_TYPE: plain_json}
)
"""Encodings of `/v1/moe/forward` by media type."""

OIP: Encoding = oip
"""The encoding of `/v2/models/{model}/infer`, whatever the content type."""


def for_content_type(content_type: str | None) -> Encoding:
    """Choose the encoding of a `/v1/moe/forward` body.

    content_type: the header's value, parameters such as charset allowed; None where there is none.
    Raises: ForwardError UNSUPPORTED_MEDIA_TYPE naming the accepted ones.
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    encoding = ENCODINGS.get(media_type)
    if encoding is None:
        raise ForwardError(
            ErrorCode.UNSUPPORTED_MEDIA_TYPE,
            f"content-type: expected {' or '.join(ENCODINGS)}, got {shown(content_type) if content_type else 'none'}",
        )
    return encoding
