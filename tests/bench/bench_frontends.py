"""What more front ends bring: requests a second of 1, 2 and 4 over one engine, with experts that only copy.

    python tests/bench/bench_frontends.py --json frontends.json

One engine, its ranks (`echo_ranks.py`) and the front ends for each number are up at once and measured in turn, in
rounds, by the same clients (`raw_client.py`) in processes of their own; ratios are of one round, and the median of the
rounds is told. `share` is the part of the front ends' CPU time that the busiest of them took: 1/N is even.

A front end, the engine, a rank and a client want a core each: with N front ends this says something on a machine of
2 N + 2 cores and more. With fewer it shows what the work costs (CPU of a request) and how even the shares are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from bench_front import HIDDEN_SIZE, NUM_EXPERTS, SPEC
from prometheus_client import CollectorRegistry

from moe_forward import logs
from moe_forward.config import Config
from moe_forward.front import Front
from moe_forward.front_samples import MergedSamples
from moe_forward.front_task import FrontTask
from moe_forward.fronts import Fronts
from moe_forward.link import EngineLink
from moe_forward.messages import Announce
from moe_forward.metrics import Metrics
from moe_forward.slab import Slab

HERE = Path(__file__).parent
PATH = "/v1/moe/forward?layer=3"
START_SECONDS = 60.0
SLAB_BYTES = 256 << 20


class Case(NamedTuple):
    """tokens: of a request, bf16. connections: of all clients together, each with one request at a time."""

    tokens: int
    connections: int

    def __str__(self) -> str:
        return f"{2 * self.tokens * HIDDEN_SIZE // 1000} kB, {self.connections} connections"


class Served(NamedTuple):
    """Front ends on one port. pid: of the process that was started; it is the front end where there is one only."""

    frontends: int
    port: int
    pid: int

    def front_pids(self) -> list[int]:
        """Processes that serve HTTP."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return list(map(int, children)) if self.frontends > 1 else [self.pid]


def serve(port: int, path: Path, ranks: int, frontends: int, poll_us: int) -> None:
    """Serve HTTP over the engine at `path`, as `moe-forward serve --frontends` does; without Ray and supervisor."""
    config = Config(port=port, slab_bytes=SLAB_BYTES, frontends=frontends, log_level="warning")
    logs.configure(config.log_level, config.log_format)

    async def run() -> None:
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        listener = socket.create_server(("127.0.0.1", port), backlog=2048)
        if frontends == 1:
            link = EngineLink(path, Slab(SLAB_BYTES), poll_seconds=poll_us * 1e-6)
            fronts: Front | Fronts = Front(config, SPEC, link, metrics, None, None, [listener])
        else:
            task = FrontTask(0, config, SPEC, path, None, False, poll_us * 1e-6)
            fronts = Fronts(task, frontends, listener, metrics, MergedSamples(registry))
        fronts.link.announce(Announce(1, ranks, 0))
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        http = asyncio.create_task(fronts.serve())
        await stopped.wait()
        await fronts.drain(1.0)
        fronts.end()
        await http
        await fronts.close()

    uvloop.run(run())


@contextlib.contextmanager
def running(
    numbers: Sequence[int], ranks: int, max_wait_us: int, poll_us: int
) -> Iterator[tuple[list[Served], dict[str, int]]]:
    """Start an engine, its ranks and front ends; yields the front ends, and the other processes by what they are."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="moe-") as folder:
        log = stack.enter_context((Path(folder) / "log").open("w"))

        def start(*command: object) -> int:
            process = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log, cwd=HERE)
            stack.callback(_end, process)
            return process.pid

        path = Path(folder) / "engine.sock"
        others = {"engine": start("bench_front.py", "engine", path, max_wait_us, poll_us)}
        found = []
        for number in numbers:
            port = _free_port()
            pid = start("bench_frontends.py", "--serve", port, path, ranks, number, poll_us)
            found.append(Served(number, port, pid))
        for served in found:
            _until(lambda served=served: _listens(served.port), "listen", Path(folder) / "log")
        for rank in range(ranks):  # an echo looks for its engine for a while only
            others[f"rank {rank}"] = start("echo_ranks.py", path, rank, ranks, NUM_EXPERTS, poll_us)
        for served in found:
            _until(lambda served=served: _all_answer(served), "answer", Path(folder) / "log")
        yield found, others


def measure(served: Served, others: dict[str, int], case: Case, clients: int, seconds: float) -> dict[str, Any]:
    """Load front ends once. cpu_us: of a request, by kind of process."""
    fronts = served.front_pids()
    pids = {**{f"front {number}": pid for number, pid in enumerate(fronts)}, **others}
    if served.frontends > 1:
        pids["accepts and counts"] = served.pid
    before = {name: _cpu_seconds(pid) for name, pid in pids.items()}
    answers = _load(served.port, case, clients, seconds)
    used = {name: _cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    times = sorted(one for answer in answers for one in answer["seconds"])
    by_front = [used[f"front {number}"] for number in range(len(fronts))]
    cpu = {"front ends": sum(by_front), **{name: used[name] for name in used if not name.startswith("front ")}}
    return {
        "requests_per_second": sum(len(answer["seconds"]) / answer["whole_seconds"] for answer in answers),
        "p50_us": 1e6 * times[len(times) // 2],
        "p99_us": 1e6 * times[min(len(times) - 1, len(times) * 99 // 100)],
        "share": max(by_front) / max(sum(by_front), 1e-9),
        "cpu_us": {name: 1e6 * spent / len(times) for name, spent in cpu.items()},
        "compared": sum(answer["checked"] for answer in answers),
    }


def run_rounds(given: argparse.Namespace, found: Sequence[Served], others: dict[str, int]) -> list[dict[str, Any]]:
    """Measure every number of front ends in every case, in turn; the first in a round is another each time."""
    results = []
    for number in range(given.rounds):
        turn = number % len(found)
        for case in (Case(tokens, connections) for tokens in given.tokens for connections in given.connections):
            for served in (*found[turn:], *found[:turn]):
                figures = measure(served, others, case, given.clients, given.seconds)
                results.append({"round": number, "frontends": served.frontends, **case._asdict(), **figures})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Medians of the rounds as a Markdown table."""
    heads = "case | front ends | requests/s | over one | p50 us | p99 us | share of the busiest | us of CPU a request"
    lines = [f"| {heads} |", "|---|---|---|---|---|---|---|---|"]
    cases = dict.fromkeys(Case(result["tokens"], result["connections"]) for result in results)
    for case in cases:
        mine = [result for result in results if (result["tokens"], result["connections"]) == case]
        one = {result["round"]: result["requests_per_second"] for result in mine if result["frontends"] == 1}
        for frontends in dict.fromkeys(result["frontends"] for result in mine):
            rows = [result for result in mine if result["frontends"] == frontends]
            rate, p50, p99, share = (
                statistics.median(row[name] for row in rows)
                for name in ("requests_per_second", "p50_us", "p99_us", "share")
            )
            ratios = [row["requests_per_second"] / one[row["round"]] for row in rows if row["round"] in one]
            over = f"{statistics.median(ratios):.2f}" if ratios else "-"
            cpu = ", ".join(
                f"{name} {statistics.median(row['cpu_us'][name] for row in rows):.0f}" for name in rows[0]["cpu_us"]
            )
            lines.append(
                f"| {case} | {frontends} | {rate:.0f} | {over} | {p50:.0f} | {p99:.0f} | {share:.2f} | {cpu} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, print and write."""
    if sys.argv[1:2] == ["--serve"]:
        port, path, *numbers = sys.argv[2:7]
        serve(int(port), Path(path), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every round here")
    parser.add_argument("--frontends", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 64], help="of a request")
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--clients", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 3)), help="processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    parser.add_argument("--ranks", type=int, default=1, help="echo ranks; each is one more process")
    parser.add_argument("--max-wait-us", type=int, default=0, help="the engine's max_wait_us")
    parser.add_argument("--poll-us", type=int, default=0, help="poll_us of all processes")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    given = parser.parse_args()
    with running(given.frontends, given.ranks, given.max_wait_us, given.poll_us) as (found, others):
        results = run_rounds(given, found, others)
    print(table(results))
    if given.json is not None:
        from timing import about_this_run  # imports torch, which the front ends of `--serve` do not need

        about = {**about_this_run(given.commit), "cores": os.cpu_count(), "clients": given.clients}
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def _load(port: int, case: Case, clients: int, seconds: float) -> list[dict[str, Any]]:
    """Load a port from some processes at once."""
    shares = [case.connections // clients + (number < case.connections % clients) for number in range(clients)]
    commands = [
        [sys.executable, str(HERE / "raw_client.py"), *map(str, (port, PATH, case.tokens, HIDDEN_SIZE, share, seconds))]
        for share in shares
        if share
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    said = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a client failed: {errors.decode()[-2000:]}")
    return [json.loads(out) for out, _ in said]


def _until(holds: Callable[[], bool], what: str, log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while not holds():
        if time.monotonic() > give_up:
            raise RuntimeError(f"front ends do not {what}:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _all_answer(served: Served) -> bool:
    """Ask more than once for each front end: connections opened one after the other reach them in turn."""
    try:
        if len(served.front_pids()) == served.frontends:
            _load(served.port, Case(4, 2 * served.frontends), 1, 0.1)
            return True
    except (RuntimeError, OSError):
        pass
    return False


def _cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) * 1e-9


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
