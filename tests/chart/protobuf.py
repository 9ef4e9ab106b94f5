"""The little of Kubernetes' protobuf form that helm 4 speaks: it posts the Secrets of its releases so.

Source: k8s.io/apimachinery's runtime.Unknown envelope, and the field numbers of ObjectMeta and Secret in the published
.proto files of k8s.io/apimachinery and k8s.io/api.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\0"
META_TEXTS = {1: "name", 2: "generateName", 3: "namespace", 5: "uid", 6: "resourceVersion"}
META_MAPS = {11: "labels", 12: "annotations"}


def decode_secret(body: bytes) -> dict[str, Any]:
    """A Secret as JSON would have it; raises ValueError for anything else."""
    if not body.startswith(MAGIC):
        raise ValueError(f"expected the envelope {MAGIC!r}, got {body[:4]!r}")
    envelope = dict(_fields(body[len(MAGIC) :]))
    kind = {number: value.decode() for number, value in _fields(envelope[1])}
    if kind != {1: "v1", 2: "Secret"}:
        raise ValueError(f"expected a v1 Secret, got {kind}")
    secret: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": {}}
    for number, value in _fields(envelope[2]):
        if number == 1:
            secret["metadata"] = _metadata(value)
        elif number == 2:
            key, content = _entry(value)
            secret["data"][key] = base64.b64encode(content).decode()
        elif number == 3:
            secret["type"] = value.decode()
    return secret


def _metadata(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, value in _fields(content):
        if number in META_TEXTS and value:
            found[META_TEXTS[number]] = value.decode()
        elif number in META_MAPS:
            key, text = _entry(value)
            found.setdefault(META_MAPS[number], {})[key] = text.decode()
    return found


def _entry(content: bytes) -> tuple[str, bytes]:
    entry = dict(_fields(content))
    return entry.get(1, b"").decode(), entry.get(2, b"")


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every length-delimited field; numbers (varints) are passed over."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(content, at)
        elif wire == 2:
            length, at = _varint(content, at)
            yield number, content[at : at + length]
            at += length
        else:
            raise ValueError(f"field {number} has wire type {wire}, which no Secret has")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
