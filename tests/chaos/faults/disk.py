"""A full disk where the log goes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...service.whole.running import Service
from ..scene import CONFIG, Fault, Scene, in_thread

DISK_BYTES = 1 << 20
_LOG = "MOE_FORWARD_CHAOS_LOG"


@contextlib.contextmanager
def with_a_small_disk(model: Path, config: Mapping[str, Any]) -> Iterator[Service]:
    """Run a service whose standard error goes to a file on a disk of a MiB."""
    with tempfile.TemporaryDirectory(prefix="chaos-disk-") as disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], check=True)
        try:
            log = str(Path(disk) / "log")
            runner = ["sh", "-c", f'exec "$@" 2>>"${_LOG}"', "sh"]
            with contextlib.closing(
                Service(model, 2, {**CONFIG, **config}, environment={_LOG: log}, runner=runner)
            ) as s:
                yield s.wait_ready()
                status = s.terminate()
                assert status == 0, f"with a full disk, SIGTERM ended it with {status}"
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def fill_the_disk(scene: Scene) -> None:
    """Write beside the log until nothing fits."""
    (log,) = (
        line.partition("=")[2]
        for line in Path(f"/proc/{scene.service.process.pid}/environ").read_text().split("\0")
        if line.startswith(f"{_LOG}=")
    )
    filler = Path(log).parent / "filler"
    scene.undo.callback(filler.unlink, missing_ok=True)
    scene.now()
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    room = os.statvfs(filler.parent)
    assert room.f_bavail == 0, f"{room.f_bavail * room.f_frsize} bytes are free"
    scene.notes.append(f"the log ends at {Path(log).stat().st_size} bytes")


def _cannot_mount() -> str | None:
    return None if os.geteuid() == 0 else "mounting a small disk needs root"


FAULTS = (
    Fault(
        "disk-full",
        in_thread(fill_the_disk),
        "the disk of the log is full",
        after="unharmed",
        start=with_a_small_disk,
        unavailable=_cannot_mount,
    ),
)
