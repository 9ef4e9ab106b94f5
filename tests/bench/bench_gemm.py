"""Times the grouped GEMM on one GPU, beside its peers if asked; prints tables and goals and writes JSON.

Every GEMM, and the pair of a layer, runs in a CUDA graph over several copies of the weights in turn, so that none is in
L2; figures are medians. Ours and the peers take turns case by case, ours before and after them (`drift`).

    python tests/bench/bench_gemm.py --peers FOLDER                the cases with goals
    python tests/bench/bench_gemm.py --peers FOLDER --sweep 300    300 s of shapes that nobody listed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cases import Case, draw_counts, goal_cases, sweep_cases, weight_copies
from goals import gemm_verdicts, report
from ours import WEIGHTS, Bench, figures
from peers import PEERS, Peers, harness_case
from sweep import SweepPlan
from tables import show_floors, show_steps, table, times_faster
from timing import about_this_run

from w4afp8 import Granularity

WARM_SECONDS = 120
"""For compiling the peers' kernels of a batch of cases."""

Save = Callable[[list[dict[str, Any]]], None]


def run_case(bench: Bench, case: Case, granularities: Sequence[Granularity], peers: Peers | None) -> dict[str, Any]:
    """Time a case: ours, the peers, and ours again."""
    counts = draw_counts(case)
    ours = {granularity: bench.time(case, counts, granularity) for granularity in granularities}
    found: dict[str, dict[str, Any]] = {}
    if peers is not None:
        found = peers.measure(harness_case(case, counts, weight_copies(case, counts)))
        for granularity, timed in ours.items():
            again = bench.time(case, counts, granularity, pair_only=True)["pair"]["us"]
            floor = timed["pair"]["floor_us"] / 1e6
            drift = again / timed["pair"]["us"] - 1
            timed["pair"] = figures(statistics.mean((again, timed["pair"]["us"])) / 1e6, floor) | {"drift": drift}
    return {
        "case": case.name,
        "experts": case.experts,
        "hidden": case.hidden,
        "intermediate": case.intermediate,
        "rows": case.rows,
        "skew": case.skew,
        "hits": sum(count > 0 for count in counts),
        "most_rows": max(counts),
        "ours": ours,
        "peers": found,
    }


def run_goals(
    bench: Bench, cases: Sequence[Case], granularities: Sequence[Granularity], peers: Peers | None, save: Save
) -> None:
    """Time the cases with goals, the peers not with Zipf loads; print the table and what was reached."""
    if peers is not None:
        peers.warm([harness_case(case, draw_counts(case), 1) for case in cases if case.skew != "zipf"], WARM_SECONDS)
    results: list[dict[str, Any]] = []
    for case in cases:
        results.append(run_case(bench, case, granularities, peers if case.skew != "zipf" else None))
        print(show_steps(results[-1]), flush=True)
        save(results)
    verdicts = gemm_verdicts({result["case"]: result for result in results})
    print(f"\n{table(results)}\n\n{report(verdicts)}")


def run_sweep(bench: Bench, seconds: float, peers: Peers, save: Save) -> None:
    """Look for cases that a peer wins until the time is over: spread over all axes, then near the closest ones."""
    deadline = time.monotonic() + seconds
    plan, results = SweepPlan(sweep_cases()), list[dict[str, Any]]()
    while time.monotonic() < deadline and (batch := plan.next_batch()):
        bench.free()
        peers.warm([harness_case(case, draw_counts(case), 1) for case in batch], WARM_SECONDS)
        for case in batch:
            if time.monotonic() >= deadline:
                break
            results.append(run_case(bench, case, ["token"], peers))
            plan.note(case, times_faster(results[-1]))
            print(table(results[-1:], head=False), flush=True)
            save(results)
    results.sort(key=lambda result: times_faster(result) or float("inf"))
    lost = sum((times_faster(result) or 1) < 1 for result in results)
    print(f"\n{len(results)} cases, a peer wins {lost}; the closest first\n{table(results)}")


def main() -> None:
    """Run what the command line says and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gemm.json")
    parser.add_argument("--granularity", choices=("token", "token_group"), nargs="+", default=["token"])
    parser.add_argument("--weights", choices=WEIGHTS, default="int4", help="the goals and peers are for int4")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--peers", type=Path, help="folder of the peers' harness (run.sh, bench_peers.py)")
    parser.add_argument("--peer-names", nargs="+", default=list(PEERS), help="functions peer_* of the harness")
    parser.add_argument("--sweep", type=float, metavar="SECONDS", help="look for cases that a peer wins")
    parser.add_argument("--commit", help="what is measured; default: what git says")
    parser.add_argument("--floors", action="store_true", help="print rows, experts hit and floors; needs no GPU")
    options = parser.parse_args()
    if options.sweep and not options.peers:
        parser.error("--sweep: looks for cases that a peer wins, so name the peers' harness with --peers")
    if options.weights != "int4" and options.peers:
        parser.error(f"--weights {options.weights}: the peers' weights are int4, so name no peers")
    cases = [case for case in goal_cases() if options.only in case.name]
    if options.floors:
        print(show_floors(cases))
        return
    head = {**about_this_run(options.commit), "weights": options.weights}
    print(json.dumps(head))

    def save(results: list[dict[str, Any]]) -> None:
        options.out.write_text(json.dumps({**head, "results": results}, indent=1))

    with contextlib.ExitStack() as stack:
        peers = None
        if options.peers:
            log = options.out.with_suffix(".peers.log")
            peers = stack.enter_context(contextlib.closing(Peers(options.peers, options.peer_names, log)))
        if options.sweep and peers is not None:
            run_sweep(Bench(), options.sweep, peers, save)
        else:
            run_goals(Bench(options.weights), cases, options.granularity, peers, save)


if __name__ == "__main__":
    main()
