"""The result file: every stage timed, a failing one noted with its traceback, written after each."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Results:
    """A JSON document that grows by stages.

    path: where it is written. deadline_seconds: from now; a stage that would start later is noted as not run.
    commit: what is measured.
    document: what stages put their figures into.
    """

    def __init__(self, path: Path, deadline_seconds: float, commit: str | None = None) -> None:
        self._path = path
        self._began = time.monotonic()
        self._deadline_seconds = deadline_seconds
        self.document: dict[str, Any] = {"about": about_this_run(commit), "stages": [], "failures": [], "models": {}}

    def stage(self, name: str, run: Callable[[], object]) -> bool:
        """Run a stage; what it raises is noted and does not end the others. Returns: whether it succeeded."""
        began = time.monotonic()
        failure = ""
        if began - self._began > self._deadline_seconds:
            failure = f"not run: {self._deadline_seconds:g} s were over"
        else:
            try:
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # a kernel's failure belongs to its own stage
            except Exception:
                failure = traceback.format_exc()
        seconds = time.monotonic() - began
        self.document["stages"].append({"name": name, "seconds": round(seconds, 3)})
        if failure:
            self.document["failures"].append({"stage": name, "traceback": failure})
        outcome = f"FAILED\n{failure}" if failure else f"{seconds:.1f} s"
        print(f"{time.monotonic() - self._began:7.1f} s  {name}: {outcome}", flush=True)
        self.write()
        return not failure

    def write(self) -> None:
        """Write the document as it is; a reader never sees half of it."""
        self.document["seconds"] = round(time.monotonic() - self._began, 1)
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text(json.dumps(self.document, indent=1))
        os.replace(part, self._path)

    @property
    def exit_status(self) -> int:
        """1 where a stage failed."""
        return 1 if self.document["failures"] else 0


def about_this_run(commit: str | None) -> dict[str, Any]:
    """Machine, versions, command, commit and date. commit: what is measured, where the caller knows it."""
    import transformers

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
