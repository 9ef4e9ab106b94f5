"""`make observe`: a real service under load, a real Prometheus beside it, a picture of each row of the dashboard."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from dashboard import rows
from drawing import Drawn, Line, draw_row, legend
from local_prometheus import HOW_TO_INSTALL, RATE_INTERVAL, Prometheus, fill_in, find_prometheus
from local_service import SMALL, Service
from mixed_load import CALLERS, put_load, read_model
from panels import Panel, Row

PICTURES = Path(__file__).parent / "pictures"
IDLE_SECONDS = 5.0
STEP_SECONDS = 1.0


def observe(seconds: float, out: Path, stay: bool) -> None:
    """Start everything, put load on the service, draw, and stop.

    seconds: of load. out: folder for the pictures. stay: serve until Ctrl-C instead of stopping.
    Raises: RuntimeError when service or Prometheus do not come up.
    """
    binary = find_prometheus()
    if binary is None:
        sys.exit(f"make observe: {HOW_TO_INSTALL}")
    with (
        tempfile.TemporaryDirectory(prefix="moe-") as folder,
        Service(SMALL, Path(folder)) as service,
        Prometheus(binary, Path(folder), service.metrics_target, {"namespace": "observe"}) as prometheus,
    ):
        print(f"service at {service.url}, Prometheus at {prometheus.url}; {seconds:g} s of load", flush=True)
        prometheus.wait_scraped()
        start = time.time()
        statuses = asyncio.run(put_load(service.url, read_model(service.url), seconds, CALLERS))
        time.sleep(IDLE_SECONDS)  # that the end of the load can be seen
        print("answers by status:", ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())))
        for file in draw(prometheus, start, time.time(), _caption(seconds), out):
            print(f"wrote {file}")
        if stay:
            _wait_for_interrupt()


def draw(prometheus: Prometheus, start: float, end: float, caption: str, out: Path) -> list[Path]:
    """Draw every row into the folder `out` and return the files. start, end: Unix seconds."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for row in rows():
        drawn = [
            Drawn(panel, title, ask(prometheus, panel, choice, start, end))
            for panel, title, choice in choices(row, SMALL["ranks"])
        ]
        files.append(out / f"{re.sub('[^a-z]+', '-', row.title.lower())}.png")
        draw_row(row, drawn, start, end, caption, files[-1])
    return files


def choices(row: Row, ranks: int) -> list[tuple[Panel, str, dict[str, str]]]:
    """Return a row's panels with their titles and variables as Grafana shows them; repeated ones for each rank."""
    everything = {"namespace": ".*", "instance": ".*", "model": ".*", "rank": ".*"}
    found: list[tuple[Panel, str, dict[str, str]]] = []
    for panel in row.panels:
        if panel.repeat is None:
            found.append((panel, panel.title, everything))
        else:
            for rank in map(str, range(ranks)):
                choice = {**everything, panel.repeat: rank}
                found.append((panel, panel.title.replace(f"${panel.repeat}", rank), choice))
    return found


def ask(
    prometheus: Prometheus, panel: Panel, variables: Mapping[str, str], start: float, end: float
) -> tuple[Line, ...]:
    """Return what the queries of a panel show: now for numbers and bars, from start to end for the others."""
    lines: list[Line] = []
    for query in panel.queries:
        expression = fill_in(query.expression, variables, RATE_INTERVAL)
        if panel.kind in ("stat", "bars"):
            found = prometheus.query(expression, end - IDLE_SECONDS)
        else:
            found = prometheus.query_range(expression, start, end, STEP_SECONDS)
        lines += [Line(legend(query.legend, series.labels), series) for series in found]
    return tuple(lines)


def _caption(seconds: float) -> str:
    today = datetime.datetime.now(datetime.timezone.utc).date()
    processor = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    machine = f"{os.cpu_count()} cores of {processor[1] if processor else platform.machine()}"
    return f"synthetic:tiny on 2 CPU ranks, {machine}, {today}: {seconds:g} s of mixed load, bursts and wrong requests"


def _wait_for_interrupt() -> None:
    print("it goes on without load until Ctrl-C", flush=True)
    try:
        while True:
            time.sleep(STEP_SECONDS)
    except KeyboardInterrupt:
        print()


def main() -> None:
    """Read the command line and observe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=45.0, help="of load (default: 45)")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--stay", action="store_true", help="serve until Ctrl-C, to look around in Prometheus")
    arguments = parser.parse_args()
    observe(arguments.seconds, arguments.out, arguments.stay)


if __name__ == "__main__":
    main()
