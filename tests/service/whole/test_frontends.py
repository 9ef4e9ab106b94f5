"""A service with two front ends, as it is started, used, hurt and stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
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

FRONT = "moe_forward.front_process"


def front_pids(service: Service) -> set[int]:
    return {pid for pid, line in service.pids().items() if FRONT in line}


def total(service: Service, name: str) -> float:
    families = text_string_to_metric_families(service.metrics())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_two_front_ends_give_the_same_bits_one_may_die_and_nothing_is_left(
    start: Callable[..., Any], tiny: Path, local: Local, random_forward: Callable[..., Forward]
) -> None:
    forwards = [random_forward(seed, 20, layer=1 + seed % 3) for seed in range(4)]
    expected = local.outputs(forwards)

    def ask(client: httpx.Client) -> None:
        for forward, output in zip(forwards, expected, strict=True):
            sent = as_safetensors(forward)
            reply = client.post(sent.path, headers=sent.headers, content=sent.body)
            assert torch.equal(read_output(reply), output)

    with start(tiny, ranks=1, frontends=2) as service:
        before = front_pids(service)
        assert len(before) == 2
        clients = [httpx.Client(base_url=service.url, timeout=60.0) for _ in range(4)]  # each keeps its connection
        for client in clients[:2]:
            ask(client)
        killed = min(before)
        service.wait_for(lambda: total(service, "moe_forward_tokens_total") == 160)
        os.kill(killed, signal.SIGKILL)
        service.wait_for(lambda: killed not in front_pids(service))
        ask(clients[2])
        service.wait_for(lambda: service.log.count(" serves (process ") == 3)
        assert before & front_pids(service) == before - {killed}
        ask(clients[3])
        service.wait_for(lambda: total(service, "moe_forward_tokens_total") == 320)
        assert total(service, "moe_forward_requests_total") == 16
        assert total(service, "moe_forward_rank_tokens_total") == 320 * 4
        assert total(service, "moe_forward_batch_tokens_sum") == 320
        assert total(service, "moe_forward_rank_up") == 1
        assert total(service, "moe_forward_degraded") == 0
        if shutil.which("promtool"):
            done = subprocess.run(
                ["promtool", "check", "metrics"], input=service.metrics(), capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout + done.stderr) == (0, "")
        for client in clients:
            client.close()
        for pid in service.pids():
            os.kill(pid, signal.SIGTERM)
        assert service.process.wait(120.0) == 0, service.log
        assert service.pids() == {}
        assert "Traceback" not in service.log, service.log
