"""Starts that are killed: SIGKILL or SIGTERM at a random moment of a start, again and again; what stays behind?
`python tests/chaos/run.py starts --cycles 50`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from moe_forward import checkpoint

from ..service.whole.running import Service
from .leftovers import shared_memory, until_gone

GONE_SECONDS = 15.0
TERM_SECONDS = 60.0


def main(arguments: list[str]) -> int:
    """Run, print and write; returns 1 where a process, a port or shared memory was left."""
    options = _options(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    choose = random.Random(options.seed)
    cycles: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        model = Path(name) / "tiny"
        checkpoint.make_model("tiny", model, progress=False)
        for number in range(options.cycles):
            kind = signal.SIGKILL if number % 4 else signal.SIGTERM
            cycles.append(_cycle(model, kind, choose.random() * options.longest_seconds))
            print(f"{number + 1}: {json.dumps(cycles[-1])}", flush=True)
    report = {"cores": os.cpu_count(), "cycles": cycles}
    for line in describe(report):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if any(cycle["left"] for cycle in cycles) else 0


def describe(report: dict[str, Any]) -> list[str]:
    """Return the report in words."""
    cycles = report["cycles"]
    gone = sorted(cycle["gone_seconds"] for cycle in cycles)
    kept = Counter(thing.split("-")[0].split("_")[0] for cycle in cycles for thing in cycle["kept"])
    ready = sum(cycle["ready"] for cycle in cycles)
    return [
        f"{len(cycles)} starts, {ready} of them ended when ready: all gone after {gone[len(gone) // 2]:.1f} s "
        f"(p50), {gone[-1]:.1f} s at most",
        f"left: {sum(len(cycle['left']) for cycle in cycles)} processes, ports, pieces of shared memory",
        f"on disk: {dict(kept) or 'nothing'}",
    ]


def _cycle(model: Path, kind: signal.Signals, after_seconds: float) -> dict[str, Any]:
    """Start a service and end it after some time."""
    before = shared_memory()
    service = Service(model, 2, {"slab_bytes": 32 << 20, "max_body_bytes": 16 << 20})
    try:
        time.sleep(after_seconds)
        running = service.process.poll() is None
        found = service.greeting
        service.process.send_signal(kind)
        status = service.process.wait(TERM_SECONDS)
        if found:
            service.url, service.metrics_url = re.findall(r"http://[^\s)']+", found)[:2]
        gone, left, kept = asyncio.run(until_gone(service, before, GONE_SECONDS))
        return {
            "signal": kind.name,
            "after_seconds": round(after_seconds, 2),
            "ready": bool(found),
            "running": running,
            "exit_status": status,
            "gone_seconds": round(gone, 2),
            "left": left,
            "kept": kept,
            "kept_bytes": sum(path.stat().st_size for path in service.folder.rglob("*") if path.is_file()),
        }
    finally:
        service.close()
        shutil.rmtree(service.folder, ignore_errors=True)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests/chaos/run.py starts", description=__doc__)
    parser.add_argument("--cycles", type=int, default=50, help="(default: 50)")
    parser.add_argument("--longest-seconds", type=float, default=20.0, help="until it is ended (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(arguments)
