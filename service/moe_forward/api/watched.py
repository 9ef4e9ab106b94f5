"""Files that others replace while the service runs, such as mounted secrets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CHECK_SECONDS = 1.0

Signature = tuple[tuple[int, ...] | None, ...]


class Watched:
    """Tells when one of some files is another than before, whether it was written to, replaced, or lies behind a link
    that was (Kubernetes swaps a link to renew a secret).

    clock: seconds; the files are looked at once in `CHECK_SECONDS` at most.
    """

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._paths = tuple(paths)
        self._clock = clock
        self._looked_seconds = clock()
        self._seen = self._signature()

    def changed(self) -> bool:
        """Whether the files differ from when they were last looked at; who asks reads them after it says so."""
        now = self._clock()
        if now - self._looked_seconds < CHECK_SECONDS:
            return False
        self._looked_seconds = now
        before, self._seen = self._seen, self._signature()
        return self._seen != before

    def _signature(self) -> Signature:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # a file that is gone is a change too; whoever reads it says what is wrong
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
