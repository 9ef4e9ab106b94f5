"""A program: run the cases of a folder over gloo, with one forked process a rank (torch is imported only once).

FOLDER/cases.pt: list of mappings with ranks, num_experts, counts (rows of each rank), values [T, H] uint8 (e4m3 bytes),
scales [T, S], ids [T, K], weights [T, K]. Consecutive cases of the same ranks and experts share a group.
FOLDER/rank-N.pt: what rank N got in each case it took part in, by index of the case; "lost" holds the error that
rank 0 saw when rank 1 of 2 left without a word.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

from moe_forward import exchange
from moe_forward.types import expert_range
from w4afp8 import Quantized, dequantize_tokens


def run_case(group: exchange.Exchange, rank: int, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Dispatch, let each expert scale its rows by (id + 1) * weight, combine."""
    start = sum(case["counts"][:rank])
    mine = slice(start, start + case["counts"][rank])
    tokens = Quantized(case["values"][mine].view(torch.float8_e4m3fn), case["scales"][mine])
    received = group.dispatch(tokens, case["ids"][mine], case["weights"][mine])
    held = expert_range(rank, case["ranks"], case["num_experts"])
    factors = torch.repeat_interleave(torch.arange(held.start, held.stop) + 1.0, received.offsets.diff())
    rows = dequantize_tokens(received.rows) * factors[:, None] * received.weights[:, None]
    return {
        "values": received.rows.values.view(torch.uint8),
        "scales": received.rows.scales,
        "offsets": received.offsets,
        "weights": received.weights,
        "combined": group.combine(rows, received.handle),
    }


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    cases = torch.load(folder / "cases.pt")
    results: dict[Any, Any] = {}
    key = lambda item: (item[1]["ranks"], item[1]["num_experts"])  # noqa: E731
    for number, ((ranks, num_experts), part) in enumerate(itertools.groupby(enumerate(cases), key)):
        if rank >= ranks:
            continue
        place = exchange.Place(rank, ranks, num_experts, folder / f"group-{number}", 30.0)
        group = exchange.create("gloo", place)
        for index, case in part:
            results[index] = run_case(group, rank, case)
        group.close()
    if rank < 2:
        place = exchange.Place(rank, 2, 2, folder / "group-lost", 30.0)
        group = exchange.create("gloo", place)
        if rank == 0:
            results["lost"] = dispatch_error(group)
    torch.save(results, folder / f"rank-{rank}.pt")
    os._exit(0)  # rank 1 leaves its last group as a killed process does: without a word


def dispatch_error(group: exchange.Exchange) -> str:
    tokens = Quantized(torch.zeros(1, 8, dtype=torch.float8_e4m3fn), torch.ones(1, 1))
    try:
        group.dispatch(tokens, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = max(case["ranks"] for case in torch.load(folder / "cases.pt"))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
