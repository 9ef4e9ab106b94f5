"""Everything that is to be seen on a GPU host, in one call: tests, the layer beside its peer, the service under load.

    python tests/bench/run_host.py --out DIR --peers FOLDER                     all GPUs, within eight minutes
    python tests/bench/run_host.py --out DIR --device cpu --ranks 8             tries it with a tiny model on CPUs

The checkpoint of the service is made beside the first stages, in --work: 5.7 GB a layer. DIR/host.json says how each
stage ended and in how long, with its log beside it; a stage that fails or takes too long does not keep the others from
running.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_SECONDS = 470.0
TESTS = ("tests/service/exchange", "tests/service/test_rank_gpu.py", "tests/service/test_missing_experts.py")
PRESETS = {"cuda": "deepseek-r1-layer", "cpu": "tiny"}


class Stage(NamedTuple):
    """A program that is to run. limit_seconds: it is ended after that, or at the deadline of all."""

    name: str
    command: list[str]
    limit_seconds: float


def stages(options: argparse.Namespace, model: Path) -> list[Stage]:
    """Return what runs after each other, the most wanted first."""
    ranks, device, out = str(options.ranks), options.device, options.out
    layer = ["tests/bench/bench_layer.py", "--ranks", ranks, "--device", device, "--out", str(out / "layer.json")]
    layer += ["--peers", str(options.peers)] if options.peers else []
    layer += ["--tokens", *map(str, options.tokens)] if options.tokens else []
    layer += ["--commit", options.commit] if options.commit else []
    service = ["-m", "tests.bench.host_service", str(model), "--ranks", ranks, "--device", device]
    service += ["--out", str(out / "service.json"), "--seconds", str(options.seconds)]
    wanted = "gpu or multigpu" if device == "cuda" else "not (gpu or multigpu)"
    tests = ["-m", "pytest", "-q", "-m", wanted, *TESTS, *options.pytest]
    found = (Stage("layer", layer, 190.0), Stage("service", service, 200.0), Stage("tests", tests, 200.0))
    return [Stage(stage.name, [sys.executable, *stage.command], stage.limit_seconds) for stage in found]


def run(stage: Stage, log: Path, deadline: float) -> dict[str, Any]:
    """Run one stage; its output goes to `log`. deadline: of all stages, on the monotonic clock."""
    started = time.monotonic()
    limit_seconds = min(stage.limit_seconds, deadline - started)
    if limit_seconds <= 0:
        return {"stage": stage.name, "ended": "not started: no time was left"}
    with log.open("wb") as file:
        process = subprocess.Popen(stage.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            ended = f"exit status {process.wait(limit_seconds)}"
        except subprocess.TimeoutExpired:
            process.terminate()  # a service ends its ranks, a benchmark its processes
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            ended = f"ended after {limit_seconds:.0f} s"
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return {"stage": stage.name, "ended": ended, "seconds": time.monotonic() - started, "last_line": "".join(last)}


def main() -> int:
    """Parse the command line, and run every stage. Returns: 1 where one did not end with 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for JSON and logs")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="default: one for each GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=3, help="MoE layers of the service's model (default: 3)")
    parser.add_argument("--work", type=Path, help="folder for the model (default: a temporary one)")
    parser.add_argument("--peers", type=Path, help="of bench_layer.py")
    parser.add_argument("--tokens", type=int, nargs="+", help="of bench_layer.py")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load of the service")
    parser.add_argument("--deadline-seconds", type=float, default=DEADLINE_SECONDS)
    parser.add_argument("--commit", help="what is measured; default: what git says")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments of pytest, last")
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.deadline_seconds
    document: dict[str, Any] = {"ranks": options.ranks, "device": options.device, "stages": []}
    with tempfile.TemporaryDirectory(prefix="moe-host-", dir=options.work) as work:
        model = Path(work) / "model"
        make = [sys.executable, "-m", "moe_forward.main", "make-model", str(model), "--layers", str(options.layers)]
        with (options.out / "make.log").open("wb") as log:
            maker = subprocess.Popen([*make, "--preset", PRESETS[options.device]], stdout=log, stderr=log)
        try:
            for stage in stages(options, model):
                if stage.name == "service":
                    document["make_status"] = maker.wait(max(0.1, deadline - time.monotonic()))
                document["stages"].append(run(stage, options.out / f"{stage.name}.log", deadline))
                (options.out / "host.json").write_text(json.dumps(document, indent=1))
                print(document["stages"][-1], flush=True)
        finally:
            maker.kill()
            maker.wait()
    return 0 if all(stage["ended"] == "exit status 0" for stage in document["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main())
