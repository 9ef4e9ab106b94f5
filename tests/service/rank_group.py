"""A program: run steps on groups of CPU ranks, forked from one process, over a slab that another process made.

FOLDER/jobs.pt: slab (descriptor, bytes) of front end 0, spec, layers (with all experts), and jobs: list of
(ranks, exchange, granularity, packed steps). FOLDER/rank-N.pt: packed results of rank N, a list for each job it was in.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch
from make_rank import CPU, MAX_TOKENS, make_rank

from moe_forward import exchange
from moe_forward.datagrams import pack, unpack
from moe_forward.slab_rows import attach
from moe_forward.types import Step


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    work = torch.load(folder / "jobs.pt", weights_only=False)
    slabs = {0: attach(*work["slab"], CPU)}
    spec = work["spec"]
    results: list[list[bytes]] = []
    for number, (ranks, exchange_name, granularity, steps) in enumerate(work["jobs"]):
        results.append([])
        if rank >= ranks:
            continue
        columns = 1 if granularity == "token" else spec.hidden_size // 128
        place = exchange.Place(
            rank,
            ranks,
            spec.num_experts,
            folder / f"group-{number}",
            timeout_seconds=30.0,
            device=CPU,
            hidden_size=spec.hidden_size,
            top_k=spec.top_k,
            max_tokens=MAX_TOKENS,
            scale_columns=columns,
        )
        member = make_rank(rank, ranks, spec, work["layers"], exchange.create(exchange_name, place), granularity)
        member.warm_up()
        for data in steps:
            step = unpack(memoryview(data))
            assert isinstance(step, Step)
            results[-1].append(pack(member.step(step, slabs)))
        member.close()
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
