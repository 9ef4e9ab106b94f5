"""A rank that keeps dying, and `on_rank_loss: degrade`: the other one goes on with everything that it can hold."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .forwards import Forward, as_safetensors, post, read_output
from .local import Local
from .running import Service

pytestmark = pytest.mark.service


def lose_rank_1(service: Service) -> None:
    generation = service.get("/v1/placement").json()["generation"]
    os.kill(service.rank_pids()[1], signal.SIGKILL)
    service.wait_for(lambda: service.get("/v1/placement").json()["generation"] > generation)
    service.wait_ready_again()


def test_a_rank_that_is_lost_again_is_done_without_and_the_other_one_holds_all_experts(
    start: Callable[..., Any], tiny: Path, local: Local
) -> None:
    generator = torch.Generator().manual_seed(4)
    forwards = [Forward(1 + n % 3, torch.randn(1 + 40 * n, 256, generator=generator)) for n in range(3)]
    expected = local.outputs(forwards)
    with start(tiny, ranks=2, max_rank_restarts=1, on_rank_loss="degrade") as service:
        for ranks in (2, 1):
            lose_rank_1(service)
            placement = service.get("/v1/placement").json()
            assert [rank["rank"] for rank in placement["ranks"]] == list(range(ranks))
            assert placement["missing_experts"] == []
            held = [expert for rank in placement["ranks"] for expert in rank["experts"]["1"]]
            assert held == list(range(32))
            for forward, exact in zip(forwards, expected, strict=True):
                reply = post(service.url, as_safetensors(forward))
                assert torch.equal(read_output(reply), exact)
                assert "x-moe-degraded" not in reply.headers, "no reply lacks anything"
            metrics = service.metrics()
            assert f'moe_forward_degraded{{model="tiny"}} {2 - ranks}.0' in metrics
        assert 'moe_forward_rebalances_total{result="degraded"} 1.0' in metrics
        assert 'moe_forward_rank_up{rank="1"} 0.0' in metrics
        assert service.get("/v2/health/ready").status_code == 200
        assert service.terminate() == 0, service.log
        assert service.pids() == {}
