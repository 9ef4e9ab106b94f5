"""The exchanges for GPUs, on all GPUs at DeepSeek's shape; and the same program on CPU, where it can run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward.exchange.deepep_package import missing_deepep

PROGRAM = Path(__file__).with_name("device_group.py")
GUARD_SECONDS = 500.0  # against tests that never end, not a measurement

# Rounding each row, then a sum of rows, to bfloat16 (relative error at most 2^-9, about 2^-10 on average, each):
# measured 2.1e-3 with DeepEP, whose combine rounds twice.
DEEPEP_TOLERANCE = 3e-3

on_gpus = [
    pytest.param(("nccl", "cuda"), marks=pytest.mark.multigpu, id="nccl on GPUs"),
    pytest.param(("deepep", "cuda"), marks=pytest.mark.multigpu, id="deepep on GPUs"),
]
on_cpu = [
    pytest.param(("nccl", "cpu"), id="nccl over gloo"),
    pytest.param(("deepep", "cpu"), id="a stand-in for DeepEP"),
]
Found = list[list[dict[str, Any]]]


@pytest.fixture(scope="module", params=on_gpus + on_cpu)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Found]:
    """(exchange, kind of device, what each rank found in each case); the processes of an exchange start once."""
    name, kind = request.param
    if kind == "cuda" and name == "deepep" and (missing := missing_deepep()):
        pytest.skip(missing)
    ranks, shape = (torch.cuda.device_count(), "deepseek") if kind == "cuda" else (2, "small")
    folder = tmp_path_factory.mktemp(f"{name}-{kind}")
    with started(folder, name, ranks, kind, shape) as processes:
        wait_for(processes)
    logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(ranks)]
    failed = [log for process, log in zip(processes, logs, strict=True) if process.returncode != 0]
    assert not failed, "\n".join(failed)
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return name, kind, found


@contextlib.contextmanager
def started(folder: Path, name: str, ranks: int, kind: str, shape: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the program once a rank; what still runs at the end is killed."""
    environment = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = []
    try:
        for rank in range(ranks):
            command = [sys.executable, str(PROGRAM), str(folder), name, str(rank), str(ranks), kind, shape]
            with (folder / f"rank-{rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all to end, or, once one has failed, a little for what the others have to say."""
    end = time.monotonic() + GUARD_SECONDS
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            end = min(end, time.monotonic() + 5.0)
        time.sleep(0.05)


def cases(found: Found, **wanted: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    picked = [
        (rank, case)
        for rank, results in enumerate(found)
        for case in results
        if all(case.get(key) == value for key, value in wanted.items())
    ]
    assert picked, f"no case {wanted} was run"
    yield from picked


def test_each_rank_gets_the_rows_of_its_experts(run: tuple[str, str, Found]) -> None:
    for rank, case in cases(run[2], case="step", graph=False):
        assert case["rows_right"], (rank, case)
        assert case["first"] == 0, (rank, case)
        assert case["live"] <= case["capacity"], (rank, case)


def test_contributions_are_added_up(run: tuple[str, str, Found]) -> None:
    name = run[0]
    for rank, case in cases(run[2], case="step"):
        assert case["exact"] if name == "nccl" else case["error"] < DEEPEP_TOLERANCE, (rank, case)


def test_rows_of_no_expert_and_tokens_without_one_leave_no_trace(run: tuple[str, str, Found]) -> None:
    """The stand-in experts write NaN into every row of no expert."""
    for rank, case in cases(run[2], case="step"):
        assert case["finite"], (rank, case)
        assert case["nobody_zero"], (rank, case)


def test_a_captured_step_follows_new_tokens_and_routes(run: tuple[str, str, Found]) -> None:
    for rank, case in cases(run[2], case="step", graph=True):
        assert case["as_eager"], (rank, case)


def test_a_step_without_tokens_goes_through(run: tuple[str, str, Found]) -> None:
    for _, case in cases(run[2], case="no tokens"):
        assert case["live"] == 0
        assert case["combined"][0] == 0


def test_a_tokens_bits_do_not_depend_on_the_step(run: tuple[str, str, Found]) -> None:
    for rank, case in cases(run[2], case="same bits"):
        assert case["same"], (rank, case)


def test_a_token_travels_once_to_each_rank(run: tuple[str, str, Found]) -> None:
    """NCCL: one row of bytes to every rank, one sum of bfloat16 back. DeepEP: one copy to each rank that needs it."""
    name, kind, found = run
    hidden, top_k = (7168, 8) if kind == "cuda" else (256, 3)
    for _, case in cases(found, case="payload"):
        row_bytes = hidden + 4 * case["columns"] + top_k * (4 + 4)
        if name == "deepep":
            assert case["arrived"] == case["wanted_here"]
            others = case["arrived"] - case["own"]
            assert case["moved_bytes"] == [others * row_bytes, others * hidden * 2]
        else:
            others = (len(found) - 1) * case["tokens"]
            assert case["moved_bytes"] == [others * row_bytes, others * hidden * 2]
            assert case["sent_bytes"]["all_gather_into_tensor"] == case["tokens"] * row_bytes
            assert case["sent_bytes"]["all_to_all_single"] == len(found) * case["tokens"] * hidden * 2
