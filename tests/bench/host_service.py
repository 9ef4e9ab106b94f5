"""The whole service of a checkpoint: how long it takes to be ready, what it does under load, and a killed rank.

    python -m tests.bench.host_service FOLDER --out service.json                               all GPUs
    python -m tests.bench.host_service FOLDER --out service.json --device cpu --ranks 8        tries it on CPUs

Requests go to layers at random, so that all of them take turns. The rank is killed while the load of `KILL_LOAD` runs;
what is measured then is until when the service says that it is not ready, until when it has answered with the same bits
as before, and how the load's requests ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moe_forward import checkpoint

from ..service.whole.forwards import Forward, as_safetensors, post, read_output
from ..service.whole.running import Service, command

LOADS = ((1, 1), (64, 1), (1, 32), (1, 256), (64, 32), (1024, 8), (4096, 4))
"""Tokens of a request, and callers, where the command line names no others."""
KILL_LOAD = (64, 8)
KILL_LOAD_SECONDS = 40.0  # longer than a group takes to be ready again
KILL_AFTER_SECONDS = 4.0  # of the load, its warm-up among them
START_SECONDS = 300.0
POLL_SECONDS = 0.01
NOTICE_SECONDS = 60.0


def load_of(text: str) -> tuple[int, int]:
    """Read a load: 64x32 are 64 tokens a request from 32 callers."""
    tokens, callers = text.split("x")
    return int(tokens), int(callers)


def bench_command(
    service: Service, tokens: int, callers: int, seconds: float, processes: int, json_file: Path
) -> list[str]:
    """Return the command of `moe-forward bench` for one load."""
    options = ["--tokens", str(tokens), "--concurrency", str(callers), "--layer-order", "random"]
    options += ["--seconds", str(seconds), "--processes", str(min(processes, callers))]
    return command("bench", service.url, *options, "--no-self-check", "--json", str(json_file))


def report_of(ended: int, errors: str, json_file: Path) -> dict[str, Any]:
    """Return the report of a bench that has ended. Raises: RuntimeError where it did not end well."""
    if ended:
        raise RuntimeError(f"bench ended with {ended}: {errors[-2000:]}")
    report: dict[str, Any] = json.loads(json_file.read_text())
    return report


def bench(
    service: Service, tokens: int, callers: int, seconds: float, json_file: Path, processes: int = 1
) -> dict[str, Any]:
    """Load the service by `moe-forward bench` and return its report."""
    whole = bench_command(service, tokens, callers, seconds, processes, json_file)
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    return report_of(done.returncode, done.stderr, json_file)


def kill_a_rank(service: Service, forward: Forward, json_file: Path) -> dict[str, Any]:
    """Kill the last rank under load. Returns: seconds until not ready, ready and answered, bits, and the load's end."""
    before = read_output(post(service.url, as_safetensors(forward)))
    victim = service.rank_pids()[-1]
    whole = bench_command(service, *KILL_LOAD, KILL_LOAD_SECONDS, 1, json_file)
    load = subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(KILL_AFTER_SECONDS)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while service.get("/v2/health/ready").status_code == 200:
        if time.monotonic() > killed + NOTICE_SECONDS:
            raise RuntimeError(f"a killed rank was not noticed within {NOTICE_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    noticed = time.monotonic()
    service.wait_ready_again()
    ready = time.monotonic()
    after = read_output(post(service.url, as_safetensors(forward)))
    answered = time.monotonic()
    errors = load.communicate()[1]
    return {
        "noticed_seconds": noticed - killed,
        "ready_seconds": ready - killed,
        "answered_seconds": answered - killed,
        "same_bits": torch.equal(before, after),
        "load": report_of(load.returncode, errors, json_file),
    }


def main() -> int:
    """Parse the command line, and measure; what is known is written after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--ranks", type=int, help="default: the service's own choice")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--loads", type=load_of, nargs="+", default=LOADS, metavar="TOKENSxCALLERS")
    parser.add_argument("--no-kill", dest="kill", action="store_false", help="end after the loads")
    parser.add_argument("--poll-us", type=int, help="default: the service's own choice")
    parser.add_argument("--front-ends", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="of the load, one a caller at most")
    options = parser.parse_args()
    spec = checkpoint.read_spec(options.folder)
    config = {
        "device": options.device,
        "slab_bytes": 1 << 30,
        "max_rank_restarts": 3,
        "api_keys_file": None,
        "frontends": options.front_ends,
        "poll_us": options.poll_us,
    }
    generator = torch.Generator().manual_seed(1)
    forward = Forward(spec.layers[-1], torch.randn(33, spec.hidden_size, generator=generator).to(torch.bfloat16))
    bench_file = options.out.with_suffix(".bench.json")
    document: dict[str, Any] = {"layers": len(spec.layers), "experts": spec.num_experts, "loads": []}

    def write() -> None:
        options.out.write_text(json.dumps(document, indent=1))

    started = time.monotonic()
    with closing(Service(options.folder, options.ranks, config, START_SECONDS, keeps_freed=True)) as service:
        service.wait_ready()
        document["start_seconds"] = time.monotonic() - started
        document["ranks"] = service.get("/v1/ranks").json()["ranks"]
        write()
        for tokens, callers in options.loads:
            report = bench(service, tokens, callers, options.seconds, bench_file, options.processes)
            document["loads"].append({"tokens": tokens, "callers": callers, "report": report})
            write()
        if options.kill:
            document["killed_rank"] = kill_a_rank(service, forward, bench_file)
            write()
        document["exit_status"] = service.terminate()
        write()
    survived = not options.kill or document["killed_rank"]["same_bits"]
    return 0 if survived and document["exit_status"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
