"""Spans of requests that go through the application and a real engine with fake ranks, as a collector gets them."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from moe_forward import tracing
from moe_forward.api import create_app
from moe_forward.config import Config
from moe_forward.errors import StartError
from moe_forward.logs import extra_fields
from moe_forward.metrics import Metrics
from moe_forward.tracing import export
from moe_forward.types import PHASES, GateSpec, ModelSpec

from .collector import Collector, Seen, collecting

if TYPE_CHECKING:
    from tests.service.conftest import Front, Gate, Pool

COLUMNS = 8
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=x"}
FORWARD = "/v1/moe/forward"
SPEC = ModelSpec("tiny", COLUMNS, 128, 16, 4, 0, (3, 4), 128, GateSpec("softmax"))
SERVER = 2


class Served:
    """An application whose spans go to a collector, where there is one."""

    def __init__(self, front: Front, collector: Collector | None = None) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, tracing=True)
        self.tracer: Any = collector and tracing.start_tracer(collector.url, self.metrics.export_failed)
        app = create_app(Config(), SPEC, front.link, self.metrics, None, self.tracer)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")

    async def post(self, tokens: int = 2, layer: int = 3, **headers: str) -> httpx.Response:
        body: dict[str, Any] = {"hidden_states": np.ones((tokens, COLUMNS)).tolist()}
        return await self.client.post(f"{FORWARD}?layer={layer}", json=body, headers=headers)

    def failures(self) -> float:
        return self.registry.get_sample_value("moe_forward_trace_export_failures_total") or 0.0


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = logging.getLogger(export.SDK_LOGGER)
    before = logger.propagate, logger.handlers
    yield
    logger.propagate, logger.handlers = before


@pytest.fixture
async def served(
    pool: Pool, gate: Gate, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    """Two ranks; the first holds its steps until the gate is open."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds until spans are sent
    front = await pool.start(gate, None)
    made = Served(front, collector)
    yield made
    await made.client.aclose()
    made.tracer.close()


def one(spans: list[Seen]) -> Seen:
    (found,) = spans
    return found


async def test_a_request_is_a_tree_of_its_parts(served: Served, gate: Gate, collector: Collector) -> None:
    gate.open()
    reply = await served.post(tokens=5, layer=4)
    assert reply.status_code == 200
    served.tracer.close()
    assert collector.paths == {"/v1/traces"}
    root = one(collector.named(f"POST {FORWARD}"))
    assert (root.parent, root.kind, root.failed) == ("", SERVER, False)
    assert root.resource["service.name"] == "moe-forward"
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": FORWARD,
        "http.response.status_code": 200,
        "moe_forward.model": "tiny",
        "moe_forward.request_id": reply.headers["x-request-id"],
        "moe_forward.encoding": "json",
        "moe_forward.layer": 4,
        "moe_forward.tokens": 5,
    }
    parts = collector.children(root)
    assert [part.name for part in parts] == ["receive", "decode", "queue", "step", "encode", "send"]
    assert all(before.end <= after.start + 1000 for before, after in pairwise(parts)), "parts overlap"
    assert root.start <= parts[0].start
    assert parts[-1].end <= root.end
    step = parts[3]
    assert step.attributes == {
        "moe_forward.layer": 4,
        "moe_forward.tokens": 5,
        "moe_forward.batch_tokens": 5,
        "moe_forward.batch_requests": 1,
        "moe_forward.step": 0,
        "moe_forward.generation": 1,
    }
    ranks = collector.children(step)
    assert {rank.name for rank in ranks} == {"rank"}
    assert sorted(rank.attributes["moe_forward.rank"] for rank in ranks) == [0, 1]
    for rank in ranks:
        phases = collector.children(rank)
        assert [phase.name for phase in phases] == list(PHASES)
        assert rank.start == step.start == phases[0].start
        assert rank.end == phases[-1].end
        assert {phase.end - phase.start for phase in phases} == {1_000_000}, "fake ranks say 1 ms for each"
    assert len(collector.spans) == 1 + 6 + 2 * (1 + len(PHASES))


async def test_requests_of_one_step_share_it_and_its_ranks_are_told_once(
    served: Served, gate: Gate, pool: Pool, collector: Collector
) -> None:
    alone = asyncio.create_task(served.post())
    (front,) = pool.fronts
    await front.until(lambda: gate.entered == 1)
    together = [asyncio.create_task(served.post(tokens=count)) for count in (1, 3)]
    await front.until(lambda: front.link.inflight == 3)
    gate.open()
    await asyncio.gather(alone, *together)
    served.tracer.close()
    first, second = sorted(collector.named("step", batch_requests=2), key=lambda span: len(span.links))
    assert first.trace != second.trace
    assert {first.attributes["moe_forward.tokens"], second.attributes["moe_forward.tokens"]} == {1, 3}
    shared = ("moe_forward.step", "moe_forward.generation", "moe_forward.batch_tokens")
    assert [first.attributes[name] for name in shared] == [second.attributes[name] for name in shared] == [1, 1, 4]
    assert (first.links, second.links) == ([], [(first.trace, first.id)])
    assert len(collector.children(first)) == 2
    assert collector.children(second) == []
    queue = next(span for span in collector.named("queue") if span.trace == second.trace)
    assert queue.end - queue.start > 0


async def test_a_clients_trace_is_continued(served: Served, gate: Gate, collector: Collector) -> None:
    gate.open()
    assert (await served.post(**PARENT)).status_code == 200
    assert (await served.post(traceparent=f"00-{TRACE[::-1]}-{SPAN}-00")).status_code == 200
    served.tracer.close()
    root = one(collector.named(f"POST {FORWARD}"))
    assert (root.trace, root.parent) == (TRACE, SPAN)
    assert {span.trace for span in collector.spans} == {TRACE}, "the client does not keep the other trace"


async def test_the_log_line_and_the_exemplar_name_the_trace(
    served: Served, gate: Gate, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open()
    with caplog.at_level(logging.INFO, "moe_forward.api.forward"):
        await served.post(**PARENT)
    (line,) = [record for record in caplog.records if record.message == "request"]
    assert extra_fields(line)["trace_id"] == TRACE
    assert f'# {{trace_id="{TRACE}"}}' in generate_latest(served.registry).decode()
    served.tracer.close()


async def test_without_a_tracer_the_clients_trace_is_still_named(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    plain = Served(await pool.start(None, None))
    with caplog.at_level(logging.INFO, "moe_forward.api.forward"):
        await plain.post(traceparent=f"00-{TRACE}-{SPAN}-00")
        await plain.post()
    named = [extra_fields(record).get("trace_id") for record in caplog.records if record.message == "request"]
    assert named == [TRACE, None]
    assert "trace_id" not in generate_latest(plain.registry).decode(), "nobody keeps that trace"
    await plain.post(**PARENT)
    assert f'trace_id="{TRACE}"' in generate_latest(plain.registry).decode()
    await plain.client.aclose()


async def test_a_request_that_no_step_took_waits_and_fails(
    served: Served, gate: Gate, pool: Pool, collector: Collector
) -> None:
    bad = await served.client.post(f"{FORWARD}?layer=3", content=b"{", headers={"content-type": "application/json"})
    assert bad.status_code == 400
    task = asyncio.create_task(served.post())
    await pool.fronts[0].until(lambda: gate.entered == 1)
    pool.ranks[0].kill()
    gone = await task
    assert gone.status_code == 503
    served.tracer.close()
    ids = [reply.headers["x-request-id"] for reply in (gone, bad)]
    lost, malformed = (one(collector.named(f"POST {FORWARD}", request_id=name)) for name in ids)
    assert (lost.failed, lost.attributes["error.type"]) == (True, "rank_lost")
    assert [part.name for part in collector.children(lost)] == ["receive", "decode", "wait", "send"]
    assert (malformed.failed, malformed.attributes["error.type"]) == (False, "malformed_body")
    assert [part.name for part in collector.children(malformed)] == ["receive", "decode", "send"]


async def test_a_collector_that_refuses_costs_spans_and_no_requests(
    served: Served, gate: Gate, pool: Pool, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open()
    collector.status = 400
    with caplog.at_level(logging.WARNING, "moe_forward.tracing"):
        for sent in range(1, 4):
            assert (await served.post()).status_code == 200
            await pool.fronts[0].until(lambda sent=sent: served.failures() >= sent)
        served.tracer.close()
    complaints = [record.getMessage() for record in caplog.records if record.name == "moe_forward.tracing.export"]
    assert served.failures() == collector.requests
    assert len(complaints) == 1, "one line a minute"
    assert "400" in complaints[0]


async def test_a_collector_that_hangs_does_not_keep_the_service_from_ending(
    served: Served, gate: Gate, collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open()
    monkeypatch.setattr(export, "CLOSE_SECONDS", 0.1)
    collector.hold.clear()
    assert (await served.post()).status_code == 200
    served.tracer.close()
    assert "did not take the last spans" in caplog.text
    collector.hold.set()


def test_without_the_packages_the_service_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "moe_forward.tracing.export")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartError, match=r"opentelemetry.* is not installed; install it: pip install 'moe-forward\["):
        tracing.check_installed()


def test_nothing_of_opentelemetrys_sdk_is_imported_where_nobody_asks_for_traces() -> None:
    program = "import sys, moe_forward.api; print([name for name in sys.modules if 'opentelemetry.sdk' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/otlp/v1/traces"])
def test_an_endpoint_without_a_path_means_the_usual_one(path: str) -> None:
    assert export.traces_url("http://collector:4318" + path) == "http://collector:4318" + (
        path.rstrip("/") or "/v1/traces"
    )
