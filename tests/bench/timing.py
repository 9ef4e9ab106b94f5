"""Timing on a GPU by CUDA graphs, and what a figure needs beside it to be believed."""

from __future__ import annotations

import datetime
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

REPLAYS = 30
GRAPH_SECONDS = 1.5e-3
MOST_ROUNDS = 16


def median_seconds(runs: Sequence[Callable[[], object]]) -> float:
    """Median over replays of a graph that holds all `runs` some times in turn, for one of them."""
    for run in runs:  # outside of the graph first: loads kernels
        run()
    torch.cuda.synchronize()
    once = elapsed_seconds(lambda: [run() for run in runs])
    # A short graph would be timed together with its own launch.
    rounds = max(1, min(MOST_ROUNDS, int(GRAPH_SECONDS / once) + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    times = [elapsed_seconds(graph.replay) for _ in range(REPLAYS + 3)]
    return statistics.median(times[3:]) / (rounds * len(runs))


def elapsed_seconds(run: Callable[[], object]) -> float:
    """Time on the GPU between the start and the end of what `run` launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def about_this_run(commit: str | None) -> dict[str, Any]:
    """Machine, versions, command, commit and date, for the head of a result file.

    commit: what is measured; None: what git says of this checkout.
    """
    gpus = torch.cuda.device_count()
    return {
        "device": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else platform.processor() or "CPU",
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or _git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _git_commit() -> str:
    here = Path(__file__).parent
    try:
        asked = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return asked.stdout.strip()
