"""A program: run the cases of a folder on CPU, with one forked process a rank (torch is imported only once).

FOLDER/cases.pt: list of mappings with exchange, ranks, num_experts, dtype (of the experts' rows), counts (rows of each
rank), values [T, H] uint8 (e4m3 bytes), scales [T, S], ids [T, K], weights [T, K]. Consecutive cases of the same
exchange, ranks and experts share a group.
FOLDER/rank-N.pt: what rank N got in each case it took part in, by index of the case; "lost" holds, for each exchange,
the error that rank 0 saw when rank 1 of 2 left without a word.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from oracle import expert_rows

from moe_forward import exchange
from moe_forward.types import expert_range
from w4afp8 import Quantized


def run_case(group: exchange.Exchange, rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Dispatch, let the stand-in experts work, combine."""
    start = sum(case["counts"][:rank])
    mine = slice(start, start + case["counts"][rank])
    tokens = Quantized(case["values"][mine].view(torch.float8_e4m3fn), case["scales"][mine])
    received = group.dispatch(tokens, case["ids"][mine], case["weights"][mine])
    live = int(received.offsets[-1])
    rows = expert_rows(received, expert_range(rank, case["ranks"], case["num_experts"]).start, case["dtype"])
    combined = group.combine(rows, received.handle)
    moved = torch.full((2,), -1)
    group.count_bytes(rows, received.handle, moved)
    return {
        "values": received.rows.values.view(torch.uint8)[:live].clone(),
        "scales": received.rows.scales[:live].clone(),
        "offsets": received.offsets.clone(),
        "weights": received.weights[:live].clone(),
        "capacity": len(received.weights),
        "expected_rows": received.expected_rows,
        "combined": combined,
        "moved_bytes": moved.tolist(),
    }


def place(rank: int, ranks: int, num_experts: int, rendezvous: Path, case: dict[str, Any]) -> exchange.Place:
    hidden, top_k, columns = case["values"].shape[1], case["ids"].shape[1], case["scales"].shape[1]
    cpu = torch.device("cpu")
    return exchange.Place(rank, ranks, num_experts, rendezvous, 30.0, cpu, hidden, top_k, 64, columns)


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    cases = torch.load(folder / "cases.pt")
    results: dict[Any, Any] = {"lost": {}}
    key = lambda item: (item[1]["exchange"], item[1]["ranks"], item[1]["num_experts"])  # noqa: E731
    for number, ((name, ranks, num_experts), part) in enumerate(itertools.groupby(enumerate(cases), key)):
        if rank >= ranks:
            continue
        group = exchange.create(name, place(rank, ranks, num_experts, folder / f"group-{number}", cases[0]))
        for index, case in part:
            results[index] = run_case(group, rank, case)
        group.close()
    torch.save(results, folder / f"rank-{rank}.pt")
    for number, name in enumerate(sorted({case["exchange"] for case in cases})):
        if rank == 0:
            group = exchange.create(name, place(0, 2, 2, folder / f"lost-{name}", cases[0]))
            (folder / f"joined-{name}").touch()
            results["lost"][name] = dispatch_error(group)
            group.close()
        elif rank == 1 + number:  # plays rank 1, and leaves as a killed process does: without a word
            exchange.create(name, place(1, 2, 2, folder / f"lost-{name}", cases[0]))
            while not (folder / f"joined-{name}").exists():
                time.sleep(0.01)
            os._exit(0)
    torch.save(results, folder / f"rank-{rank}.pt")


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
