"""A service started as an operator starts it, and what its experts make of a model's tokens."""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from moe_forward.client import Client
from moe_forward.integrations.transformers import Attached, attach

START_SECONDS = 120.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.1
CALL_SECONDS = 120.0
REQUEST_TOKENS = 4096
SHOWN_CHARACTERS = 4000


@contextmanager
def service(model: Path, device: str, activations: str) -> Iterator[str]:
    """Serve a checkpoint on one rank of this host until the block ends.

    model: folder. device: cpu or cuda. activations: granularity of the activation scales.
    Yields: the service's address, once it is ready.
    Raises: RuntimeError with the end of its log where it does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="moe-"))  # short: AF_UNIX paths have room for 107 bytes
    document = {
        "model": str(model),
        "ranks": 1,
        "device": device,
        "exchange": "local",
        "activation_scale": activations,
        "port": 0,
        "metrics_port": 0,
        "max_request_tokens": REQUEST_TOKENS,
        "start_timeout_seconds": START_SECONDS,
        "slab_bytes": 256 << 20,
    }
    (folder / "config.json").write_text(json.dumps(document))
    environment = {**os.environ, "TMPDIR": str(folder)}
    environment.pop("RAY_TMPDIR", None)
    with (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_forward.main", "serve", "--config", str(folder / "config.json")],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        yield _wait_ready(process, folder)
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def forward(url: str, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Send tokens to layers. inputs: layer id -> [T, H]. Returns: layer id -> [T, H]."""
    with Client(url, timeout_seconds=CALL_SECONDS) as client:
        return {layer: client.forward(rows[:REQUEST_TOKENS], layer=layer) for layer, rows in inputs.items()}


def attached(model: Any, url: str) -> Attached:
    """Let the service compute the model's MoE blocks; a context manager."""
    return attach(model, url, max_request_tokens=REQUEST_TOKENS, timeout_seconds=CALL_SECONDS)


def _wait_ready(process: subprocess.Popen[bytes], folder: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while True:
        log = (folder / "log").read_text(errors="replace")[-SHOWN_CHARACTERS:]
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with {process.returncode}:\n{log}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the service is not ready after {START_SECONDS:g} s:\n{log}")
        found = re.search(r"at (http://\S+) \(metrics at", (folder / "out").read_text())
        if found is not None and httpx.get(f"{found[1]}/v2/health/ready", timeout=CALL_SECONDS).status_code == 200:
            return found[1]
        time.sleep(POLL_SECONDS)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service; what does not end in time is killed with its process group."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_SECONDS)
