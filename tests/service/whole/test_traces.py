"""Spans of a real service, its ranks' among them, as an OpenTelemetry collector gets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_forward.types import PHASES

from ..tracing.collector import collecting
from .forwards import Forward, as_safetensors, post

pytestmark = pytest.mark.service

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_collector_gets_the_whole_tree_of_a_request_by_the_time_the_service_has_ended(
    tiny: Path, start: Callable[..., Any], random_forward: Callable[..., Forward]
) -> None:
    with collecting() as collector, start(tiny, ranks=1, trace_endpoint=collector.url) as service:
        sent = as_safetensors(random_forward(1, 5, layer=2))
        traced = replace(sent, headers={**sent.headers, "traceparent": f"00-{TRACE}-{SPAN}-01"})
        assert post(service.url, traced).status_code == 200
        assert "moe_forward_trace_export_failures_total 0.0" in service.metrics()
        assert service.terminate() == 0
        (root,) = [span for span in collector.spans if span.parent == SPAN]
        assert (root.trace, root.name) == (TRACE, "POST /v1/moe/forward")
        parts = {part.name: part for part in collector.children(root)}
        assert list(parts) == ["receive", "decode", "queue", "step", "encode", "send"]
        (rank,) = collector.children(parts["step"])
        assert rank.attributes["moe_forward.routed_rows"] == 5 * 4
        assert [phase.name for phase in collector.children(rank)] == list(PHASES)
        assert parts["step"].start == rank.start <= rank.end <= parts["step"].end
