"""What a finished step means for each of its requests, and for the metrics."""

from __future__ import annotations

from collections.abc import Iterator

from moe_forward.batcher import Queued
from moe_forward.errors import ErrorCode
from moe_forward.messages import StepAnswers, StepSummary
from moe_forward.steps import Sent
from moe_forward.types import ForwardResult, QueueReport

NON_FINITE = "hidden_states, hidden_scales or router_logits hold NaN or Inf"


def answers_of(step: Sent, ended_seconds: float, missing_experts: int) -> dict[int, StepAnswers]:
    """Return how the requests of a step ended, by front end. missing_experts: of the rank group that did it."""
    by_front: dict[int, list[Queued]] = {}
    for item in step.queued:
        by_front.setdefault(item.request.front, []).append(item)
    began_seconds = step.began_seconds
    answers = {}
    for front, mine in by_front.items():
        answers[front] = StepAnswers(
            step.step.step,
            step.step.generation,
            step.tokens,
            len(step.queued),
            missing_experts,
            ended_seconds - began_seconds,
            tuple([item.request.request for item in mine]),
            tuple([began_seconds - item.arrived_seconds for item in mine]),
        )
    for word in step.results.values():
        if word.non_finite or word.missing_routes:
            return {front: _with_notes(told, front, step) for front, told in answers.items()}
    return answers


def _with_notes(answers: StepAnswers, front: int, step: Sent) -> StepAnswers:
    """Return a front end's answers with what ranks noted of its requests."""
    non_finite = {index for result in step.results.values() for index in result.non_finite}
    missing_routes = _missing_routes(step)
    indexes = [index for index, item in enumerate(step.queued) if item.request.front == front]
    return answers._replace(
        non_finite=tuple([place for place, index in enumerate(indexes) if index in non_finite]),
        missing_routes=tuple([missing_routes[index] for index in indexes]) if missing_routes else (),
    )


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


def report_of(step: Sent, waiting: QueueReport) -> StepSummary:
    """Return the step for the metrics. waiting: the queue behind it."""
    results = tuple([result for _, result in sorted(step.results.items())])
    return StepSummary(step.step.layer, step.tokens, len(step.queued), waiting.requests, waiting.tokens, results)


def _missing_routes(step: Sent) -> list[int]:
    """Add up what the ranks say of each request's routes to experts that are missing; empty where none says any."""
    told = [result.missing_routes for result in step.results.values() if result.missing_routes]
    return [sum(counts) for counts in zip(*told, strict=True)]
