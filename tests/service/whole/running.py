"""A service started as an operator starts it, watched from outside, and stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from .processes import alive, find_marked

START_SECONDS = 300.0
STOP_SECONDS = 120.0
POLL_SECONDS = 0.05
MARK = "MOE_FORWARD_TEST_MARK"


def command(*arguments: str) -> list[str]:
    """Return the command line of `moe-forward` with this interpreter."""
    return [sys.executable, "-m", "moe_forward.main", *arguments]


class Service:
    """One `moe-forward serve` on ports of its own, with every process it starts marked in its environment.

    model: checkpoint folder, or synthetic:NAME. ranks: how many; None: the service's own choice.
    config: further keys of the configuration document. start_seconds: until it must be ready.
    environment: further variables. runner: a command line that runs the one behind it.
    keeps_freed: leave it to the allocator what becomes of freed buffers, as in production, where time is measured;
        otherwise they go back to the system at once, so that what stays is a leak.
    """

    def __init__(
        self,
        model: Path | str,
        ranks: int | None = 2,
        config: Mapping[str, Any] | None = None,
        start_seconds: float = START_SECONDS,
        environment: Mapping[str, str] | None = None,
        runner: Sequence[str] = (),
        keeps_freed: bool = False,
    ) -> None:
        self._start_seconds = start_seconds
        # A short folder: AF_UNIX paths, Ray's too, have room for 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="moe-"))
        self.mark = uuid.uuid4().hex
        document = {"model": str(model), "ranks": ranks, "port": 0, "metrics_port": 0, **(config or {})}
        (self.folder / "config.json").write_text(json.dumps(document))
        variables = {
            **os.environ,
            **(environment or {}),
            "TMPDIR": str(self.folder),
            **({} if keeps_freed else {"MALLOC_MMAP_THRESHOLD_": "131072"}),
            MARK: self.mark,
        }
        variables.pop("RAY_TMPDIR", None)
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                [*runner, *command("serve", "--config", str(self.folder / "config.json"))],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=variables,
                start_new_session=True,
            )
        self.url = ""
        self.metrics_url = ""

    @property
    def greeting(self) -> str:
        """What it printed on standard output so far."""
        return (self.folder / "stdout").read_text()

    @property
    def log(self) -> str:
        """What it and its actors wrote on standard error so far."""
        return (self.folder / "stderr").read_text(errors="replace")

    @property
    def runtime_folders(self) -> list[Path]:
        """Folders with the engine's socket and the Ray token; there is one while it runs."""
        return sorted(self.folder.glob("moe-forward-*"))

    def wait_ready(self) -> Service:
        """Wait until it has said where it is and takes requests; fail with its log when it ends or takes too long."""
        deadline = time.monotonic() + self._start_seconds
        pattern = r"at (http://\S+) \(metrics at (http://\S+)\)"
        while (found := re.search(pattern, self.greeting)) is None:
            assert self.process.poll() is None, f"serve ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"not ready after {self._start_seconds} s:\n{self.log}"
            time.sleep(POLL_SECONDS)
        self.url, self.metrics_url = found.groups()
        self.wait_ready_again()
        return self

    def wait_ready_again(self) -> None:
        """Wait until a running service takes requests."""
        self.wait_for(lambda: self.get("/v2/health/ready").status_code == 200)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; fail with the log when it takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited {START_SECONDS} s in vain:\n{self.log}"
            time.sleep(POLL_SECONDS)

    def get(self, path: str) -> httpx.Response:
        """GET a path of the front end."""
        return httpx.get(self.url + path, timeout=60.0)

    def metrics(self) -> str:
        """Scrape the metrics port."""
        return httpx.get(self.metrics_url, timeout=60.0).text

    def pids(self) -> dict[int, str]:
        """Every living process that came of this service, Ray's own among them: pid -> command line."""
        return find_marked(MARK, self.mark)

    def pid_of(self, title: str) -> int:
        """Return the process whose command line starts with `title`."""
        (pid,) = [pid for pid, line in self.pids().items() if line.startswith(title)]
        return pid

    def pid_of_program(self, name: str) -> int:
        """Return the process that runs the program file `name`."""
        (pid,) = [pid for pid, line in self.pids().items() if line.split(" ")[0].endswith(f"/{name}")]
        return pid

    def rank_pids(self) -> list[int]:
        """Processes of the ranks, by rank."""
        return [rank["pid"] for rank in self.get("/v1/ranks").json()["ranks"]]

    def terminate(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def close(self) -> None:
        """Stop it if it runs, end what it may have left, and remove its folder."""
        left: dict[int, str] = {}
        try:
            if self.process.poll() is None:
                self.terminate()
        finally:
            left = self.pids()
            for pid in left:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(STOP_SECONDS)
            shutil.rmtree(self.folder, ignore_errors=True)


def run_serve(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `serve` that must not come up, and return how it ended; `folder` is where temporary files go."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        command("serve", "--port", "0", "--metrics-port", "0", *arguments),
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        timeout=START_SECONDS,
        check=False,
    )
