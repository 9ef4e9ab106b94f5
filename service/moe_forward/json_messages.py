"""The messages that are rare (hello, status, slabs, metrics) as JSON: what they hold may grow without a new format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from moe_forward.messages import (
    Alive,
    Announce,
    AttachSlab,
    Cancel,
    ConnectionGone,
    DetachSlab,
    Drain,
    FrontFailed,
    FrontHello,
    FrontSamples,
    FrontUp,
    FrontWelcome,
    Heartbeat,
    InFlight,
    RankHello,
    RankTokens,
    Released,
    Stop,
    TakeConnection,
)
from moe_forward.types import EngineStatus, RankInfo


def _pack_json(message: Any) -> bytes:
    return json.dumps(dataclasses.asdict(message), separators=(",", ":")).encode()


def _rank_info(fields: dict[str, Any]) -> RankInfo:
    return RankInfo(**{**fields, "experts": tuple(fields["experts"])})


def _unpack_status(data: memoryview) -> EngineStatus:
    fields = json.loads(bytes(data))
    ranks = tuple(_rank_info(rank) for rank in fields["ranks"])
    return EngineStatus(**{**fields, "ranks": ranks, "missing": tuple(fields["missing"])})


def _unpack_announce(data: memoryview) -> Announce:
    fields = json.loads(bytes(data))
    return Announce(**{**fields, "missing": tuple(fields["missing"])})


def _unpack_rank_hello(data: memoryview) -> RankHello:
    fields = json.loads(bytes(data))
    return RankHello(**{**fields, "info": _rank_info(fields["info"])})


def _unpack_released(data: memoryview) -> Released:
    return Released(tuple(json.loads(bytes(data))["requests"]))


def _tuples(value: Any) -> Any:
    """Return JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _pack_samples(m: FrontSamples) -> bytes:
    return json.dumps({"samples": m.samples}, separators=(",", ":")).encode()


def _unpack_samples(data: memoryview) -> FrontSamples:
    return FrontSamples(_tuples(json.loads(bytes(data))["samples"]))


def _unpack_rank_tokens(data: memoryview) -> RankTokens:
    return RankTokens(_tuples(json.loads(bytes(data))["tokens"]))


def _from_json(kind: type[Any]) -> Callable[[memoryview], Any]:
    return lambda data: kind(**json.loads(bytes(data)))


CODECS: dict[type[Any], tuple[int, Callable[[Any], bytes], Callable[[memoryview], Any]]] = {
    EngineStatus: (6, _pack_json, _unpack_status),
    FrontHello: (7, _pack_json, _from_json(FrontHello)),
    FrontWelcome: (8, _pack_json, _from_json(FrontWelcome)),
    Cancel: (9, _pack_json, _from_json(Cancel)),
    Released: (10, _pack_json, _unpack_released),
    Announce: (11, _pack_json, _unpack_announce),
    RankHello: (12, _pack_json, _unpack_rank_hello),
    AttachSlab: (13, _pack_json, _from_json(AttachSlab)),
    DetachSlab: (14, _pack_json, _from_json(DetachSlab)),
    Heartbeat: (16, _pack_json, _from_json(Heartbeat)),
    Alive: (41, _pack_json, _from_json(Alive)),
    FrontUp: (32, _pack_json, _from_json(FrontUp)),
    FrontFailed: (33, _pack_json, _from_json(FrontFailed)),
    TakeConnection: (34, _pack_json, _from_json(TakeConnection)),
    ConnectionGone: (35, _pack_json, _from_json(ConnectionGone)),
    Drain: (36, _pack_json, _from_json(Drain)),
    Stop: (37, _pack_json, _from_json(Stop)),
    RankTokens: (38, _pack_json, _unpack_rank_tokens),
    InFlight: (40, _pack_json, _from_json(InFlight)),
    FrontSamples: (39, _pack_samples, _unpack_samples),
}
"""A message's kind, and how it becomes bytes and comes out of them again."""
