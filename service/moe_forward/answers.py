"""What a finished step means for each of its requests, and for the metrics."""

from __future__ import annotations

from collections.abc import Iterator

from moe_forward.errors import ErrorCode
from moe_forward.messages import StepAnswers
from moe_forward.steps import Sent
from moe_forward.types import ForwardResult, QueueReport, StepReport

NON_FINITE = "hidden_states, hidden_scales or router_logits hold NaN or Inf"


def answers_of(step: Sent, ended_seconds: float, missing_experts: int) -> dict[int, StepAnswers]:
    """Return how the requests of a step ended, by front end. missing_experts: of the rank group that did it."""
    non_finite = {index for result in step.results.values() for index in result.non_finite}
    missing_routes = _missing_routes(step)
    by_front: dict[int, list[int]] = {}
    for index, item in enumerate(step.queued):
        by_front.setdefault(item.request.front, []).append(index)
    common = (step.step.step, step.step.generation, step.tokens, len(step.queued), missing_experts)
    step_seconds = ended_seconds - step.began_seconds
    answers = {}
    for front, indexes in by_front.items():
        mine = [step.queued[index] for index in indexes]
        answers[front] = StepAnswers(
            *common,
            step_seconds,
            tuple([item.request.request for item in mine]),
            tuple([step.began_seconds - item.arrived_seconds for item in mine]),
            tuple([place for place, index in enumerate(indexes) if index in non_finite]) if non_finite else (),
            tuple([missing_routes[index] for index in indexes]) if missing_routes else (),
        )
    return answers


def results_in(answers: StepAnswers, front: int) -> Iterator[ForwardResult]:
    """Yield each answer to front end `front` by itself."""
    for place, (request, queue_seconds) in enumerate(zip(answers.requests, answers.queue_seconds, strict=True)):
        flagged = place in answers.non_finite
        yield ForwardResult(
            front,
            request,
            ErrorCode.NON_FINITE if flagged else None,
            NON_FINITE if flagged else "",
            None,
            queue_seconds,
            answers.step_seconds,
            answers.batch_tokens,
            answers.batch_requests,
            step=answers.step,
            generation=answers.generation,
            missing_routes=answers.missing_routes[place] if answers.missing_routes else 0,
            missing_experts=answers.missing_experts,
        )


def report_of(step: Sent, waiting: QueueReport) -> StepReport:
    """Return the step for the metrics. waiting: the queue behind it."""
    results = tuple(step.results[rank] for rank in sorted(step.results))
    return StepReport(step.step.layer, step.tokens, len(step.queued), waiting.requests, waiting.tokens, results)


def _missing_routes(step: Sent) -> list[int]:
    """Add up what the ranks say of each request's routes to experts that are missing; empty where none says any."""
    told = [result.missing_routes for result in step.results.values() if result.missing_routes]
    return [sum(counts) for counts in zip(*told, strict=True)]
