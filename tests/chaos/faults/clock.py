"""A wall clock that jumps: CLOCK_REALTIME of every process of the service, and no other clock.

The machine's own clock stays as it is, and a time namespace has none for the wall: a preloaded library adds seconds.
What waits inside the kernel for a moment on the wall clock is not reached by it.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...service.whole.running import Service
from ..scene import CONFIG, Fault, Scene, in_thread

JUMPS_SECONDS = (3600.0, -3600.0, 0.0)
HOLD_SECONDS = 2.0
SOURCE = Path(__file__).with_name("wall_clock.c")


@contextlib.contextmanager
def with_a_clock_of_its_own(model: Path, config: Mapping[str, Any]) -> Iterator[Service]:
    """Run a service whose wall clock is the machine's and what a file adds to it."""
    library = model.parent / "wall_clock.so"
    compile_it = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run([*compile_it, "-ldl", "-lm"], check=True)
    _set(model, 0.0)
    environment = {"LD_PRELOAD": str(library), "MOE_FORWARD_CHAOS_CLOCK": str(_file(model))}
    with contextlib.closing(Service(model, 2, {**CONFIG, **config}, environment=environment)) as service:
        yield service.wait_ready()


def jump(scene: Scene) -> None:
    """Set the wall clock an hour forward, two hours back, and right again."""
    scene.undo.callback(_set, scene.model, 0.0)
    before = len(scene.service.log)
    scene.now()
    for seconds in JUMPS_SECONDS:
        _set(scene.model, seconds)
        time.sleep(HOLD_SECONDS)
    lines = [line for line in scene.service.log[before:].splitlines() if " moe_forward.api.forward: request " in line]
    hours = list(dict.fromkeys(line[11:13] for line in lines))
    assert len(hours) == len(JUMPS_SECONDS), f"the service's clock did not jump: {hours}"
    scene.notes.append(f"hours in the log: {', '.join(hours)}")


def _file(model: Path) -> Path:
    return model.parent / "wall_clock"


def _set(model: Path, seconds: float) -> None:
    mode = "r+b" if _file(model).exists() else "wb"
    with _file(model).open(mode) as file:
        file.write(struct.pack("=d", seconds))


FAULTS = (
    Fault(
        "clock-jump",
        in_thread(jump),
        "the wall clock jumps by +1 h, -2 h, +1 h",
        after="unharmed",
        start=with_a_clock_of_its_own,
        unavailable=lambda: None if shutil.which("cc") else "a clock of its own needs a C compiler (cc)",
    ),
)
