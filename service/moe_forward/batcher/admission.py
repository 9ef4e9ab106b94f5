"""When a request that comes now would be answered: one that would be late is better told at once.

Otherwise a queue that is longer than a deadline serves only those that are about to give up: every answer is as late as
it may be, every refusal comes at the deadline, and steps are done for clients that have gone.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_forward.batcher.limits import BatchLimits
from moe_forward.batcher.pace import Pace

IN_TIME_PART = 0.5
"""Who is expected to be answered in more than this part of its time is refused: whoever comes later and goes along
makes the steps longer, and the estimate, which does not know of them, up to twice too short."""
STEP_PART = 1 / 4
"""The part of its time that a request's step may take."""


class Backlog(NamedTuple):
    """What waits with a request, itself included. lines: layers. tokens_before: that leave before it has, its own too.

    The fair order says which those are: a client with little there is served long before the backlog of another.
    """

    requests: int
    tokens: int
    lines: int
    tokens_before: int


def most_step_tokens(given_seconds: float, limits: BatchLimits, pace: Pace) -> float:
    """Return how large a step may be for a request that was given so much time.

    One waits for the end of the step at the ranks, perhaps for the one sent behind it, and for its own; and who comes
    later and goes along makes that one longer.
    """
    return min(limits.max_step_tokens, pace.tokens_within(STEP_PART * given_seconds))


def longest_wait_seconds(requests: int, tokens: int, lines: int, limits: BatchLimits, pace: Pace) -> float:
    """Return what `wait_seconds` says at most, whoever asks, behind so much: a sum for nearly all who are in time.

    Every step as long as the longest, and as small as the shortest time given makes it.
    """
    fewest_tokens = min(limits.max_step_tokens, pace.fewest_tokens)
    steps = 1 + 1.5 * lines + tokens / fewest_tokens + requests / limits.max_step_requests
    return steps * pace.longest_seconds


def wait_seconds(backlog: Backlog, most_tokens: float, most_requests: int, pace: Pace) -> float | None:
    """Return how long ranks that are free need until they have answered the request; None before any step.

    In steps as large as the backlog fills them: ranks that did one token at a time until now are much faster then.
    most_tokens, most_requests: of a step.
    """
    full_steps = max(backlog.tokens / most_tokens, backlog.requests / most_requests)
    steps = max(1.0, backlog.lines, full_steps + backlog.lines / 2)  # the last one of a line is half full, on average
    step_seconds = pace.expected_seconds(backlog.tokens / steps)
    if step_seconds is None:
        return None
    return max(1.0, steps * backlog.tokens_before / backlog.tokens) * step_seconds
