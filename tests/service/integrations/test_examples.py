"""The examples run as their users run them, and what the attention worker says of its overlap is right."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from .conftest import Served

pytestmark = [pytest.mark.service, pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).parents[3] / "deploy" / "examples"


def run(name: str, *arguments: str) -> str:
    """Run an example and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("afd_attention_worker", EXAMPLES / "afd_attention_worker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class SlowExperts:
    """A service that answers each forward with its input after a while, and knows how many it had at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = self.most = 0
        self.layers: list[int] = []

    async def forward(self, hidden_states: torch.Tensor, *, layer: int) -> torch.Tensor:
        self.now += 1
        self.most = max(self.most, self.now)
        self.layers.append(layer)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        return hidden_states


def test_the_attention_worker_runs_against_a_service(services: dict[str, Served]) -> None:
    url = services["DeepseekV3"].service.url
    printed = run("afd_attention_worker.py", "--url", url, "--tokens", "8", "--micro-batches", "4")
    assert printed.count("of wall time: overlap") == 2
    assert re.findall(r"^ +(\d+) +4 ", printed, re.MULTILINE) == ["1", "2", "1", "2"]
    assert "the outputs are the same to the bit" in printed


@pytest.mark.parametrize("in_flight", [1, 2])
def test_as_many_micro_batches_as_asked_for_are_in_flight(worker_module: Any, in_flight: int) -> None:
    service = SlowExperts(0.02)
    worker = worker_module.Worker(service, {layer: worker_module.Attention(64) for layer in (3, 4, 5)})
    _, timings = asyncio.run(worker.run([torch.randn(1, 4, 64) for _ in range(4)], in_flight))
    assert service.most == in_flight
    assert {layer: len(waits) for layer, waits in timings.waits_seconds.items()} == {3: 4, 4: 4, 5: 4}
    assert service.layers[: 2 * in_flight : in_flight] == [3, 4]
    assert timings.waited_seconds >= 12 * service.seconds
    assert timings.overlap <= in_flight
    assert timings.overlap > 0.5 * in_flight


def test_micro_batches_come_back_in_their_order_with_their_own_values(worker_module: Any) -> None:
    worker = worker_module.Worker(SlowExperts(0.001), {0: worker_module.Attention(64)})
    inputs = [torch.full((1, 1, 64), float(number)) for number in range(4)]
    alone = [asyncio.run(worker.run([each], 1))[0][0] for each in inputs]
    together, _ = asyncio.run(worker.run(inputs, 3))
    assert all(torch.equal(first, second) for first, second in zip(alone, together, strict=True))
    assert not torch.equal(together[1], together[2])


def test_the_generating_example_runs_against_a_service(services: dict[str, Served]) -> None:
    printed = run("generate_with_transformers.py", "--url", services["DeepseekV3"].service.url, "--new-tokens", "4")
    assert "layers [1, 2] are computed at http://127.0.0.1:" in printed
    assert "b'The experts of this model are" in printed
    assert "4 tokens in" in printed
