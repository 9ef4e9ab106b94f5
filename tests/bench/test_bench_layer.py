"""What the layer benchmark does apart from timing on GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_layer
import pytest
import torch
from cases import floor_seconds
from goals import layer_verdicts
from layer_case import DEEPSEEK, LayerShape, draw_tokens, find_needs, random_layer

from w4afp8 import dequantize_int4

SMALL = LayerShape(256, 128, 8, 2)


def test_needs_count_a_token_once_for_each_other_rank() -> None:
    # Two ranks of four experts. Rank 0: one token for rank 1 only, one for both, one for nobody else.
    ids = [torch.tensor([[4, 7], [0, 5], [1, 2]]), torch.tensor([[4, 5], [6, 7], [6, 5]])]
    needs = find_needs(ids, SMALL, scale_columns=2)
    assert needs.dispatch_bytes == 2 * (256 + 8)
    assert needs.bf16_dispatch_bytes == 2 * 512
    assert needs.combine_bytes == 2 * 512
    busiest = [2, 3, 2, 2]  # rows of experts 4 to 7
    floor = floor_seconds(busiest, (256, 256)) + floor_seconds(busiest, (256, 128))
    assert needs.floor_seconds == pytest.approx(floor)


def test_one_rank_sends_nothing() -> None:
    needs = find_needs([torch.tensor([[0, 3]])], SMALL, 1)
    assert needs[1:] == (0, 0, 0)


def test_tokens_go_to_distinct_experts_with_weights_that_add_up() -> None:
    device = torch.device("cpu")
    drawn, again, other = (draw_tokens(rank, 16, 1, DEEPSEEK, device) for rank in (0, 0, 1))
    assert drawn.x.shape == (16, 7168)
    assert all(len(set(row)) == 8 for row in drawn.ids.tolist())
    torch.testing.assert_close(drawn.weights.sum(1), torch.ones(16))
    assert torch.equal(drawn.ids, again.ids)
    assert not torch.equal(drawn.ids, other.ids)


def test_random_weights_have_no_lowest_code_and_keep_the_size_of_tokens() -> None:
    torch.manual_seed(0)
    layer = random_layer(1, 3, SMALL, torch.device("cpu"))
    assert len(layer.experts) == 3  # 2 to 4 of 8 experts on the second of three ranks
    weight = dequantize_int4(layer.experts[0].gate)
    assert weight.shape == (128, 256)
    codes = layer.experts[0].gate.codes
    assert int((codes >> 4).min()) == -7
    assert int(((codes << 4) >> 4).min()) == -7
    assert float((weight @ torch.randn(256, 64)).std()) == pytest.approx(1, abs=0.15)


def test_others_are_ended_when_one_process_fails(tmp_path: Path) -> None:
    started = time.monotonic()
    commands = [[sys.executable, "-c", code] for code in ("import time; time.sleep(60)", "raise SystemExit(3)")]
    assert bench_layer.run_together(commands, [tmp_path / "0", tmp_path / "1"], 60) == 1
    assert time.monotonic() - started < 30


def test_processes_that_take_too_long_are_ended(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", "import time; time.sleep(60)"]]
    assert bench_layer.run_together(commands, [tmp_path / "0"], 1) == 0


def row(tokens: int, us: float) -> dict[str, Any]:
    spread = {"p10_us": us, "p90_us": us, "floor_us": us / 2, "percent": 50.0}
    sent = {"dispatch_bytes": 514, "bf16_dispatch_bytes": 1000, "combine_bytes": 1000}
    return {"tokens": tokens, "us": us, "phases_us": {"gemm1": 3.0}, "sent_bytes": sent} | spread


def test_the_peers_rows_are_read_and_compared() -> None:
    written = {"dgemm": {"rc": 0, "rows": [{"tokens": 8, "us": 529.0}, {"tokens": 64, "error": "out of memory"}]}}
    peer = bench_layer.read_peer(written)
    assert [found["tokens"] for found in peer] == [8]
    text = bench_layer.table(peer, {"deepep": [row(64, 400.0), row(8, 264.5)]})
    assert "529.0 |  2.00 | gemm1 3.0" in text
    assert "0.51 of bf16" in text
    assert text.index("264.5") < text.index("400.0")
    reached = {
        verdict.wanted: verdict.reached for verdict in layer_verdicts({8: 264.5, 1: 100.0}, {8: 529.0, 1: 120.0})
    }
    assert reached[1.75]
    assert not reached[1.3]
    assert not reached[1.35]


def test_the_whole_benchmark_runs_on_two_cpu_ranks(tmp_path: Path) -> None:
    script = str(Path(bench_layer.__file__))
    out = tmp_path / "layer.json"
    options = [
        "--device",
        "cpu",
        "--ranks",
        "2",
        "--tokens",
        "3",
        "--replays",
        "1",
        "--out",
        str(out),
        "--commit",
        "abc",
    ]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    (measured,) = written["ours"]["nccl"]
    assert written["commit"] == "abc"
    assert measured["tokens"] == 3
    assert {"quantize", "dispatch", "gemm1", "activation", "gemm2", "combine"} == measured["phases_us"].keys()
    assert 0 < measured["sent_bytes"]["dispatch_bytes"] <= 3 * (256 + 4)
    assert "nccl: tokens a rank" in done.stdout
