"""What the process of a front end is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from moe_forward.config import Config
from moe_forward.types import ModelSpec


@dataclass(frozen=True, slots=True)
class FrontTask:
    """A front end to be.

    number: from 0; a process that takes the place of another has the same. socket_path: of the engine.
    config: what it serves by; `max_connections` is this front end's share.
    admin_token: of POST /v1/drain, or None. draining: an operator has asked to take no more.
    poll_seconds: see `EngineLink`.
    """

    number: int
    config: Config
    spec: ModelSpec
    socket_path: Path
    admin_token: str | None
    draining: bool
    poll_seconds: float = 0.0

    def to_json(self) -> bytes:
        """Return it as `from_json` reads it."""
        return _ADAPTER.dump_json(self)

    @staticmethod
    def from_json(data: bytes) -> FrontTask:
        """Read what `to_json` wrote."""
        return _ADAPTER.validate_json(data)


_ADAPTER = TypeAdapter(FrontTask)
