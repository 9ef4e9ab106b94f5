"""JSON documents of a checkpoint folder, read bounded and with errors that name the file and the key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_forward.errors import CheckpointError

MAX_DOCUMENT_BYTES = 256 << 20
"""Larger than the index of any published model; a bound, so that a wrong file cannot fill the memory."""


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: CheckpointError when the file is missing, too large, not JSON or not an object.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_DOCUMENT_BYTES:
            raise CheckpointError(f"{path} has {size_bytes} bytes; at most {MAX_DOCUMENT_BYTES} are expected")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(document).__name__}")
    return document


@dataclass(frozen=True, slots=True)
class Keys:
    """Typed access to the keys of a JSON object.

    document: the object. where: how errors name it.
    """

    document: dict[str, Any]
    where: str

    def text(self, key: str) -> str:
        """Read a string; CheckpointError when it is missing or something else."""
        value = self.document.get(key)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}: {key} must be a string, got {_shown(value)}")
        return value

    def integer(self, key: str, minimum: int = 1, default: int | None = None) -> int:
        """Read an integer >= `minimum`; a missing or null key is `default`, without one a CheckpointError."""
        value = self.document.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise CheckpointError(f"{self.where}: {key} must be an integer >= {minimum}, got {_shown(value)}")
        return value

    def number(self, key: str, default: float) -> float:
        """Read a positive finite number; a missing or null key is `default`."""
        value = self.document.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.where}: {key} must be a positive number, got {_shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean; a missing or null key is `default`."""
        value = self.document.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} must be true or false, got {_shown(value)}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """Read a list of integers; a missing or null key is empty."""
        value = self.document.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(not isinstance(item, int) or isinstance(item, bool) for item in value):
            raise CheckpointError(f"{self.where}: {key} must be a list of integers, got {_shown(value)}")
        return tuple(value)

    def expect(self, key: str, expected: str) -> None:
        """Require that a key, where it is present, has the one value that is served."""
        value = self.document.get(key)
        if value is not None and value != expected:
            raise CheckpointError(f"{self.where}: {key} {_shown(value)} is not served; expected {expected!r}")

    def section(self, key: str) -> Keys | None:
        """Read a nested object; None when it is missing or null."""
        value = self.document.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {key} must be an object, got {_shown(value)}")
        return Keys(value, f"{self.where}: {key}")


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]
