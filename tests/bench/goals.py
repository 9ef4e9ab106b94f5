"""The goals of the kernel and of the layer, and whether a result file reaches them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peers import FP8_ROWS, INT4_ROWS, best

Results = Mapping[str, Mapping[str, Any]]
"""Results of one run by case name; `ours` and `peers` as bench_gemm.py writes them."""

TIMES_INT4 = {32: 1.15, 64: 1.15, 128: 1.15, 256: 1.15, 512: 1.35}
TIMES_FP8 = {32: 1.95, 64: 2.05, 128: 2.05, 256: 2.05, 512: 2.05}
TIMES_INT4_COLUMNS = {256: 1.25, 512: 1.25}
TIMES_BEST_PREFILL = {4096: 1.5, 16384: 1.15}
PERCENT_OF_FLOOR = {128: 94, 256: 94, 512: 94}
ZIPF_AGAINST_UNIFORM = {256: 1.15, 512: 1.15, 1024: 1.15}
GROUP_AGAINST_TOKEN = {32: 1.08, 64: 1.08, 128: 1.08, 256: 1.08, 512: 1.08, 4096: 1.2, 16384: 1.2}
TIMES_LAYER = {1: 1.3, 8: 1.75, 32: 1.85, 64: 1.85, 128: 1.8, 512: 1.6, 2048: 1.35}


class Verdict(NamedTuple):
    """One goal and what was found. at_least: whether more is better. found: None where it was not measured."""

    goal: str
    wanted: float
    at_least: bool
    found: float | None

    @property
    def reached(self) -> bool:
        """Whether the goal was measured and reached."""
        return self.found is not None and (self.found >= self.wanted if self.at_least else self.found <= self.wanted)

    def __str__(self) -> str:
        bound = f"{'at least' if self.at_least else 'at most'} {self.wanted:g}"
        if self.found is None:
            return f"{self.goal}: {bound} wanted, NOT MEASURED"
        if self.reached:
            return f"{self.goal}: {bound} wanted, {self.found:.3f}, REACHED"
        return f"{self.goal}: {bound} wanted, {self.found:.3f}, MISSED by {abs(self.found / self.wanted - 1):.1%}"


def gemm_verdicts(results: Results) -> list[Verdict]:
    """Hold a run of bench_gemm.py against every goal of the grouped GEMM."""
    verdicts = [
        *_times(results, "EP8 {} rows", "best int4 peer", INT4_ROWS, TIMES_INT4),
        *_times(results, "EP8 {} rows", "DeepGEMM fp8", FP8_ROWS, TIMES_FP8),
        *_times(results, "TP8 {} rows", "best int4 peer", INT4_ROWS, TIMES_INT4_COLUMNS),
        *_times(results, "EP8 {} rows", "best peer", (*INT4_ROWS, *FP8_ROWS), TIMES_BEST_PREFILL),
    ]
    for rows, wanted in PERCENT_OF_FLOOR.items():
        case = f"EP8 {rows} rows"
        verdicts.append(Verdict(f"{case}: percent of the floor", wanted, True, _ours(results, case, "percent")))
    for rows, wanted in ZIPF_AGAINST_UNIFORM.items():
        case = f"EP8 {rows} rows"
        ratio = _over(_ours(results, f"{case} Zipf", "us"), _ours(results, case, "us"))
        verdicts.append(Verdict(f"{case}: Zipf's time over uniform's", wanted, False, ratio))
    for rows, wanted in GROUP_AGAINST_TOKEN.items():
        case = f"EP8 {rows} rows"
        ratio = _over(_ours(results, case, "us", "token_group"), _ours(results, case, "us"))
        verdicts.append(Verdict(f"{case}: token_group's time over token's", wanted, False, ratio))
    return verdicts


def layer_verdicts(ours_us: Mapping[int, float], peer_us: Mapping[int, float]) -> list[Verdict]:
    """Hold microseconds of the layer by tokens per rank against the peer's."""
    return [
        Verdict(
            f"layer, {tokens} tokens a rank: times faster than DeepGEMM's fp8 MegaMoE",
            wanted,
            True,
            _over(peer_us.get(tokens), ours_us.get(tokens)),
        )
        for tokens, wanted in TIMES_LAYER.items()
    ]


def report(verdicts: Iterable[Verdict]) -> str:
    """One line a goal, the missed ones last, and how many were reached."""
    ordered = sorted(verdicts, key=lambda verdict: not verdict.reached)
    lines = [str(verdict) for verdict in ordered]
    reached = sum(verdict.reached for verdict in ordered)
    return "\n".join([*lines, f"{reached} of {len(ordered)} goals reached"])


def _times(results: Results, name: str, whom: str, rows: Sequence[str], goals: Mapping[int, float]) -> list[Verdict]:
    verdicts = []
    for count, wanted in goals.items():
        case = name.format(count)
        peer = best(results.get(case, {}).get("peers", {}), rows)
        goal = f"{case}: times faster than {whom}"
        verdicts.append(Verdict(goal, wanted, True, _over(peer, _ours(results, case, "us"))))
    return verdicts


def _ours(results: Results, case: str, figure: str, granularity: str = "token") -> float | None:
    timed = results.get(case, {}).get("ours", {}).get(granularity)
    return None if timed is None else float(timed["pair"][figure])


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator
