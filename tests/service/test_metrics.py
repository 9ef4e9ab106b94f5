from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

from moe_forward.errors import ConfigError, ErrorCode
from moe_forward.expert_tokens import check_series
from moe_forward.metrics import PHASE_SECONDS, REJECTIONS, Metrics, package_version
from moe_forward.request_record import RequestRecord
from moe_forward.types import (
    PHASES,
    EngineStatus,
    ForwardResult,
    QueueReport,
    RankInfo,
    StepReport,
    StepResult,
)

EXPECTED = {
    "requests_total": ("counter", {"model", "route", "code"}),
    "request_duration_seconds": ("histogram", {"model", "route"}),
    "queue_duration_seconds": ("histogram", {"model"}),
    "phase_duration_seconds": ("histogram", {"model", "rank", "phase"}),
    "decode_duration_seconds": ("histogram", {"encoding"}),
    "encode_duration_seconds": ("histogram", {"encoding"}),
    "request_body_bytes": ("histogram", {"encoding"}),
    "batch_tokens": ("histogram", {"model"}),
    "batch_requests": ("histogram", {"model"}),
    "tokens_total": ("counter", {"model"}),
    "queue_requests": ("gauge", {"model"}),
    "queue_tokens": ("gauge", {"model"}),
    "inflight_requests": ("gauge", {"model"}),
    "rejected_total": ("counter", {"reason"}),
    "rank_up": ("gauge", {"rank"}),
    "rank_restarts_total": ("counter", {"rank"}),
    "rank_tokens_total": ("counter", {"rank"}),
    "expert_load_imbalance_ratio": ("gauge", {"layer"}),
    "placement_generation": ("gauge", set()),
    "weights_load_duration_seconds": ("gauge", {"rank"}),
    "startup_duration_seconds": ("gauge", {"rank"}),
    "gpu_memory_bytes": ("gauge", {"rank", "kind"}),
    "build_info": ("gauge", {"version", "torch", "ray", "backend", "kernel"}),
    "requantized_tokens_total": ("counter", {"model"}),
    "exchange_bytes_total": ("counter", {"rank", "direction"}),
    "degraded": ("gauge", {"model"}),
    "dropped_assignments_total": ("counter", {"model"}),
    "rebalances_total": ("counter", {"result"}),
}
ASKED_FOR = {
    "expert_tokens_total": ("counter", {"layer", "expert"}),
    "trace_export_failures_total": ("counter", set()),
}
START_SECONDS = 100.0


class Series:
    """Metrics in a registry of their own, and their values."""

    def __init__(self, **settings: bool) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, wall_clock=lambda: START_SECONDS, **settings)

    def value(self, name: str, **labels: Any) -> float | None:
        return self.registry.get_sample_value(f"moe_forward_{name}", {key: str(v) for key, v in labels.items()})


@pytest.fixture
def series() -> Series:
    return Series()


def rank_info(rank: int, state: Any = "ready", since: float = 103.0) -> RankInfo:
    return RankInfo(rank, state, since, load_seconds=2.5)


def report(*rows: int, layer: int = 1, requantized: int = 0) -> StepReport:
    phases = tuple(0.001 * (index + 1) for index in range(len(PHASES)))
    results = tuple(
        StepResult(1, 1, rank, phases, count, requantized, expert_rows=(count,)) for rank, count in enumerate(rows)
    )
    return StepReport(layer, 48, 3, 5, 70, results)


def feed(metrics: Metrics) -> None:
    """Give every series a value."""
    metrics.request_started("tiny")
    record = RequestRecord("/v1/moe/forward", "id", "tiny", 200, None, "json", 1, 4, 1000, 0.1, 0.1, 0.1, 0.1, 0.5)
    metrics.request_finished(record)
    metrics.rejected(ErrorCode.QUEUE_FULL)
    metrics.step_finished("tiny", report(1, 2))
    ranks = (replace(rank_info(0), device="cuda:0", memory_bytes=70, buffer_bytes=20, free_bytes=10),)
    metrics.status_changed("tiny", EngineStatus(True, ranks=ranks, backend="gloo", kernel="reference"))


def exposed(series: Series) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of every series."""
    found = {}
    for family in series.registry.collect():
        name = family.name.removeprefix("moe_forward_") + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


def test_every_series_is_exposed_with_exactly_the_documented_type_and_labels(series: Series) -> None:
    feed(series.metrics)
    assert exposed(series) == EXPECTED


def test_some_series_are_there_only_where_they_are_asked_for() -> None:
    series = Series(expert_metrics=True, tracing=True)
    feed(series.metrics)
    assert exposed(series) == EXPECTED | ASKED_FOR


def test_experts_are_counted_one_by_one_and_by_layer() -> None:
    series = Series(expert_metrics=True)
    for rows in ((1, 2, 0), (3, 0, 0)):  # two experts on rank 0, one on rank 1; ranks answer in any order
        results = (StepResult(1, 1, 1, (), 0, expert_rows=rows[2:]), StepResult(1, 1, 0, (), 3, expert_rows=rows[:2]))
        series.metrics.step_finished("tiny", StepReport(4, 3, 1, 0, 0, results))
    shown = [series.value("expert_tokens_total", layer=4, expert=expert) for expert in range(3)]
    assert shown == [4, 2, 0]
    assert series.value("expert_tokens_total", layer=1, expert=0) is None, "layer 1 had no step"


def test_more_experts_than_a_scrape_can_carry_are_refused_with_the_numbers() -> None:
    check_series(60, 512)
    with pytest.raises(ConfigError, match=r"expert_metrics: 61 layers of 540 experts are 32940 series, .* 32768"):
        check_series(61, 540)


def test_bytes_of_the_exchange_are_counted_by_rank_and_direction(series: Series) -> None:
    results = (
        StepResult(1, 1, 0, (), 1, dispatch_bytes=10, combine_bytes=4),
        StepResult(1, 1, 1, (), 1, dispatch_bytes=0, combine_bytes=0),
    )
    for _ in range(2):
        series.metrics.step_finished("tiny", StepReport(1, 2, 1, 0, 0, results))
    assert series.value("exchange_bytes_total", rank=0, direction="dispatch") == 20
    assert series.value("exchange_bytes_total", rank=0, direction="combine") == 8
    assert series.value("exchange_bytes_total", rank=1, direction="combine") == 0


def test_the_queue_is_shown_as_last_told_and_empty_without_a_ready_group(series: Series) -> None:
    series.metrics.step_finished("tiny", report(1, 2))
    assert series.value("queue_requests", model="tiny") == 5
    series.metrics.queue_changed("tiny", QueueReport(9, 90))
    assert (series.value("queue_requests", model="tiny"), series.value("queue_tokens", model="tiny")) == (9, 90)
    series.metrics.status_changed("tiny", EngineStatus(False, lost=True, ranks=(rank_info(0, "lost"),)))
    assert (series.value("queue_requests", model="tiny"), series.value("queue_tokens", model="tiny")) == (0, 0)


def test_degraded_follows_the_ranks(series: Series) -> None:
    for ready in (False, True, False):
        series.metrics.status_changed("tiny", EngineStatus(ready))
        assert series.value("degraded", model="tiny") == (not ready)


def test_an_exemplar_names_the_trace_of_a_request_whose_trace_is_kept(series: Series) -> None:
    for seconds, trace_id, sampled in ((0.003, "a" * 32, True), (0.003, "b" * 32, False), (0.3, "c" * 32, True)):
        series.metrics.request_started("tiny")
        record = RequestRecord("/r", "id", "tiny", duration_seconds=seconds, trace_id=trace_id, sampled=sampled)
        series.metrics.request_finished(record)
    page = openmetrics(series.registry).decode()
    lines = [line for line in page.splitlines() if "# {" in line]
    assert [line.split(" # ")[1].split()[0] for line in lines] == [f'{{trace_id="{name * 32}"}}' for name in "ac"]
    assert all(line.startswith("moe_forward_request_duration_seconds_bucket{") for line in lines)


def test_the_log_line_of_a_request_has_its_trace_and_none_of_the_notes_for_spans() -> None:
    fields = RequestRecord("/r", "id", "tiny", trace_id="a" * 32, sampled=True, result=ForwardResult(1, 2)).fields()
    assert fields["trace_id"] == "a" * 32
    assert {"sampled", "moments", "result"} & fields.keys() == set()


def test_names_and_help_are_what_promtool_accepts(series: Series) -> None:
    feed(series.metrics)
    for family in series.registry.collect():
        assert re.fullmatch(r"moe_forward_[a-z0-9]+(_[a-z0-9]+)*", family.name)
        assert not re.search(r"_(ms|us|ns|millis|micros|mb|kb|info_total)$|^.*_(ms|us)_", family.name)
        assert family.documentation.endswith(".")
        if family.type != "counter":
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        for word in ("duration",):
            assert word not in family.name or family.name.endswith("_seconds")
    assert b"moe_forward_requests_total{" in generate_latest(series.registry)


def test_buckets_are_the_documented_ones(series: Series) -> None:
    feed(series.metrics)
    buckets: dict[str, list[float]] = {}
    for family in series.registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket") and sample.labels["le"] != "+Inf":
                values = buckets.setdefault(family.name.removeprefix("moe_forward_"), [])
                if float(sample.labels["le"]) not in values:
                    values.append(float(sample.labels["le"]))
    requests = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert buckets["request_duration_seconds"] == buckets["queue_duration_seconds"] == requests
    for name in ("phase_duration_seconds", "decode_duration_seconds", "encode_duration_seconds"):
        assert buckets[name] == list(PHASE_SECONDS)
    assert PHASE_SECONDS[0] == 0.00002
    assert PHASE_SECONDS[-1] == 1
    assert buckets["batch_tokens"] == buckets["batch_requests"] == [2.0**power for power in range(14)]
    sizes = buckets["request_body_bytes"]
    assert sizes[0] == 1e3
    assert 1e9 <= sizes[-1] < 4e9
    assert all(large == 4 * small for small, large in pairwise(sizes))


def test_two_registries_share_nothing(series: Series) -> None:
    other = Series()
    series.metrics.rejected(ErrorCode.TOO_LARGE)
    assert series.value("rejected_total", reason="too_large") == 1
    assert other.value("rejected_total", reason="too_large") is None


def test_rejections_have_only_the_documented_reasons(series: Series) -> None:
    assert set(REJECTIONS.values()) == {"queue_full", "deadline", "draining", "unavailable", "too_large", "auth"}
    for code in ErrorCode:
        series.metrics.rejected(code)
    total = sum(
        sample.value
        for family in series.registry.collect()
        for sample in family.samples
        if sample.name == "moe_forward_rejected_total"
    )
    assert total == len(REJECTIONS)
    assert series.value("rejected_total", reason="auth") == 2


def test_inflight_goes_up_and_down(series: Series) -> None:
    series.metrics.request_started("tiny")
    assert series.value("inflight_requests", model="tiny") == 1
    series.metrics.request_finished(RequestRecord("/r", "id", "tiny", 499, ErrorCode.CANCELLED))
    assert series.value("inflight_requests", model="tiny") == 0
    assert series.value("requests_total", model="tiny", route="/r", code=499) == 1


def test_a_refused_request_adds_no_tokens_and_no_unreached_durations(series: Series) -> None:
    series.metrics.request_started("tiny")
    record = RequestRecord("/r", "id", "tiny", 422, ErrorCode.NON_FINITE, "json", 1, 9, 100, decode_seconds=0.1)
    series.metrics.request_finished(record)
    assert series.value("tokens_total", model="tiny") in (None, 0)
    assert series.value("decode_duration_seconds_count", encoding="json") == 1
    assert series.value("encode_duration_seconds_count", encoding="json") is None
    assert series.value("queue_duration_seconds_count", model="tiny") in (None, 0)


def test_a_step_feeds_batch_queue_phase_and_rank_series(series: Series) -> None:
    series.metrics.step_finished("tiny", report(30, 10, requantized=4))
    assert series.value("batch_tokens_sum", model="tiny") == 48
    assert series.value("batch_requests_sum", model="tiny") == 3
    assert series.value("queue_requests", model="tiny") == 5
    assert series.value("queue_tokens", model="tiny") == 70
    assert series.value("rank_tokens_total", rank=0) == 30
    assert series.value("requantized_tokens_total", model="tiny") == 8
    assert series.value("expert_load_imbalance_ratio", layer=1) == pytest.approx(1.5)
    for index, phase in enumerate(PHASES):
        sum_seconds = series.value("phase_duration_seconds_sum", model="tiny", rank=1, phase=phase)
        assert sum_seconds == pytest.approx(0.001 * (index + 1))


def test_a_phase_that_did_not_happen_is_no_observation(series: Series) -> None:
    phases = (0.0,) + (0.1,) * (len(PHASES) - 1)
    series.metrics.step_finished("tiny", StepReport(1, 1, 1, 0, 0, (StepResult(1, 1, 0, phases, 0),)))
    assert series.value("phase_duration_seconds_count", model="tiny", rank=0, phase=PHASES[0]) is None
    assert series.value("phase_duration_seconds_count", model="tiny", rank=0, phase=PHASES[1]) == 1
    assert series.value("expert_load_imbalance_ratio", layer=1) is None  # no rows, no ratio


def test_a_step_that_a_rank_did_not_time_adds_no_phases_but_everything_else(series: Series) -> None:
    results = (StepResult(1, 1, 0, (), 12), StepResult(1, 1, 1, (), 4))
    series.metrics.step_finished("tiny", StepReport(1, 2, 1, 0, 0, results))
    for rank in (0, 1):
        for phase in PHASES:
            assert series.value("phase_duration_seconds_count", model="tiny", rank=rank, phase=phase) is None
    assert series.value("rank_tokens_total", rank=0) == 12
    assert series.value("batch_tokens_sum", model="tiny") == 2


def test_gpu_memory_is_shown_by_kind_and_not_for_cpu_ranks(series: Series) -> None:
    on_gpu = replace(rank_info(1), device="cuda:1", memory_bytes=70, buffer_bytes=20, free_bytes=10)
    series.metrics.status_changed("tiny", EngineStatus(True, ranks=(replace(rank_info(0), memory_bytes=70), on_gpu)))
    shown = {kind: series.value("gpu_memory_bytes", rank=1, kind=kind) for kind in ("weights", "buffers", "free")}
    assert shown == {"weights": 70, "buffers": 20, "free": 10}
    assert series.value("gpu_memory_bytes", rank=0, kind="weights") is None


def test_status_feeds_ranks_and_generation(series: Series) -> None:
    status = EngineStatus(False, generation=4, ranks=(rank_info(0), rank_info(1, "starting")))
    series.metrics.status_changed("tiny", status)
    assert series.value("placement_generation") == 4
    assert (series.value("rank_up", rank=0), series.value("rank_up", rank=1)) == (1, 0)
    assert series.value("weights_load_duration_seconds", rank=0) == 2.5
    assert series.value("weights_load_duration_seconds", rank=1) is None
    assert series.value("startup_duration_seconds", rank=0) == 3.0


def test_startup_is_the_first_start_only_and_never_negative(series: Series) -> None:
    series.metrics.status_changed(
        "tiny", EngineStatus(True, ranks=(rank_info(0, since=90.0), rank_info(1, since=101.0)))
    )
    series.metrics.status_changed("tiny", EngineStatus(True, ranks=(rank_info(1, since=500.0),)))
    assert series.value("startup_duration_seconds", rank=0) == 0
    assert series.value("startup_duration_seconds", rank=1) == 1.0


def test_restarts_follow_the_engine_and_survive_its_loss(series: Series) -> None:
    for restarts in (0, 0, 1):
        series.metrics.status_changed("tiny", EngineStatus(True, restarts=restarts, ranks=(rank_info(0), rank_info(1))))
    series.metrics.status_changed("tiny", EngineStatus(lost=True))  # the engine is gone: it names no ranks
    assert series.value("rank_up", rank=1) == 0
    series.metrics.status_changed("tiny", EngineStatus(True, restarts=2, ranks=(rank_info(0), rank_info(1))))
    assert series.value("rank_restarts_total", rank=0) == series.value("rank_restarts_total", rank=1) == 2
    assert series.value("rank_up", rank=1) == 1


def test_build_info_names_what_is_in_use_now(series: Series) -> None:
    for kernel in ("reference", "cutlass"):
        series.metrics.status_changed("tiny", EngineStatus(True, backend="gloo", kernel=kernel))
    versions = {"version": package_version("moe-forward"), "torch": package_version("torch")}
    versions["ray"] = package_version("ray")
    assert series.value("build_info", **versions, backend="gloo", kernel="cutlass") == 1
    assert series.value("build_info", **versions, backend="gloo", kernel="reference") is None


def test_version_of_what_is_not_installed_is_unknown() -> None:
    assert package_version("no-such-distribution-here") == "unknown"
    assert re.match(r"\d+\.", package_version("prometheus-client"))
