"""What a service leaves behind: processes, ports, shared memory, folders."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path

from ..service.whole.running import Service

POLL_SECONDS = 0.05
OURS = {"config.json", "stdout", "stderr"}
"""What `Service` itself keeps in the folder that is its TMPDIR."""


def shared_memory() -> frozenset[str]:
    """Return the names in /dev/shm that no living process has mapped: nobody will remove them."""
    names = {path.name for path in Path("/dev/shm").iterdir()}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            text = maps.read_text(errors="replace")
            names -= {name for name in names if f"/dev/shm/{name}" in text}
    return frozenset(names)


def port_taken(url: str) -> bool:
    """Tell whether something listens at a service's address."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port.partition("/")[0]))) == 0


def leftovers(service: Service, shared_memory_before: frozenset[str]) -> tuple[list[str], list[str]]:
    """Name what a service which ended has left: what should pass by itself, and what stays on disk.

    Memory without a name goes with the processes that hold it.
    """
    passing = [f"process {pid}: {line[:60].strip()}" for pid, line in service.pids().items()]
    passing += [f"a listener at {url}" for url in (service.url, service.metrics_url) if url and port_taken(url)]
    passing += [f"/dev/shm/{name}" for name in sorted(shared_memory() - shared_memory_before)]
    kept = [path.name for path in sorted(service.folder.iterdir()) if path.name not in OURS | {"ray"}]
    kept += [f"ray/{path.name}" for path in sorted(service.folder.glob("ray/session_2*"))]
    return passing, kept


async def until_gone(
    service: Service, shared_memory_before: frozenset[str], patience_seconds: float
) -> tuple[float, list[str], list[str]]:
    """Wait until what should pass has passed; returns seconds waited, what did not pass, and what stays on disk."""
    started = time.monotonic()
    while True:
        passing, kept = leftovers(service, shared_memory_before)
        waited = time.monotonic() - started
        if not passing or waited >= patience_seconds:
            return waited, passing, kept
        await asyncio.sleep(POLL_SECONDS)
