"""What a finished step means for each of its requests, and for the metrics."""

from __future__ import annotations

from moe_forward.errors import ErrorCode
from moe_forward.steps import Sent
from moe_forward.types import ForwardResult, QueueReport, StepReport

NON_FINITE = "hidden_states, hidden_scales or router_logits hold NaN or Inf"


def results_of(step: Sent, ended_seconds: float, missing_experts: int) -> list[ForwardResult]:
    """Return how the requests of a step ended. missing_experts: of the rank group that did it."""
    non_finite = {index for result in step.results.values() for index in result.non_finite}
    missing_routes = _missing_routes(step)
    results = []
    for index, item in enumerate(step.queued):
        began = max(step.began_seconds, item.arrived_seconds)
        result = ForwardResult(
            item.request.front,
            item.request.request,
            queue_seconds=began - item.arrived_seconds,
            step_seconds=ended_seconds - began,
            batch_tokens=step.tokens,
            batch_requests=len(step.queued),
            step=step.step.step,
            generation=step.step.generation,
            missing_routes=missing_routes[index],
            missing_experts=missing_experts,
        )
        if index in non_finite:
            result = result._replace(code=ErrorCode.NON_FINITE, message=NON_FINITE)
        results.append(result)
    return results


def report_of(step: Sent, waiting: QueueReport) -> StepReport:
    """Return the step for the metrics. waiting: the queue behind it."""
    results = tuple(step.results[rank] for rank in sorted(step.results))
    return StepReport(step.step.layer, step.tokens, len(step.queued), waiting.requests, waiting.tokens, results)


def _missing_routes(step: Sent) -> list[int]:
    """Add up what the ranks say of each request's routes to experts that are missing."""
    told = [result.missing_routes for result in step.results.values() if result.missing_routes]
    return [sum(counts) for counts in zip(*told, strict=True)] or [0] * len(step.queued)
