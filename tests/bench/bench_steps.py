"""Times a rank's whole steps, from the slab and back, beside the layer in them; no engine and no HTTP.

A step's rows are bf16 with expert ids and weights, or without; DeepSeek-V3's shape, one layer. With one step in flight
the rank waits for each before it launches the next; with two, copies and launches of one go beside the computing of the
other.

    python tests/bench/bench_steps.py                       one rank
    python tests/bench/bench_steps.py --ranks 4
    python tests/bench/bench_steps.py --device cpu          tries the benchmark itself on a small layer
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_layer import SMALL, run_together
from layer_case import DEEPSEEK
from step_rank import Task
from timing import about_this_run

TOKENS = (64, 1, 512, 4096)
GOAL_TOKENS = 64
GOAL_ADDED_US = 1000.0

Rows = list[dict[str, Any]]


def make_tasks(options: argparse.Namespace, folder: Path) -> list[Task]:
    """Return what each rank does."""
    gpu = options.device == "cuda"
    many = "deepep" if gpu else "gloo"
    exchange = options.exchange or ("local" if options.ranks == 1 else many)
    return [
        Task(
            rank=rank,
            ranks=options.ranks,
            device=options.device,
            exchange=exchange,
            experts="cutlass" if gpu else "reference",
            shape=DEEPSEEK if gpu else SMALL,
            tokens=options.tokens,
            steps=options.steps,
            rendezvous=str(folder / "rendezvous"),
            out=str(folder / "steps.json"),
            requests=options.requests,
            gate=options.gate,
        )
        for rank in range(options.ranks)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each number of tokens and of steps in flight, and whether the goal is reached."""
    lines = ["tokens a step | requests | in flight | us a step | latency us p50, p90 | launch us | layer us | added us"]
    for row in sorted(rows, key=lambda row: (row["tokens"], row["in_flight"])):
        latency = f"{row['latency_us']:8.1f}, {row['latency_p90_us']:8.1f}"
        figures = (
            f"{row['us']:8.1f} | {latency} | {row['launch_us']:7.1f} | {row['layer_us']:8.1f} | {row['added_us']:8.1f}"
        )
        lines.append(f"{row['tokens']:5d} | {row['requests']:3d} | {row['in_flight']} | {figures}")
        if (row["tokens"], row["in_flight"]) == (GOAL_TOKENS, 1):
            verdict = "reached" if row["added_us"] <= GOAL_ADDED_US else "missed"
            lines.append(f"goal: {GOAL_TOKENS} tokens, at most {GOAL_ADDED_US:g} us beyond the layer: {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Start a process for each rank, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "steps.json")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--exchange", help="default: local for one rank, else deepep on GPUs and gloo on CPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="of a step, over all ranks")
    parser.add_argument("--requests", type=int, default=1, help="that a step's tokens are spread over")
    parser.add_argument("--gate", action="store_true", help="ranks choose the experts, by DeepSeek-V3's gate")
    parser.add_argument("--steps", type=int, default=200, help="timed for each figure")
    parser.add_argument("--limit", type=float, default=90, help="seconds for everything")
    parser.add_argument("--commit", help="what is measured; default: what git says")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tasks = make_tasks(options, Path(temporary))
        logs = [Path(temporary) / f"{task.rank}.log" for task in tasks]
        script = str(Path(__file__).with_name("step_rank.py"))
        commands = [[sys.executable, "-u", script, json.dumps(task._asdict())] for task in tasks]
        failed = run_together(commands, logs, options.limit)
        written = Path(tasks[0].out)
        rows: Rows = json.loads(written.read_text()) if written.exists() else []
        if failed is not None:
            print(f"rank {failed} failed or took too long\n{logs[failed].read_text()[-3000:]}", flush=True)
    about = about_this_run(options.commit) | {"ranks": options.ranks, "exchange": tasks[0].exchange}
    options.out.write_text(json.dumps(about | {"rows": rows}, indent=1))
    print(table(rows))
    if failed is not None:
        sys.exit("bench_steps: not everything was measured")


if __name__ == "__main__":
    main()
