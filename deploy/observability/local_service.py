"""A service of our own on loopback: started as an operator starts it, stopped as one stops it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

SMALL: dict[str, Any] = {
    "model": "synthetic:tiny",
    "device": "cpu",
    "ranks": 2,
    "port": 0,
    "metrics_port": 0,
    "expert_metrics": True,
    "max_queue_requests": 12,
}
"""Configuration of a service that has every series and that a burst of requests overruns."""

START_SECONDS = 180.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.1
LOG_CHARACTERS = 4000
GREETING = r"at (http://\S+) \(metrics at http://([^/\s]+)/metrics\)"


class Service:
    """One `moe-forward serve`; the end of its log is printed where something goes wrong while it runs.

    config: the configuration document. folder: where its standard output and error go.
    Raises: RuntimeError with its log when it does not come up.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        (folder / "config.json").write_text(json.dumps(dict(config)))
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moe_forward.main", "serve", "--config", str(folder / "config.json")],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C stops it through `close`, which lets it drain
            )
        try:
            self.url, self.metrics_target = self._wait_greeting()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop it as an operator does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(STOP_SECONDS)

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is not None:
            print(self._err.read_text(errors="replace")[-LOG_CHARACTERS:], file=sys.stderr)

    def _wait_greeting(self) -> tuple[str, str]:
        deadline = time.monotonic() + START_SECONDS
        while (found := re.search(GREETING, self._out.read_text())) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not start:\n{self._err.read_text(errors='replace')}")
            time.sleep(POLL_SECONDS)
        return found[1], found[2]
