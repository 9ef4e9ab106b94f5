"""A program: run steps on groups of gloo ranks, forked from one process, over a slab that another process made.

FOLDER/jobs.pt: slab (descriptor, bytes) of front end 0, spec, layers (with all experts), and jobs: list of
(ranks, granularity, packed steps). FOLDER/rank-N.pt: packed results of rank N, a list for each job it was in.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from moe_forward import exchange, experts
from moe_forward.messages import pack, unpack
from moe_forward.rank import Rank
from moe_forward.slab_rows import attach
from moe_forward.types import Step, expert_range


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    work = torch.load(folder / "jobs.pt", weights_only=False)
    slabs = {0: attach(*work["slab"])}
    spec = work["spec"]
    results: list[list[bytes]] = []
    for number, (ranks, granularity, steps) in enumerate(work["jobs"]):
        results.append([])
        if rank >= ranks:
            continue
        mine = expert_range(rank, ranks, spec.num_experts)
        layers = {
            layer: replace(weights, experts=weights.experts[mine.start : mine.stop])
            for layer, weights in work["layers"].items()
        }
        group = exchange.create("gloo", exchange.Place(rank, ranks, spec.num_experts, folder / f"group-{number}", 30.0))
        local = {layer: experts.LayerExperts(weights.experts, weights.shared) for layer, weights in layers.items()}
        member = Rank(rank, ranks, spec, layers, group, experts.create("reference", local, granularity), granularity)
        member.warm_up()
        for data in steps:
            step = unpack(memoryview(data))
            assert isinstance(step, Step)
            results[-1].append(pack(member.step(step, slabs)))
        group.close()
    torch.save(results, folder / f"rank-{rank}.pt")


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = max(job[0] for job in torch.load(folder / "jobs.pt", weights_only=False)["jobs"])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
