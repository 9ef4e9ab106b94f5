"""Memory, descriptors and threads of every process of a service, over time."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..service.whole.processes import open_files
from ..service.whole.running import Service

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process. seconds: since the first look. anonymous_bytes: resident, backed by no file or slab."""

    seconds: float
    process: str
    resident_bytes: int
    anonymous_bytes: int
    files: int
    threads: int


class Sampler:
    """Looks at every process of a service again and again, until it is closed."""

    def __init__(self, service: Service, interval_seconds: float) -> None:
        self.samples: list[Sample] = []
        self._service = service
        self._interval_seconds = interval_seconds
        self._started = time.monotonic()
        self._task = asyncio.create_task(self._look())

    async def close(self) -> None:
        """Stop looking."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            self.samples += await asyncio.to_thread(look, self._service, self._started)
            await asyncio.sleep(self._interval_seconds)


def look(service: Service, started: float) -> list[Sample]:
    """Look at every process once. started: monotonic."""
    found = []
    for pid, line in service.pids().items():
        name = "front end" if pid == service.process.pid else f"{short_name(line)} {pid}"
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(_sample(pid, name, time.monotonic() - started))
    return found


def short_name(line: str) -> str:
    """Return what a command line is about: an actor's title, or the program's or script's file."""
    words = line.split()
    if not words or words[0].startswith("ray::"):
        return (words or ["?"])[0]
    scripts = [word for word in words[1:4] if word.endswith(".py")]
    return Path((scripts or words)[0]).name


@dataclass(frozen=True, slots=True)
class Growth:
    """How a process changed over the second half of the samples, by least squares: a start is no leak.

    megabytes_per_hour: of anonymous memory. files, threads: last minus first of that half.
    """

    process: str
    first_megabytes: float
    last_megabytes: float
    most_megabytes: float
    megabytes_per_hour: float
    files: int
    threads: int


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Judge each process that was seen at least four times."""
    found = []
    for process in dict.fromkeys(sample.process for sample in samples):
        mine = [sample for sample in samples if sample.process == process]
        late = mine[len(mine) // 2 :]
        if len(mine) >= 4:
            found.append(
                Growth(
                    process,
                    mine[0].anonymous_bytes / MIB,
                    mine[-1].anonymous_bytes / MIB,
                    max(sample.resident_bytes for sample in mine) / MIB,
                    slope([(sample.seconds, sample.anonymous_bytes / MIB) for sample in late]) * 3600,
                    late[-1].files - late[0].files,
                    late[-1].threads - late[0].threads,
                )
            )
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line through points (x, y) by least squares; 0 where all x are the same."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def _sample(pid: int, name: str, seconds: float) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()

    def value(field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+)", status, re.MULTILINE)
        if found is None:  # a zombie has no memory
            raise ProcessLookupError(pid)
        return int(found[1])

    return Sample(seconds, name, value("VmRSS") * 1024, value("RssAnon") * 1024, open_files(pid), value("Threads"))
