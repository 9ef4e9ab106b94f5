"""Times a whole expert-parallel layer on all GPUs of a host, beside DeepGEMM's fp8 MegaMoE if asked.

bf16 tokens in, bf16 out: quantize, dispatch, experts, combine; DeepSeek-V3's shape. A figure is the median over replays
of a CUDA graph of six layers, three layers' weights in turn, of the slowest rank's time. Phases are from another graph,
with events between them, and so do not add up to it.

    python tests/bench/bench_layer.py --peers FOLDER
    python tests/bench/bench_layer.py --device cpu --ranks 2        tries the benchmark itself on a small layer
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from goals import layer_verdicts, report
from layer_case import DEEPSEEK, LayerShape
from layer_rank import Task
from timing import about_this_run

TOKENS = (8, 64, 128, 1, 32, 512, 2048)
"""Of a rank; those that matter most first, so that a run that is cut short has them."""
GOAL_RANKS = 4
SMALL = LayerShape(256, 128, 8, 2)

Rows = list[dict[str, Any]]


def run_ours(options: argparse.Namespace, exchange: str, folder: Path) -> Rows:
    """Start a process for each rank and return what they measured, as far as they came."""
    out, gpu = folder / f"{exchange}.json", options.device == "cuda"
    tasks = [
        Task(
            rank=rank,
            ranks=options.ranks,
            device=options.device,
            exchange=exchange,
            experts="cutlass" if gpu else "reference",
            granularity=options.granularity,
            shape=DEEPSEEK if gpu else SMALL,
            tokens=options.tokens,
            replays=options.replays,
            rendezvous=str(folder / f"{exchange}.rendezvous"),
            out=str(out),
        )
        for rank in range(options.ranks)
    ]
    logs = [folder / f"{exchange}.{task.rank}.log" for task in tasks]
    script = Path(__file__).with_name("layer_rank.py")
    commands = [[sys.executable, "-u", str(script), json.dumps(task._asdict())] for task in tasks]
    failed = run_together(commands, logs, options.limit)
    rows: Rows = json.loads(out.read_text()) if out.exists() else []
    if failed is not None:
        print(f"{exchange}: rank {failed} failed or took too long\n{logs[failed].read_text()[-3000:]}", flush=True)
    return rows


def run_together(commands: Sequence[Sequence[str]], logs: Sequence[Path], seconds: float) -> int | None:
    """Run commands at the same time, the first one's output shown; when one fails, or at the end, the others are ended.

    Returns: the index of one that failed or did not end in time; None: all went well.
    """
    deadline = time.monotonic() + seconds
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(
                    command,
                    # Ranks share the host's cores; torch would give all of them to each.
                    env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(commands)))},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    shown = 0
    try:
        while True:
            codes = [process.poll() for process in processes]
            text = logs[0].read_text()
            print(text[shown:], end="", flush=True)
            shown = len(text)
            if any(codes):
                return next(index for index, code in enumerate(codes) if code)
            if None not in codes:
                return None
            if time.monotonic() > deadline:
                return codes.index(None)
            time.sleep(0.2)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_peer(peers: Path, tokens: Sequence[int], ranks: int, folder: Path, seconds: float) -> Rows:
    """Set the peer up and run its harness as it is. Returns: its rows, with `tokens` and `us`, as far as it came."""
    environment = os.environ | {
        "OUT": str(folder),
        "EPL_PEERS": "dgemm",
        "EPL_TOKENS": ",".join(map(str, tokens)),
        "EPL_WORLD": str(ranks),
        "EPL_LIMIT": str(int(seconds)),
    }
    subprocess.run(["bash", str(peers / "setup.sh")], check=True)
    done = subprocess.run([sys.executable, str(peers / "bench_ep_layer.py")], env=environment, check=False)
    if done.returncode:
        print(f"the peer's harness: exit status {done.returncode}", flush=True)
    written = folder / "ep_layer.json"
    return read_peer(json.loads(written.read_text())) if written.exists() else []


def read_peer(written: Mapping[str, Any]) -> Rows:
    """Take the measured rows out of what the harness wrote."""
    found: Rows = []
    for peer in written.values():
        found += [row for row in peer.get("rows", []) if "us" in row]
        if peer["rc"] != 0:
            print(f"the peer's harness ended with {peer['rc']}; {len(found)} token counts were measured", flush=True)
    return found


def table(peer: Rows, ours: Mapping[str, Rows]) -> str:
    """A line for each number of tokens: the peer, then each exchange with times faster, and its phases below."""
    peer_us = {row["tokens"]: row["us"] for row in peer}
    lines = []
    for exchange, rows in ours.items():
        lines.append(
            f"{exchange}: tokens a rank | us | p10 to p90 | floor us | share | peer us | times faster | phases us"
        )
        for row in sorted(rows, key=lambda row: row["tokens"]):
            other = peer_us.get(row["tokens"])
            against = f"{other:8.1f} | {other / row['us']:5.2f}" if other else "       - |     -"
            phases = ", ".join(f"{phase} {us:.1f}" for phase, us in row["phases_us"].items())
            span = f"{row['p10_us']:7.1f} to {row['p90_us']:7.1f}"
            times = f"{row['us']:8.1f} | {span} | {row['floor_us']:7.1f} | {row['percent']:3.0f} %"
            lines.append(f"{row['tokens']:5d} | {times} | {against} | {phases}")
    for row in next(iter(ours.values()), []):
        sent = row["sent_bytes"]
        share = sent["dispatch_bytes"] / max(1, sent["bf16_dispatch_bytes"])
        lines.append(
            f"{row['tokens']:5d} tokens: the busiest rank sends {sent['dispatch_bytes']} bytes of fp8 and scales, "
            f"{share:.2f} of bf16, and {sent['combine_bytes']} bytes back"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the peer and ours, print tables and goals, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "layer.json")
    parser.add_argument("--peers", type=Path, help="folder of the peer's harness (setup.sh, bench_ep_layer.py)")
    parser.add_argument("--exchanges", nargs="+", default=["deepep", "nccl"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="of a rank")
    parser.add_argument("--granularity", choices=("token", "token_group"), default="token")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="default: one for each GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--replays", type=int, default=60, help="of a graph, of which the median is taken")
    parser.add_argument("--limit", type=float, default=75, help="seconds for the peer, and for each exchange")
    parser.add_argument("--commit", help="what is measured; default: what git says")
    options = parser.parse_args()
    if options.ranks < 1:
        parser.error("--ranks: expected at least one rank, and no GPU is visible")
    if options.device == "cpu" and "deepep" in options.exchanges:
        options.exchanges = ["nccl"]  # the only one of them that also runs on a CPU
    written: dict[str, Any] = about_this_run(options.commit) | {"ranks": options.ranks, "peer": [], "ours": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.peers:
            written["peer"] = run_peer(options.peers, options.tokens, options.ranks, folder, options.limit)
        for exchange in options.exchanges:
            written["ours"][exchange] = run_ours(options, exchange, folder)
            options.out.write_text(json.dumps(written, indent=1))
    print(table(written["peer"], written["ours"]))
    if options.device == "cuda":
        peer_us = {row["tokens"]: row["us"] for row in written["peer"]}
        ours_us = {row["tokens"]: row["us"] for row in written["ours"][options.exchanges[0]]}
        if options.ranks != GOAL_RANKS:
            print(f"The goals are for {GOAL_RANKS} GPUs; this ran on {options.ranks}.")
        print(report(layer_verdicts(ours_us, peer_us)))
    lacking = [name for name, rows in written["ours"].items() if len(rows) < len(options.tokens)]
    if lacking:
        sys.exit(f"bench_layer: not everything was measured with {', '.join(lacking)}")


if __name__ == "__main__":
    main()
