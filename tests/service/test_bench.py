"""The load generator against a scripted service: what it sends, counts and reports."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from moe_forward.bench import BenchReport, BenchRow, Load, bench
from moe_forward.client import TransportFailed

PLACEMENT = {"model": "tiny", "hidden_size": 8, "layers": [3, 4]}


class Service:
    """Answers forwards with zeros after a short wait, or with `refusals` in turn; keeps what it saw."""

    def __init__(self, *refusals: httpx.Response, placement: Any = PLACEMENT, always: bool = False) -> None:
        self.refusals = list(refusals)
        self.placement = placement
        self.always = always
        self.layers: Counter[str] = Counter()
        self.bodies: dict[bytes, dict[str, torch.Tensor]] = {}
        self.inflight = self.most_inflight = self.forwards = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/placement":
            return httpx.Response(200, json=self.placement)
        self.forwards += 1
        self.inflight += 1
        self.most_inflight = max(self.most_inflight, self.inflight)
        await asyncio.sleep(0.002)
        self.inflight -= 1
        self.layers[request.url.params["layer"]] += 1
        self.bodies[request.content] = tensors = safetensors.torch.load(request.content)
        if self.refusals:
            refusal = self.refusals[0] if self.always else self.refusals.pop(0)
            return httpx.Response(refusal.status_code, headers=refusal.headers, content=refusal.content)
        hidden = tensors["hidden_states"]
        dtype = torch.bfloat16 if hidden.dtype is torch.float8_e4m3fn else hidden.dtype
        body = safetensors.torch.save({"output": torch.zeros(hidden.shape, dtype=dtype)})
        return httpx.Response(200, headers={"content-type": "application/vnd.safetensors"}, content=body)


def load(service: Service, **options: Any) -> BenchReport:
    settings: dict[str, Any] = {"tokens": [2], "concurrency": 3, "seconds": 0.15, "warmup_seconds": 0.0}
    return bench("http://moe.test", transport=httpx.MockTransport(service), **(settings | options))


def test_all_answered_forwards_are_counted_and_rated() -> None:
    service = Service()
    report = load(service, tokens=[1, 5])
    assert (report.model, report.hidden_size, report.layers) == ("tiny", 8, (3, 4))
    assert [row.tokens for row in report.rows] == [1, 5]
    assert sum(row.requests for row in report.rows) == service.forwards > 0
    for row in report.rows:
        assert row.elapsed_seconds >= 0.15
        assert row.requests_per_second == pytest.approx(row.requests / row.elapsed_seconds)
        assert row.tokens_per_second == pytest.approx(row.requests_per_second * row.tokens)
        assert row.errors == {}
        assert list(row.latency_milliseconds) == ["p50", "p90", "p99", "max"]
        assert list(row.latency_milliseconds.values()) == sorted(row.latency_milliseconds.values())
        assert row.latency_milliseconds["p50"] >= 2.0  # the service waits that long


def test_the_loop_is_closed_at_the_given_concurrency() -> None:
    service = Service()
    load(service, concurrency=5)
    assert service.most_inflight == 5


def test_one_layer_or_all_of_them_in_turn() -> None:
    one, every = Service(), Service()
    assert load(one, layer=4).layers == (4,)
    assert set(one.layers) == {"4"}
    load(every)
    assert set(every.layers) == {"3", "4"}
    assert abs(every.layers["3"] - every.layers["4"]) <= 1


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)]
)
def test_hidden_states_are_random_of_the_models_width_and_fixed_by_the_seed(dtype: Any, expected: torch.dtype) -> None:
    first, again, other = Service(), Service(), Service()
    load(first, dtype=dtype, seed=7)
    load(again, dtype=dtype, seed=7)
    load(other, dtype=dtype, seed=8)
    assert set(first.bodies) == set(again.bodies)
    assert not set(first.bodies) & set(other.bodies)
    assert len(first.bodies) == 3
    for tensors in first.bodies.values():
        assert tensors["hidden_states"].dtype is expected
        assert tensors["hidden_states"].shape == (2, 8)


def test_fp8_comes_with_a_scale_per_token_that_uses_the_whole_range() -> None:
    service = Service()
    load(service, dtype="fp8")
    for tensors in service.bodies.values():
        assert tensors["hidden_states"].dtype is torch.float8_e4m3fn
        assert tensors["hidden_scales"].shape == (2,)
        assert tensors["hidden_states"].float().abs().amax(dim=1).tolist() == [448.0, 448.0]


def test_errors_are_counted_by_code_and_not_as_requests() -> None:
    coded = httpx.Response(422, json={"error": "x", "code": "non_finite", "request_id": "r"})
    service = Service(coded, httpx.Response(500), httpx.Response(429, headers={"Retry-After": "0.01"}))
    (row,) = load(service).rows
    assert row.errors == {"ServerFailed": 1, "Unavailable": 1, "non_finite": 1}
    assert row.requests == service.forwards - 3 > 0


def test_a_service_that_answers_nothing_is_reported_without_latencies() -> None:
    service = Service(httpx.Response(503, json={"error": "x", "code": "draining"}), always=True)
    report = load(service)
    (row,) = report.rows
    assert (row.requests, row.requests_per_second, row.latency_milliseconds) == (0, 0.0, {})
    assert row.errors == {"draining": service.forwards}
    assert service.forwards < 30  # the callers pause after an error
    assert re.search(r"^ +2 +0\.0 +0( +-){4}  draining \d+$", report.table(), re.MULTILINE)


def test_the_warm_up_is_not_counted() -> None:
    service = Service()
    (row,) = load(service, warmup_seconds=0.15).rows
    assert 0 < row.requests < service.forwards


def test_the_table_is_printed_and_the_report_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    report = load(Service(), tokens=[2, 4], json_path=path)
    assert capsys.readouterr().out == report.table() + "\n"
    head, *lines = report.table().splitlines()
    assert head.split()[:3] == ["tokens", "req/s", "tokens/s"]
    assert [line.split()[0] for line in lines] == ["2", "4"]
    document = json.loads(path.read_text())
    assert document["load"]["concurrency"] == 3
    assert document["rows"][1]["tokens"] == 4
    assert document["rows"][1]["requests"] == report.rows[1].requests


def test_a_line_of_the_table() -> None:
    latency = {"p50": 1.234, "p90": 20.0, "p99": 300.0, "max": 4000.5}
    rows = (BenchRow(16, 100, 2.0, 50.0, 800.0, latency, {}),)
    settings = Load(None, (16,), 1, 2.0, 0.0, "bf16", 0)
    _, line = BenchReport("http://moe.test", "tiny", 8, (3,), settings, rows).table().splitlines()
    assert line.split() == ["16", "50.0", "800", "1.23", "20.00", "300.00", "4000.50", "none"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": []}, r"tokens must be one or more positive numbers, got \[\]"),
        ({"tokens": [4, 0]}, r"tokens must be one or more positive numbers, got \[4, 0\]"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"warmup_seconds": -1}, "warmup_seconds 0 or more"),
        ({"dtype": "int4"}, "dtype must be one of bf16, f16, f32, fp8, got 'int4'"),
        ({"layer": 9}, r"layer must be one that tiny serves, \[3, 4\], got 9"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    service = Service()
    with pytest.raises(ValueError, match=message):
        load(service, **options)
    assert service.forwards == 0


@pytest.mark.parametrize("placement", [{}, {"model": "tiny", "hidden_size": 8, "layers": None}])
def test_a_placement_without_the_sizes_is_refused(placement: Any) -> None:
    with pytest.raises(TransportFailed, match="the placement needs model, hidden_size and layers"):
        load(Service(placement=placement))


def test_an_empty_placement_has_nothing_to_load() -> None:
    with pytest.raises(TransportFailed, match="layers"):
        load(Service(placement=PLACEMENT | {"layers": []}))
