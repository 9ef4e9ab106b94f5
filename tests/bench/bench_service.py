"""What the service's own path costs: front end, engine and ranks, with experts that only copy.

    python tests/bench/bench_service.py --json service.json
    python tests/bench/bench_service.py --requests 200000            # does memory stay?
    python tests/bench/bench_service.py --asgi                       # and the service with bytes in ASGI messages
    python tests/bench/bench_service.py --stages                     # where one request's time goes
    python tests/bench/bench_service.py --copies                     # how often a body is copied
    python tests/bench/bench_service.py --ray-serve PYTHON           # and the same call behind Ray Serve

`echo` is uvicorn (uvloop, httptools) around an ASGI application that sends its body back: no service on uvicorn can be
faster. `service` is the real front end, engine and channel over ranks that copy hidden states to the output. Both are
up at once and measured in turn, in rounds, by the same client in a process of its own; ratios are of one round, and the
median of the rounds is told. PYTHON has `ray[serve]` installed and serves a FastAPI ingress with the same echo.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench_front import HIDDEN_SIZE, NUM_EXPERTS
from goals import Verdict, report
from profiling import stage_table

HERE = Path(__file__).parent
PATH = "/v1/moe/forward?layer=3"
START_SECONDS = 60.0
P50_OVER_ECHO = 1.8
P99_OVER_P50 = 3.0
SHARE_OF_ECHO = 0.6
TIMES_RAY_SERVE = 3.0
COPIES = 40


class Case(NamedTuple):
    """tokens: of a request, bf16. connections: each with one request at a time."""

    tokens: int
    connections: int

    def __str__(self) -> str:
        return f"{2 * self.tokens * HIDDEN_SIZE // 1000} kB, {self.connections} connection(s)"


CASES = [Case(tokens, connections) for tokens in (4, 64) for connections in (1, 8)]


class Server(NamedTuple):
    """A server to measure. port: on 127.0.0.1. pids: its processes by what they are."""

    port: int
    pids: dict[str, int]


@contextlib.contextmanager
def servers(
    ranks: int = 1,
    max_wait_us: int = 0,
    stages: Path | None = None,
    asgi: bool = False,
    ray_serve: str | None = None,
    echo: bool = True,
    poll_us: Sequence[int] = (0,),
) -> Iterator[dict[str, Server]]:
    """Start every server; they are ended when the block ends.

    stages: see `bench_front.serve_front`. asgi: a second front end on the same engine, without the direct way.
    ray_serve: see the module. echo: whether there is one.
    poll_us: one service for each; the first is `service`, the others say theirs.
    """
    with contextlib.ExitStack() as running, tempfile.TemporaryDirectory(prefix="moe-") as folder:
        log_path = Path(folder) / "log"
        log = running.enter_context(log_path.open("w"))

        def start(*command: object, python: str = sys.executable) -> int:
            process = subprocess.Popen([python, *map(str, command)], stdout=log, stderr=log, cwd=HERE)
            running.callback(_end, process)
            return process.pid

        def serve(name: str, number: int, us: int, kind: str = "front", *further: object) -> None:
            path, port = Path(folder) / f"engine{number}.sock", _free_port()
            engine = start("bench_front.py", "engine", path, max_wait_us, us)
            front = start("bench_front.py", kind, port, path, ranks, us, *further)
            pids = {"front end": front}
            for rank in range(ranks):
                pids[f"rank {rank}"] = start("echo_ranks.py", path, rank, ranks, NUM_EXPERTS, us)
            found[name] = Server(port, {**pids, "engine": engine})

        found: dict[str, Server] = {}
        if echo:
            port = _free_port()
            found["echo"] = Server(port, {"echo": start("bench_front.py", "echo", port)})
        for number, us in enumerate(poll_us):
            name = f"service polling {us} us" if number else "service"
            serve(name, number, us, "front", *([] if stages is None else [stages]))
        if asgi:
            serve("service by ASGI", len(poll_us), poll_us[0], "asgi")
        if ray_serve is not None:
            port = _free_port()
            found["Ray Serve"] = Server(port, {"driver": start("ray_serve_echo.py", port, python=ray_serve)})
        for name, server in found.items():
            try:
                _until_it_answers(server.port)
            except TimeoutError as error:
                raise RuntimeError(f"{name} does not answer: {error}\n{log_path.read_text()[-4000:]}") from None
        yield found


def measure(server: Server, case: Case, seconds: float) -> dict[str, Any]:
    """Load one server once, from a process of its own; cpu_us: of a request, by process."""
    before = {name: _cpu_seconds(pid) for name, pid in server.pids.items()}
    found = _client(server, case, str(seconds))
    ordered = sorted(found["seconds"])
    cpu = {name: 1e6 * (_cpu_seconds(pid) - before[name]) / len(ordered) for name, pid in server.pids.items()}
    return {
        "p50_us": 1e6 * ordered[len(ordered) // 2],
        "p99_us": 1e6 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "requests_per_second": len(ordered) / found["whole_seconds"],
        "cpu_us": cpu,
    }


def run_rounds(found: dict[str, Server], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure every server in every case, in turn, `rounds` times; the first in a round is another each time."""
    results = []
    for number in range(rounds):
        for case in CASES:
            names = list(found)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                figures = measure(found[name], case, seconds)
                results.append({"round": number, "path": name, **case._asdict(), **figures})
    return results


def ratio(results: Sequence[dict[str, Any]], case: Case, figure: str, path: str, over: str) -> float | None:
    """Median over the rounds of `figure` of one path over that of another, of the same round."""
    by_round: dict[int, dict[str, float]] = {}
    for result in results:
        if (result["tokens"], result["connections"]) == case:
            by_round.setdefault(result["round"], {})[result["path"]] = result[figure]
    ratios = [paths[path] / paths[over] for paths in by_round.values() if path in paths and over in paths]
    return statistics.median(ratios) if ratios else None


def median(results: Sequence[dict[str, Any]], case: Case, figure: str, path: str) -> float | None:
    """Median over the rounds of one figure."""
    found = [result[figure] for result in _of(results, case, path)]
    return statistics.median(found) if found else None


def verdicts(results: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Hold the rounds against the goals."""
    found = []
    for case in CASES:
        if case.connections == 1:
            over = ratio(results, case, "p50_us", "service", "echo")
            tails = [one["p99_us"] / one["p50_us"] for one in _of(results, case, "service")]
            ray = ratio(results, case, "p50_us", "Ray Serve", "service")
            found += [
                Verdict(f"{case}: p50 over the echo's", P50_OVER_ECHO, False, over),
                Verdict(f"{case}: p99 over its p50", P99_OVER_P50, False, statistics.median(tails) if tails else None),
                Verdict(f"{case}: Ray Serve's p50 over ours", TIMES_RAY_SERVE, True, ray),
            ]
        else:
            share = ratio(results, case, "requests_per_second", "service", "echo")
            ray = ratio(results, case, "requests_per_second", "service", "Ray Serve")
            found += [
                Verdict(f"{case}: share of the echo's requests per second", SHARE_OF_ECHO, True, share),
                Verdict(f"{case}: our requests per second over Ray Serve's", TIMES_RAY_SERVE, True, ray),
            ]
    return found


def _of(results: Sequence[dict[str, Any]], case: Case, path: str) -> list[dict[str, Any]]:
    return [one for one in results if (one["tokens"], one["connections"], one["path"]) == (*case, path)]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Medians of the rounds as a Markdown table."""
    lines = ["| case | path | p50 us | p99 us | requests/s | us of CPU a request |", "|---|---|---|---|---|---|"]
    for case in CASES:
        for path in dict.fromkeys(result["path"] for result in results):
            cells = [median(results, case, figure, path) for figure in ("p50_us", "p99_us", "requests_per_second")]
            shown = ["-" if cell is None else f"{cell:.0f}" for cell in cells]
            lines.append(f"| {case} | {path} | {' | '.join(shown)} | {_cpu(results, case, path)} |")
    return "\n".join(lines)


def _cpu(results: Sequence[dict[str, Any]], case: Case, path: str) -> str:
    found = [result["cpu_us"] for result in _of(results, case, path)]
    names = found[0] if found else ()
    return ", ".join(f"{name} {statistics.median(cpu[name] for cpu in found):.0f}" for name in names)


def watch_memory(server: Server, requests: int) -> list[dict[str, Any]]:
    """Send many requests of both sizes over eight connections; resident memory of every process before and after."""
    _client(server, Case(64, 8), "0", "--requests", "2000")  # pages of the slab are taken when first touched
    before = {name: _resident_bytes(pid) for name, pid in server.pids.items()}
    started = time.monotonic()
    for tokens, share in ((4, 0.95), (64, 0.05)):
        _client(server, Case(tokens, 8), "0", "--requests", str(int(requests * share)))
    after = {name: _resident_bytes(pid) for name, pid in server.pids.items()}
    seconds = time.monotonic() - started
    about = {"requests": requests, "seconds": seconds}
    return [{"process": name, "before_bytes": before[name], "after_bytes": after[name], **about} for name in before]


def count_copies(found: dict[str, Server], requests: int) -> str:
    """How many times a body's bytes are copied in user space, from the CPU time that they take there.

    The time in user mode that a process spends on a request of 59 MB, over that of one copy of as many bytes. The
    kernel's own copies between socket and memory are not user time; ranks and engine are other processes.
    """
    case = Case(4096, 1)
    nbytes = 2 * case.tokens * HIDDEN_SIZE
    copy = _copy_seconds(nbytes)
    lines = [f"one copy of {nbytes / 1e6:.0f} MB takes {1e3 * copy:.1f} ms of user time"]
    lines += ["| path | copies in and out |", "|---|---|"]
    for name, server in found.items():
        pid = next(iter(server.pids.values()))
        _client(server, case, "0", "--requests", "4")
        before = _user_seconds(pid)
        _client(server, case, "0", "--requests", str(requests))
        lines.append(f"| {name} | {(_user_seconds(pid) - before) / requests / copy:.2f} |")
    return "\n".join(lines)


def _copy_seconds(nbytes: int) -> float:
    """User time of one copy between memory that was touched before; the larger part of it waits for memory."""
    source, target = memoryview(bytearray(nbytes)), memoryview(bytearray(nbytes))
    for _ in range(3):
        target[:] = source
    before = os.times().user
    for _ in range(COPIES):
        target[:] = source
    return (os.times().user - before) / COPIES


def show_stages(tokens: int, requests: int, poll_us: int) -> str:
    """Stages of requests sent one at a time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stages.json"
        with servers(stages=path, echo=False, poll_us=[poll_us]) as found:
            _client(found["service"], Case(tokens, 1), "0", "--requests", str(requests))
        return stage_table(json.loads(path.read_text())[requests // 10 :])


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every round here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--ranks", type=int, default=1, help="echo ranks; each is one more process")
    parser.add_argument("--max-wait-us", type=int, default=0, help="the engine's max_wait_us")
    parser.add_argument("--poll-us", type=int, nargs="+", default=[0], help="of all processes; a service each")
    parser.add_argument("--requests", type=int, help="send so many requests instead, and show memory before and after")
    parser.add_argument("--asgi", action="store_true", help="measure the service without the direct way, too")
    parser.add_argument("--ray-serve", metavar="PYTHON", help="interpreter that has ray[serve]")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    parser.add_argument("--stages", action="store_true", help="show where one request's time goes instead")
    parser.add_argument("--copies", action="store_true", help="show how often a body is copied instead")
    given = parser.parse_args()
    if given.stages:
        for case in CASES[::2]:
            print(f"{case}\n{show_stages(case.tokens, 4000, given.poll_us[0])}\n")
        return
    if given.copies:
        with servers(asgi=True) as found:
            print(count_copies(found, 20))
        return
    with servers(given.ranks, given.max_wait_us, None, given.asgi, given.ray_serve, poll_us=given.poll_us) as found:
        if given.requests is not None:
            results: list[dict[str, Any]] = watch_memory(found["service"], given.requests)
            for row in results:
                before, after = row["before_bytes"] / 1e6, row["after_bytes"] / 1e6
                print(f"{row['process']:10s} {before:7.1f} MB -> {after:7.1f} MB ({after - before:+.1f})")
        else:
            results = run_rounds(found, given.rounds, given.seconds)
            print(table(results))
            print(report(verdicts(results)))
    if given.json is not None:
        from timing import about_this_run  # only here: it imports torch

        about = {**about_this_run(given.commit), "cores": os.cpu_count()}
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def _client(server: Server, case: Case, *arguments: str) -> dict[str, Any]:
    values = (server.port, PATH, case.tokens, HIDDEN_SIZE, case.connections)
    command = [sys.executable, str(HERE / "raw_client.py"), *map(str, values), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the client failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _until_it_answers(port: int) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            _client(Server(port, {}), Case(4, 1), "0.1")
            return
        except RuntimeError as error:
            if time.monotonic() > give_up:
                raise TimeoutError(error) from None
            time.sleep(0.2)


def _cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) * 1e-9


def _user_seconds(pid: int) -> float:
    """CPU time in user mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: without the slab, which all processes map and which has its full size."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"process {pid} has no RssAnon")


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
