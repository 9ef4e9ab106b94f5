"""A process of the service dies or hangs under load: every request is answered, and the service comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from .forwards import Forward, as_safetensors, read_output
from .local import Local
from .running import Service

pytestmark = pytest.mark.service

CLIENTS = 8
PAUSE_SECONDS = 0.05
SILENCE_SECONDS = 5.0
STEP_TIMEOUT_SECONDS = 600.0  # so that a rank that is stopped is noticed by its silence alone


@pytest.fixture(scope="module")
def fragile(start: Callable[..., Any], tiny: Path) -> Iterator[Service]:
    """A service of its own, since these tests break it."""
    limits = {"silence_seconds": SILENCE_SECONDS, "step_timeout_seconds": STEP_TIMEOUT_SECONDS}
    with start(tiny, ranks=2, max_rank_restarts=4, **limits) as running:
        yield running


def kill_rank(service: Service) -> None:
    os.kill(service.rank_pids()[1], signal.SIGKILL)


def kill_engine(service: Service) -> None:
    os.kill(service.pid_of("ray::EngineProcess"), signal.SIGKILL)


def stop_engine(service: Service) -> None:
    os.kill(service.pid_of("ray::EngineProcess"), signal.SIGSTOP)


def stop_rank(service: Service) -> None:
    os.kill(service.rank_pids()[0], signal.SIGSTOP)


async def load(service: Service, forwards: list[Forward], expected: list[Tensor], stop: asyncio.Event) -> list[int]:
    """Send forwards one after another until `stop`; every reply is right, or 503 with Retry-After."""
    statuses = []
    async with httpx.AsyncClient(base_url=service.url, timeout=120.0) as client:
        while not stop.is_set():
            for forward, exact in zip(forwards, expected, strict=True):
                sent = as_safetensors(forward)
                reply = await client.post(sent.path, headers=sent.headers, content=sent.body)
                statuses.append(reply.status_code)
                if reply.status_code == 503:
                    assert int(reply.headers["retry-after"]) >= 1
                    assert reply.json()["code"] in ("rank_lost", "not_ready"), reply.text
                    await asyncio.sleep(PAUSE_SECONDS)
                else:
                    assert torch.equal(read_output(reply), exact)
    return statuses


@pytest.mark.parametrize("strike", [kill_rank, kill_engine, stop_rank, stop_engine], ids=lambda strike: strike.__name__)
async def test_under_load_every_request_is_answered_and_the_service_comes_back(
    fragile: Service, local: Local, strike: Callable[[Service], None]
) -> None:
    generator = torch.Generator().manual_seed(2)
    forwards = [Forward(1 + n % 3, torch.randn(1 + 9 * n, 256, generator=generator)) for n in range(6)]
    expected = local.outputs(forwards)
    before = fragile.get("/v1/placement").json()["generation"]
    stop = asyncio.Event()
    clients = [asyncio.create_task(load(fragile, forwards, expected, stop)) for _ in range(CLIENTS)]
    await asyncio.sleep(1.0)
    await asyncio.to_thread(strike, fragile)
    while (await asyncio.to_thread(fragile.get, "/v2/health/ready")).status_code == 200:
        assert not any(client.done() for client in clients)
        await asyncio.sleep(PAUSE_SECONDS)
    assert (await asyncio.to_thread(fragile.get, "/v2/health/live")).status_code == 200
    await asyncio.to_thread(fragile.wait_ready_again)
    await asyncio.sleep(1.0)
    stop.set()
    statuses = [status for client in await asyncio.gather(*clients) for status in client]

    print(f"{strike.__name__}: {statuses.count(200)} answered, {statuses.count(503)} refused, {len(statuses)} in all")
    assert set(statuses) == {200, 503}
    assert fragile.get("/v1/placement").json()["generation"] == before + 1
    assert f'moe_forward_rank_restarts_total{{rank="1"}} {before}.0' in fragile.metrics()
    assert [rank["state"] for rank in fragile.get("/v1/ranks").json()["ranks"]] == ["ready", "ready"]
    fragile.wait_for(lambda: sum(line.startswith("ray::RankProcess") for line in fragile.pids().values()) == 2)


async def test_a_service_that_gave_up_says_that_it_is_not_live_and_ends_with_sigterm(fragile: Service) -> None:
    while fragile.get("/v2/health/live").status_code == 200:
        if fragile.get("/v2/health/ready").status_code == 200:
            kill_rank(fragile)
        await asyncio.sleep(PAUSE_SECONDS)
    reply = fragile.get("/v2/health/live")
    assert reply.status_code == 503
    assert "gave up after 4 restarts" in reply.json()["error"]
    sent = as_safetensors(Forward(1, torch.ones(1, 256)))
    assert httpx.post(fragile.url + sent.path, headers=sent.headers, content=sent.body).status_code == 503
    assert fragile.terminate() == 0
    assert fragile.pids() == {}
