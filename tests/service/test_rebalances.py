"""Changes of which ranks hold which experts, as the metrics count them."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CollectorRegistry

from moe_forward.metrics import Metrics
from moe_forward.rebalances import Rebalances
from moe_forward.types import EngineStatus, StepReport, StepResult

READY = EngineStatus(ready=True, generation=1, reason="")
LOST = replace(READY, ready=False, lost=True)
FEWER = replace(READY, generation=2, lacking_ranks=1)
WITHOUT = replace(READY, generation=3, lacking_ranks=1, missing=(1, 2))


def starting(status: EngineStatus) -> EngineStatus:
    return replace(status, ready=False)


def seen(*statuses: EngineStatus) -> list[str]:
    rebalances = Rebalances()
    return [result for status in statuses for result in rebalances.seen(status)]


def test_a_group_that_is_started_again_as_it_was_is_no_change() -> None:
    again = replace(READY, generation=2)
    assert seen(EngineStatus(), starting(READY), READY, LOST, EngineStatus(lost=True), starting(again), again) == []


def test_fewer_ranks_and_then_fewer_experts_are_two_steps_down_and_all_of_them_one_up() -> None:
    whole = replace(READY, generation=4)
    statuses = (READY, LOST, starting(FEWER), FEWER, FEWER, starting(WITHOUT), WITHOUT, starting(whole), whole)
    assert seen(*statuses) == ["degraded", "degraded", "restored"]


def test_a_change_that_did_not_come_to_be_is_a_failure() -> None:
    whole, again = replace(READY, generation=4), replace(WITHOUT, generation=5)
    assert seen(WITHOUT, starting(whole), starting(again), again) == ["failed"]


def test_a_start_of_the_same_that_fails_is_none() -> None:
    assert seen(READY, starting(replace(READY, generation=2)), starting(FEWER), FEWER) == ["degraded"]


def test_metrics_count_changes_and_lost_routes_and_put_rows_where_their_experts_are() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, expert_metrics=True)
    value = registry.get_sample_value
    whole = StepResult(1, 1, 0, (), 10, expert_rows=(1, 2, 3, 4))
    fewer = StepResult(2, 3, 0, (), 3, expert_rows=(1, 2), missing_routes=(4, 0, 1))
    metrics.status_changed("m", READY)
    metrics.step_finished("m", StepReport(7, 1, 1, 0, 0, (whole,)))
    assert value("moe_forward_degraded", {"model": "m"}) == 0
    metrics.status_changed("m", WITHOUT)
    assert value("moe_forward_degraded", {"model": "m"}) == 1
    metrics.step_finished("m", StepReport(7, 1, 1, 0, 0, (fewer,)))
    metrics.status_changed("m", starting(replace(READY, generation=4)))
    metrics.step_finished("m", StepReport(7, 1, 1, 0, 0, (fewer,)))  # told after the next group's status
    rows = [value("moe_forward_expert_tokens_total", {"layer": "7", "expert": str(n)}) for n in range(4)]
    assert rows == [3, 2, 3, 8]
    assert value("moe_forward_dropped_assignments_total", {"model": "m"}) == 10
    assert value("moe_forward_rebalances_total", {"result": "degraded"}) == 1
