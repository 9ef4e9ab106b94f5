"""The step benchmark on a CPU: every figure is measured, and the goal is judged by the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import step_rank
import torch
from bench_steps import GOAL_TOKENS, table
from layer_case import LayerShape

from moe_forward.slab import Slab
from moe_forward.slab_rows import attach


@pytest.mark.parametrize(("requests", "gate"), [(1, False), (2, False), (9, True)])
def test_steps_are_timed_with_one_and_with_two_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: int, gate: bool
) -> None:
    monkeypatch.setattr(step_rank, "WARM_STEPS", 1)
    files = {"rendezvous": str(tmp_path / "group"), "out": str(tmp_path / "steps.json")}
    task = step_rank.Task(0, 1, "cpu", "local", "reference", LayerShape(256, 128, 4, 2), [3], 2, **files)._replace(
        requests=requests, gate=gate
    )
    rank, layer = step_rank.start(task)
    slab = Slab(step_rank.slab_bytes(task))
    memory = attach(slab.fd, slab.nbytes, torch.device("cpu"))
    bodies = step_rank.lay_out(task, 3, slab, memory)
    for in_flight in (1, 2):
        row = step_rank.measure(task, rank, layer, bodies, in_flight)
        assert (row["tokens"], row["in_flight"]) == (3, in_flight)
        assert (row["requests"], row["gate"]) == (min(requests, 3), gate)
        assert min(row["us"], row["latency_us"], row["latency_p90_us"], row["launch_us"], row["layer_us"]) > 0
    for request in [request for step in bodies.steps for request in step]:
        at = request.output.offset
        rows = memory[at : at + request.tokens * 2 * 256].clone().view(torch.bfloat16)
        assert rows.isfinite().all()
        assert rows.any()
    rank.close()
    slab.close()


def test_the_goal_is_about_the_latency_of_one_step_at_a_time() -> None:
    figures = {
        "requests": 1,
        "launch_us": 90.0,
        "us": 900.0,
        "latency_us": 1500.0,
        "latency_p90_us": 1600.0,
        "layer_us": 400.0,
    }
    rows = [
        figures | {"tokens": GOAL_TOKENS, "in_flight": 1, "added_us": 1100.0},
        figures | {"tokens": GOAL_TOKENS, "in_flight": 2, "added_us": 500.0},
    ]
    assert "beyond the layer: missed" in table(rows)
    rows[0]["added_us"] = 1000.0
    assert "beyond the layer: reached" in table(rows)
