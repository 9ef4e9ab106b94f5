"""Beside a service that works: a second one on its port, and one that does not come up in time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ...service.whole.running import Service, run_serve
from ..scene import Fault, Scene, in_thread

START_TIMEOUT_SECONDS = 1.0


def _refused(scene: Scene, arguments: Sequence[str], words: Sequence[str]) -> None:
    """Start another service, which must end with status 1 and a reason."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moe-") as folder:
        ended = run_serve(Path(folder), ["--model", str(scene.model), *arguments])
        assert list(Path(folder).iterdir()) == [], "it left something"
    said = [line for line in ended.stderr.splitlines() if line.startswith("moe-forward: ")]
    assert ended.returncode == 1, ended.stderr
    assert len(said) == 1, ended.stderr
    for word in words:
        assert word in said[0], said[0]
    scene.notes.append(f"ended with 1 after {time.monotonic() - started:.1f} s: {said[0]}")


def second_instance(scene: Scene) -> None:
    """Start another service on the same port."""
    port = scene.service.url.rpartition(":")[2]
    _refused(scene, ["--port", port], [f"port {port}", "in use"])


def too_late(scene: Scene) -> None:
    """Start a service whose ranks cannot be ready in time; it must leave no process."""
    other = Service(scene.model, 2, {"start_timeout_seconds": START_TIMEOUT_SECONDS, "slab_bytes": 16 << 20})
    try:
        started = time.monotonic()
        status = other.process.wait(60.0)
        (said,) = [line for line in other.log.splitlines() if line.startswith("moe-forward: ")]
        assert status == 1, other.log
        assert "start_timeout_seconds" in said, said
        assert other.pids() == {}, other.pids()
        assert other.runtime_folders == [], other.runtime_folders
        scene.notes.append(f"ended with 1 after {time.monotonic() - started:.1f} s: {said}")
    finally:
        other.close()


FAULTS = (
    Fault("second-instance", in_thread(second_instance), "a second service on the same port", after="unharmed"),
    Fault("start-deadline", in_thread(too_late), "beside it, a service that cannot start in time", after="unharmed"),
)
