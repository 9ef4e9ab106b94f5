"""Where a load test ran: what two reports must share to be compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("httptools", "moe-forward", "numpy", "torch", "uvloop")


def environment() -> dict[str, Any]:
    """Return versions, cores, their load, and the date of a test that begins now."""
    return {
        "started_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return "not installed"
