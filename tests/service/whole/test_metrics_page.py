"""The metrics page of a running service: every documented series is there, and other programs accept the page."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from moe_forward.types import PHASES

from .forwards import Forward, as_safetensors, post
from .running import Service

pytestmark = pytest.mark.service

# The list of the interface. Not here: moe_forward_gpu_memory_bytes (these ranks are on CPU).
DOCUMENTED = """
moe_forward_requests_total                    counter    model route code
moe_forward_request_duration_seconds          histogram  model route
moe_forward_queue_duration_seconds            histogram  model
moe_forward_phase_duration_seconds            histogram  model rank phase
moe_forward_decode_duration_seconds           histogram  encoding
moe_forward_encode_duration_seconds           histogram  encoding
moe_forward_request_body_bytes                histogram  encoding
moe_forward_batch_tokens                      histogram  model
moe_forward_batch_requests                    histogram  model
moe_forward_tokens_total                      counter    model
moe_forward_queue_requests                    gauge      model
moe_forward_queue_tokens                      gauge      model
moe_forward_inflight_requests                 gauge      model
moe_forward_rejected_total                    counter    reason
moe_forward_rank_up                           gauge      rank
moe_forward_rank_restarts_total               counter    rank
moe_forward_rank_tokens_total                 counter    rank
moe_forward_expert_tokens_total               counter    layer expert
moe_forward_expert_load_imbalance_ratio       gauge      layer
moe_forward_placement_generation              gauge
moe_forward_degraded                          gauge      model
moe_forward_weights_load_duration_seconds     gauge      rank
moe_forward_startup_duration_seconds          gauge      rank
moe_forward_build_info                        gauge      version torch ray backend kernel
moe_forward_exchange_bytes_total              counter    rank direction
moe_forward_requantized_tokens_total          counter    model
moe_forward_rebalances_total                  counter    result
moe_forward_dropped_assignments_total         counter    model
"""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def page(service: Service, random_forward: Callable[..., Forward]) -> str:
    """What is scraped after requests of several layers, one of them refused."""
    for layer in (1, 2, 3):
        assert post(service.url, as_safetensors(random_forward(layer, 40, layer))).status_code == 200
    assert httpx.post(service.url + "/v1/drain").status_code == 401
    return service.metrics()


def values(page: str, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Values of these labels of a series -> its value."""
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    }


def test_every_documented_series_has_its_type_its_labels_and_a_value(page: str) -> None:
    found = {}
    for family in text_string_to_metric_families(page):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if family.samples:
            found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
    rows = [line.split() for line in DOCUMENTED.strip().splitlines()]
    assert found == {name: (kind, set(labels)) for name, kind, *labels in rows}


def test_each_rank_shows_every_phase(page: str) -> None:
    counts = values(page, "moe_forward_phase_duration_seconds_count", "rank", "phase")
    assert counts.keys() == {(rank, phase) for rank in "01" for phase in PHASES}
    assert min(counts.values()) > 0


def test_experts_add_up_to_the_ranks_that_hold_them(page: str) -> None:
    experts = values(page, "moe_forward_expert_tokens_total", "layer", "expert")
    ranks = values(page, "moe_forward_rank_tokens_total", "rank")
    assert len(experts) == 3 * 32
    for rank in (0, 1):
        held = sum(value for (_, expert), value in experts.items() if int(expert) // 16 == rank)
        assert held == ranks[str(rank),]
    assert values(page, "moe_forward_degraded", "model") == {("tiny",): 0}


def test_tokens_travelled_between_the_ranks(page: str) -> None:
    moved = values(page, "moe_forward_exchange_bytes_total", "rank", "direction")
    assert moved.keys() == {(rank, direction) for rank in "01" for direction in ("dispatch", "combine")}
    token_bytes, row_bytes = 256 + 4 + 8 * 4, 4 * 256
    for (_, direction), value in moved.items():
        assert value > 0
        assert value % (token_bytes if direction == "dispatch" else row_bytes) == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_promtool_has_nothing_to_say(page: str) -> None:
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=page, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_scrape_in_openmetrics_names_the_trace_of_a_request(
    service: Service, random_forward: Callable[..., Forward]
) -> None:
    sent = as_safetensors(random_forward(5, 4))
    traced = replace(sent, headers={**sent.headers, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"})
    assert post(service.url, traced).status_code == 200
    scrape = httpx.get(service.metrics_url, headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert scrape.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    traces = {
        sample.exemplar.labels["trace_id"]
        for family in open_metrics(scrape.text)
        for sample in family.samples
        if sample.exemplar
    }
    assert TRACE in traces
    service.wait_for(lambda: f" trace_id={TRACE}" in service.log)
