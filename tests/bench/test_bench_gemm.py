"""What the GEMM benchmark does apart from timing: its cases, its order, its peers' processes, its verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_gemm
import pytest
from cases import Case, draw_counts, floor_seconds, goal_cases, sweep_cases, weight_copies
from goals import Verdict, gemm_verdicts, report
from peers import Peers, best, harness_case
from sweep import SweepPlan, covering_order, neighbours
from tables import show_steps, table, times_faster

HARNESS = """
import json, os, sys

CHECKED = ()

class Rec:
    def __init__(s, out): s.out = out; s.d = dict(rows={}, check={}, info={}, err={})
    def put(s, row, case, g, **kw): s.d["rows"].setdefault(row, {}).setdefault(case, {})[g] = kw; s.save()
    def save(s): open(s.out, "w")
    def err(s, where, e): s.d["err"][where] = str(e)

class Cache:
    def __init__(s, make, W): s.W = W

def peer_humming(rec, cases, warm):
    print("peers print what they like")
    if warm:
        open(os.environ["WARMED"], "a").write("".join(c["name"] + "\\n" for c in cases))
        return
    for c in cases:
        for g in ("gu", "dn"):
            rec.put("humming_grp", c["name"], g, ms=0.001 * sum(c["rows"]), mode="graph", note=str(Cache(None, 3).W))
            rec.put("humming_idx", c["name"], g, ms=0.0001, mode="graph", note="")
            rec.d["check"][f"humming_idx {c['name']} {g}"] = "0.2000"

def peer_sgl_w4a8(rec, cases, warm):
    if cases[0]["E"] == 4: os._exit(3)
    rec.err("sgl", "out of luck")

def peer_dg_fp8(rec, cases, warm):
    assert len(cases) == 1
    if warm:
        open(os.environ["WARMED"], "a").write(warm + "\\n")
    else:
        subprocess.Popen([]).wait(timeout=1)
        rec.put("dg_fp8_masked", cases[0]["name"], "gu", ms=1.0, mode="event")
        rec.put("dg_fp8_masked", cases[0]["name"], "dn", ms=0.5, mode="event")
"""
RUN = 'export WARMED="$WARMED_FILE"; exec python3 "$(dirname "$0")/bench_peers.py" "$@"\n'


def case(experts: int = 8, rows: int = 16) -> Case:
    return Case(f"E{experts} {rows} rows", experts, 256, 128, rows, "even")


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "harness"
    folder.mkdir()
    (folder / "bench_peers.py").write_text(HARNESS)
    (folder / "run.sh").write_text(RUN)
    monkeypatch.setenv("WARMED_FILE", str(tmp_path / "warmed"))
    return folder


@pytest.fixture
def peers(harness: Path, tmp_path: Path) -> Iterator[Peers]:
    running = Peers(harness, ("humming", "sgl_w4a8", "dg_fp8"), tmp_path / "log")
    yield running
    running.close()


class FakeBench:
    """Times that say which case they are of."""

    def time(self, case: Case, counts: list[int], granularity: str, pair_only: bool = False) -> dict[str, Any]:
        us = (110.0 if pair_only else 100.0) * (2 if granularity == "token_group" else 1)
        pair = {"us": us, "floor_us": 94.5, "percent": 100 * 94.5 / us}
        return {"pair": pair} | ({} if pair_only else {"gate_up": pair})


@pytest.mark.parametrize("case", goal_cases(), ids=lambda case: case.name)
def test_a_goal_case_draws_its_rows_and_hits(case: Case) -> None:
    counts = draw_counts(case)
    assert (len(counts), sum(counts)) == (case.experts, case.rows)
    assert case.hits in (None, sum(count > 0 for count in counts))


def test_even_rows_differ_by_one_at_most() -> None:
    assert draw_counts(Case("", 8, 256, 128, 19, "even")) == [3, 3, 3, 2, 2, 2, 2, 2]


def test_the_floor_is_traffic_for_few_rows_and_arithmetic_for_many() -> None:
    few = floor_seconds([1, 0], (4096, 7168))
    assert few == pytest.approx((4096 * 7168 * (0.5 + 1 / 64) + 7168 + 4 + 8192) / 4389e9)
    assert floor_seconds([8192], (4096, 7168)) == pytest.approx(2 * 8192 * 4096 * 7168 / 1515e12)


def test_weights_in_turn_exceed_the_cache() -> None:
    for each in sweep_cases()[::37]:
        counts = draw_counts(each)
        hits = sum(count > 0 for count in counts)
        held = weight_copies(each, counts) * hits * each.down[0] * each.down[1] / 2
        assert held > 100e6 or weight_copies(each, counts) in (3, 64) or hits == 1


def test_the_sweep_has_every_axis_value_and_whole_groups_only() -> None:
    cases = sweep_cases()
    assert {each.experts for each in cases} == {8, 16, 64, 128, 160}
    assert {each.intermediate for each in cases} == {768, 1536, 2560, 3072, 384, 640}
    assert {each.rows for each in cases} == {1, 16, 64, 256, 1024, 4096, 16384}
    assert all(each.intermediate % 128 == 0 for each in cases)


def test_the_first_cases_of_the_order_meet_every_value_of_every_axis() -> None:
    first = list(itertools.islice(covering_order(sweep_cases()), 16))
    assert len({each.name for each in first}) == 16
    assert {each.rows for each in first} == {1, 16, 64, 256, 1024, 4096, 16384}
    assert {each.experts for each in first} == {8, 16, 64, 128, 160}
    assert {each.skew for each in first} == {"even", "uniform", "zipf"}


def test_the_plan_turns_to_the_neighbours_of_a_close_case_and_repeats_nothing() -> None:
    plan = SweepPlan(sweep_cases())
    first = plan.next_batch()
    plan.note(first[0], 1.3)
    plan.note(first[1], 0.9)
    second = plan.next_batch()
    near = {each.name for each in neighbours(first[1], sweep_cases())}
    assert near
    assert near - {each.name for each in first} <= {each.name for each in second}
    assert not {each.name for each in first} & {each.name for each in second}
    assert len(first) == len(second) == 12


def test_peers_answer_case_by_case_and_one_that_ends_is_lost_alone(peers: Peers, tmp_path: Path) -> None:
    asked = harness_case(case(), [2] * 8, copies=7)
    peers.warm([asked], 60)
    warmed = (tmp_path / "warmed").read_text().splitlines()
    assert sorted(warmed) == sorted([asked["name"], f"{asked['name']}:gu", f"{asked['name']}:dn"])
    found = peers.measure(asked)
    assert found["humming_grp"]["pair"] == pytest.approx(2 * 16)
    assert found["humming_grp"]["note"] == "graph 7"  # copies of the weights
    assert "humming_idx" not in found  # its relative error says that it computed something else
    assert found["dg_fp8_masked"] == {"gate_up": 1000.0, "down": 500.0, "pair": 1500.0, "note": "event "}
    assert not peers.lost
    assert best(peers.measure(harness_case(case(experts=4), [4] * 4, 3)), ("sgl",)) is None
    assert list(peers.lost) == ["sgl_w4a8"]
    assert peers.measure(asked).keys() == found.keys()


def test_a_harness_that_cannot_be_prepared_is_said(harness: Path, tmp_path: Path) -> None:
    (harness / "run.sh").write_text("echo no room; exit 4\n")
    with pytest.raises(RuntimeError, match=r"run\.sh: exit status 4\nno room"):
        Peers(harness, (), tmp_path / "log")


def test_ours_is_timed_before_and_after_the_peers(peers: Peers) -> None:
    result = bench_gemm.run_case(FakeBench(), case(), ["token", "token_group"], peers)  # type: ignore[arg-type]
    assert result["ours"]["token"]["pair"]["us"] == pytest.approx(105)
    assert result["ours"]["token"]["pair"]["drift"] == pytest.approx(0.1)
    assert result["ours"]["token"]["gate_up"]["us"] == 100
    assert times_faster(result) == pytest.approx(32 / 105)
    assert "  105.0 |   90% | +10.0% |    210.0 |    32.0 | 1500.0 |   0.30 | 14.29" in table([result])
    assert "humming_grp" in show_steps(result)


def test_results_without_peers_still_make_a_table() -> None:
    result = bench_gemm.run_case(FakeBench(), case(), ["token_group"], None)  # type: ignore[arg-type]
    assert table([result]).count("|") == 18


def verdict_of(verdicts: list[Verdict], goal: str) -> Verdict:
    (found,) = [verdict for verdict in verdicts if verdict.goal == goal]
    return found


def test_goals_are_reached_missed_or_not_measured() -> None:
    def result(us: float, int4: float, fp8: float) -> dict[str, Any]:
        ours = {
            "token": {"pair": {"us": us, "percent": 93.0}},
            "token_group": {"pair": {"us": us * 1.05, "percent": 1.0}},
        }
        return {
            "ours": ours,
            "peers": {"humming_grp": {"pair": int4}, "sgl_w4a8": {"pair": 9e9}, "dg_x": {"pair": fp8}},
        }

    verdicts = gemm_verdicts(
        {
            "EP8 128 rows": result(100, 115, 204),
            "EP8 4096 rows": result(100, 160, 140),
            "EP8 256 rows": result(100, 120, 210),
            "EP8 256 rows Zipf": result(116, 120, 210),
        }
    )
    assert verdict_of(verdicts, "EP8 128 rows: times faster than best int4 peer").reached
    missed = verdict_of(verdicts, "EP8 128 rows: times faster than DeepGEMM fp8")
    assert str(missed).endswith("at least 2.05 wanted, 2.040, MISSED by 0.5%")
    prefill = verdict_of(verdicts, "EP8 4096 rows: times faster than best peer")
    assert prefill.found == pytest.approx(1.4)
    zipf = verdict_of(verdicts, "EP8 256 rows: Zipf's time over uniform's")
    assert str(zipf).endswith("at most 1.15 wanted, 1.160, MISSED by 0.9%")
    assert verdict_of(verdicts, "EP8 256 rows: token_group's time over token's").reached
    assert not verdict_of(verdicts, "EP8 128 rows: percent of the floor").reached
    assert "NOT MEASURED" in str(verdict_of(verdicts, "TP8 256 rows: times faster than best int4 peer"))
    assert report(verdicts).splitlines()[-1] == f"6 of {len(verdicts)} goals reached"
