"""A program, one process a rank: put a rank together as `rank_process` does, run steps on it, keep what it says.

step_program.py FOLDER RANK. FOLDER/work.pt: slab (descriptor, bytes) of front end 0, setup (`RankSetup` of rank 0),
kind (cpu or cuda), layers (with all experts), steps (packed), one_by_one (see `run_steps`). FOLDER/rank-N.pt: packed
results, one a step.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_forward import experts
from moe_forward.checkpoint import LayerWeights
from moe_forward.datagrams import pack, unpack
from moe_forward.rank import Launched, Rank
from moe_forward.rank_setup import RankSetup, join_group
from moe_forward.router import Router
from moe_forward.slab_rows import attach, detach
from moe_forward.types import Step, StepResult


def start_rank(setup: RankSetup, layers: Mapping[int, LayerWeights]) -> Rank:
    """Put one rank together, warm. layers: with all experts."""
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    held = {
        layer: experts.LayerExperts(tuple(weights.experts[expert] for expert in setup.experts_held), weights.shared)
        for layer, weights in layers.items()
    }
    backend = experts.create(setup.experts, held, setup.activation_scale, device)
    rank = join_group(setup, Router(setup.spec, layers, device), backend)
    rank.warm_up()
    return rank


def run_steps(
    setup: RankSetup,
    layers: Mapping[int, LayerWeights],
    steps: list[Step],
    slab: tuple[int, int],
    one_by_one: int | None = None,
) -> list[StepResult]:
    """Run steps on one rank. layers: with all experts. slab: descriptor and bytes of front end 0.

    one_by_one: so many steps are; of those behind, the next is always launched before one is finished. None: all.
    """
    rank = start_rank(setup, layers)
    device = torch.device(setup.device)
    slabs = {0: attach(*slab, device)}
    count = len(steps) if one_by_one is None else one_by_one
    results = [rank.step(step, slabs) for step in steps[:count]]
    launched: deque[Launched] = deque()
    for step in steps[count:]:
        launched.append(rank.launch(step, slabs))
        if len(launched) == 2:
            results.append(launched.popleft().finish())
    results += [each.finish() for each in launched]
    detach(slabs[0], device)
    rank.close()
    return results


def main() -> None:
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    work: dict[str, Any] = torch.load(folder / "work.pt", weights_only=False)
    device = f"cuda:{number}" if work["kind"] == "cuda" else "cpu"
    setup = replace(work["setup"], rank=number, device=device)
    steps = [step for data in work["steps"] if isinstance(step := unpack(memoryview(data)), Step)]
    results = run_steps(setup, work["layers"], steps, work["slab"], work["one_by_one"])
    torch.save([pack(result) for result in results], folder / f"rank-{number}.pt")


if __name__ == "__main__":
    main()
