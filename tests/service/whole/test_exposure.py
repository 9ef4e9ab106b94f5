"""What the service shows to the outside: its ports, its metrics, the commands it and the README print."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import w4afp8
from moe_forward.metrics import PREFIX, Metrics

from .forwards import Forward, as_json, as_oip_binary, as_safetensors, post
from .local import Local
from .processes import listening
from .running import Service

pytestmark = pytest.mark.service

README = Path(__file__).parents[3] / "README.md"
CONNECT = """
import ray
try:
    ray.init(address="{address}", logging_level="ERROR")
except Exception as error:
    print("refused:", type(error).__name__, str(error).splitlines()[0])
else:
    print("connected:", len(ray.nodes()), "node")
"""


def test_every_listening_socket_is_on_loopback(service: Service) -> None:
    found = {(pid, socket) for pid in service.pids() for socket in listening(pid)}
    ports = {port for _, (_, port) in found}
    assert {httpx.URL(service.url).port, httpx.URL(service.metrics_url).port} <= ports
    assert len({pid for pid, _ in found}) >= 4, "the sockets of Ray and the ranks are not among them"
    assert [entry for entry in found if not entry[1][0].is_loopback] == []


def test_ranks_get_their_turn_like_the_service_itself(service: Service) -> None:
    own = os.getpriority(os.PRIO_PROCESS, service.process.pid)
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in service.rank_pids()} == {own}


@pytest.mark.parametrize("with_token", [False, True], ids=["without the token", "with the token"])
def test_ray_takes_only_who_has_the_token(service: Service, with_token: bool) -> None:
    ((_, port),) = listening(service.pid_of_program("gcs_server"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_NUM_REDIS_GET_RETRIES": "2",  # of 20, a second apart
        "TMPDIR": str(service.folder),
    }
    if with_token:
        token = service.runtime_folders[0] / "ray_token"
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    script = CONNECT.format(address=f"127.0.0.1:{port}")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    said = done.stdout + done.stderr
    assert ("connected: 1 node" in said) == with_token, said
    assert ("InvalidAuthToken" in said) != with_token, said


def samples(service: Service) -> dict[str, float]:
    """Sum of the samples of every series: counters by their total, histograms by their count."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(service.metrics()):
        for sample in family.samples:
            kept = {"counter": "_total", "histogram": "_count"}.get(family.type, "")
            if sample.name.endswith(kept):
                found[family.name] = found.get(family.name, 0.0) + sample.value
    return found


def test_every_series_is_exported_and_the_counting_ones_move(
    service: Service, random_forward: Callable[..., Forward]
) -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    declared = {family.name: family.type for family in registry.collect()}
    assert len(declared) >= 20
    assert all(name.startswith(PREFIX) for name in declared)

    before = samples(service)
    quantized, _ = w4afp8.quantize_tokens(random_forward(1, 4, dtype=torch.float32).hidden, "token_group")
    for forward in (random_forward(2, 3), Forward(1, quantized.values, quantized.scales)):
        assert post(service.url, as_safetensors(forward)).status_code == 200
        assert post(service.url, as_oip_binary(forward)).status_code == 200
    assert post(service.url, as_json(random_forward(3, 2, dtype=torch.float32))).status_code == 200
    assert httpx.post(service.url + "/v1/drain").status_code == 401
    after = samples(service)

    assert declared.keys() - after.keys() == {PREFIX + "gpu_memory_bytes"}, "these ranks are on CPU"
    still = {
        name
        for name, kind in declared.items()
        if kind in ("counter", "histogram") and after[name] <= before.get(name, 0.0)
    }
    lost_a_rank = {PREFIX + name for name in ("rank_restarts", "rebalances", "dropped_assignments")}
    assert still == lost_a_rank
    assert after[PREFIX + "tokens"] - before.get(PREFIX + "tokens", 0.0) == 3 * 2 + 4 * 2 + 2
    assert after[PREFIX + "requantized_tokens"] - before.get(PREFIX + "requantized_tokens", 0.0) == 4 * 2
    assert after[PREFIX + "rank_up"] == 2
    assert after[PREFIX + "inflight_requests"] == 0
    assert after[PREFIX + "placement_generation"] == 1
    assert after[PREFIX + "build_info"] == 1


def test_metrics_are_not_on_the_front_ends_port(service: Service) -> None:
    assert service.get("/metrics").status_code == 404
    assert httpx.get(service.metrics_url).headers["content-type"].startswith("text/plain")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_command_that_serve_prints_works_when_pasted(service: Service, local: Local) -> None:
    (line,) = [line for line in service.greeting.splitlines() if line.strip().startswith("curl ")]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    hidden = torch.arange(1, 257, dtype=torch.float32).unsqueeze(0)
    assert torch.equal(torch.tensor(json.loads(done.stdout)["output"]), local.output(Forward(1, hidden)))


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_command_of_the_readme_works_when_pasted(service: Service) -> None:
    (line,) = [line for line in README.read_text().splitlines() if line.startswith("curl ")]
    (printed,) = [line for line in service.greeting.splitlines() if line.strip().startswith("curl ")]
    here = line.replace("http://127.0.0.1:8000", service.url)
    assert here == printed.strip(), "the README shows another command than serve prints"


def test_the_python_of_the_readme_runs(service: Service) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "from moe_forward import Client" in block]
    scope: dict[str, object] = {}
    exec(code.replace("http://127.0.0.1:8000", service.url), scope)
    output = scope["output"]
    assert isinstance(output, torch.Tensor)
    assert output.shape == (16, 256)
    assert output.dtype == torch.bfloat16
