"""SIGTERM: what is in flight is answered, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from .forwards import Forward, as_safetensors, read_output
from .local import Local
from .running import Service

pytestmark = pytest.mark.service

POLL_SECONDS = 0.02


def in_flight(service: Service) -> float:
    for family in text_string_to_metric_families(service.metrics()):
        if family.name == "moe_forward_inflight_requests":
            return sum(sample.value for sample in family.samples)
    return 0.0


def terminate_every_process(service: Service) -> None:
    """Send SIGTERM to the service and everything it started, as systemd does it."""
    for pid in service.pids():
        os.kill(pid, signal.SIGTERM)


async def test_sigterm_to_every_process_answers_what_is_in_flight_and_leaves_nothing(
    start: Callable[..., Any], tiny: Path, local: Local
) -> None:
    shared_memory = set(Path("/dev/shm").iterdir())
    with start(tiny, ranks=1, default_timeout_seconds=300.0, drain_timeout_seconds=300.0) as service:
        pids = service.pids()
        assert {service.process.pid, *service.rank_pids()} <= pids.keys()
        (runtime_folder,) = service.runtime_folders
        assert runtime_folder.stat().st_mode & 0o777 == 0o700
        assert (runtime_folder / "ray_token").stat().st_mode & 0o777 == 0o600

        generator = torch.Generator().manual_seed(1)
        forwards = [Forward(layer, torch.randn(2048, 256, generator=generator)) for layer in (1, 2, 3)]
        async with httpx.AsyncClient(base_url=service.url, timeout=300.0) as client:
            tasks = []
            for sent in map(as_safetensors, forwards):
                request = client.post(sent.path, headers=sent.headers, content=sent.body)
                tasks.append(asyncio.create_task(request))
            while in_flight(service) < len(tasks) and not any(task.done() for task in tasks):
                await asyncio.sleep(POLL_SECONDS)
            terminate_every_process(service)
            assert not all(task.done() for task in tasks), "nothing was in flight any more when SIGTERM was sent"
            replies = await asyncio.gather(*tasks)
        outputs = [read_output(reply) for reply in replies]
        status = await asyncio.to_thread(service.process.wait, 120.0)

        assert status == 0, service.log
        assert service.pids() == {}
        assert service.runtime_folders == []
        assert list((service.folder / "ray").glob("session_*")) == []
        assert set(Path("/dev/shm").iterdir()) <= shared_memory
        assert "Traceback" not in service.log, service.log
    assert all(torch.equal(mine, served) for mine, served in zip(local.outputs(forwards), outputs, strict=True))


@pytest.mark.parametrize(("wait_for", "status"), [("serve: model", 0), ("Started server process", 0)])
def test_sigterm_before_it_is_ready_leaves_nothing(tiny: Path, wait_for: str, status: int) -> None:
    service = Service(tiny, 1)
    try:
        while wait_for not in service.log:
            assert service.process.poll() is None, service.log
        assert service.terminate() == status, service.log
        assert service.pids() == {}
        assert service.runtime_folders == []
        assert list((service.folder / "ray").glob("session_*")) == []
        assert service.greeting == ""
    finally:
        service.close()
