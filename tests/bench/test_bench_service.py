"""What the service benchmark does apart from being on a quiet machine."""

from __future__ import annotations

import itertools
import json

import pytest
from bench_service import CASES, Case, measure, ratio, servers, table, verdicts
from flame import boxes, picture
from profiling import STAGES, stage_table
from raw_client import safetensors_body


def result(number: int, path: str, case: Case, p50_us: float, rate: float) -> dict[str, object]:
    figures = {"p50_us": p50_us, "p99_us": 2 * p50_us, "requests_per_second": rate, "cpu_us": {path: 1.0}}
    return {"round": number, "path": path, **case._asdict(), **figures}


def test_ratios_are_of_one_round_and_their_median_counts() -> None:
    case = CASES[0]
    rounds = [(100, 150), (1000, 1600), (10, 90)]
    results = [
        result(number, path, case, p50, 1.0)
        for number, pair in enumerate(rounds)
        for path, p50 in zip(("echo", "service"), pair, strict=True)
    ]
    assert ratio(results, case, "p50_us", "service", "echo") == 1.6
    assert ratio(results, case, "p50_us", "Ray Serve", "service") is None


def test_a_goal_is_reached_missed_or_not_measured() -> None:
    results = [
        result(0, path, case, p50, rate)
        for case in CASES
        for path, p50, rate in (("echo", 100, 1000), ("service", 180, 500), ("Ray Serve", 900, 100))
    ]
    reached = {verdict.goal: verdict.reached for verdict in verdicts(results)}
    assert len(reached) == 10
    assert reached["57 kB, 1 connection(s): p50 over the echo's"]
    assert not reached["57 kB, 8 connection(s): share of the echo's requests per second"]
    assert reached["917 kB, 1 connection(s): Ray Serve's p50 over ours"]
    assert not any(verdict.reached for verdict in verdicts([]))
    assert "| 57 kB, 1 connection(s) | service | 180 | 360 | 500 | service 1 |" in table(results)


def test_a_body_is_a_safetensors_file_of_finite_bfloat16() -> None:
    body = safetensors_body(3, 32, seed=1)
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    assert header["hidden_states"]["shape"] == [3, 32]
    assert len(body) == 8 + size + header["hidden_states"]["data_offsets"][1] == 8 + size + 192
    assert set(body[8 + size + 1 :: 2]) == {0x3F}  # exponents of numbers between 0.5 and 1


def test_stages_follow_each_other_without_a_hole() -> None:
    assert all(before[2] == after[1] for before, after in itertools.pairwise(STAGES))
    moments = dict.fromkeys((stage[1] for stage in STAGES), 0.0) | {"ended": 2e-6}
    assert "| metrics | 2.0 | 2.0 |" in stage_table([moments] * 10)


def test_equal_beginnings_of_stacks_are_one_box() -> None:
    found = boxes(["main (a.py:1);work (b.py:2) 3", "main (a.py:7);rest (c.py:1) 1"])
    assert [(box.name, box.start, box.share) for box in found] == [
        ("main (a.py", 0.0, 1.0),
        ("work (b.py", 0.0, 0.75),
        ("rest (c.py", 0.75, 0.25),
    ]
    assert picture(found).count("<g>") == 3


@pytest.mark.parametrize("ranks", [2])
def test_every_reply_of_the_service_over_echo_ranks_has_its_requests_bytes(ranks: int) -> None:
    with servers(ranks, echo=False) as found:  # the client compares
        figures = measure(found["service"], Case(4, 2), 0.2)
    assert figures["requests_per_second"] > 0
    assert set(figures["cpu_us"]) == {"front end", "engine", "rank 0", "rank 1"}
