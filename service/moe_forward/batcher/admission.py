"""Whether a request that comes now would be answered before its deadline; one that would not is better told at once.

Without it a queue that is longer than a deadline serves only those that are about to give up: every answer is as late
as it may be, every refusal comes at the deadline, and steps are wasted on requests whose clients have gone.

The estimate: what is at the ranks ends; then what stands before the request in the fair order leaves, in steps as
large as the queue and the deadlines make them, at the pace measured for that size. The fair order counts, not the
queue as a whole: a client with little there is served long before the backlog of another. And the size counts, not the
average rate: ranks that did one token at a time until now do a full step much faster than that rate says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_forward.batcher.fairness import Clients
from moe_forward.batcher.forming import GIVEN_PART
from moe_forward.batcher.limits import BatchLimits
from moe_forward.batcher.pace import Pace
from moe_forward.types import ForwardRequest

LARGE_TURN_STEPS = 4.0
"""Full steps that large requests wait at most while small ones go before them: a fifth of the time is theirs."""
MARGIN = 1.25
"""Who would be answered in more than 1 / MARGIN of its time is refused: an estimate is no promise either."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What stands in the queue; lines: layers, that of the request included."""

    requests: int
    tokens: int
    lines: int


class Outlook:
    """When a request would be answered. limits, pace, clients: of the queue."""

    def __init__(self, limits: BatchLimits, pace: Pace, clients: Clients) -> None:
        self._limits = limits
        self._pace = pace
        self._clients = clients

    def late_seconds(self, request: ForwardRequest, waiting: Waiting, now: float, end_seconds: float) -> float | None:
        """Return in how many seconds a request would be answered if that is too late; None: in time, or not known.

        end_seconds: when ranks are done with what they have, minus infinity where they are free.
        """
        left_seconds = request.deadline_seconds - now
        if left_seconds <= 0 or end_seconds == math.inf or not self._pace.is_known(now, end_seconds):
            return None
        running_seconds = max(0.0, end_seconds - now)
        enough_seconds = left_seconds / MARGIN - running_seconds
        tokens = waiting.tokens + request.tokens
        room = self._limits.room(tokens, waiting.requests + 1)
        steps, step_seconds = self._drain(room, tokens, waiting.lines, left_seconds)
        if steps * step_seconds <= enough_seconds:
            return None  # whatever the order
        part = self._clients.room_before(request.client, request.tokens) / room
        if self._clients.large_tokens and not self._limits.is_large(request.tokens):
            part *= 1 + 1 / LARGE_TURN_STEPS
        seconds = (steps * min(1.0, part) + 0.5) * step_seconds  # on average half of its own step is for others
        return running_seconds + seconds if seconds > enough_seconds else None

    def _drain(self, room: int, tokens: int, lines: int, left_seconds: float) -> tuple[float, float]:
        """Return in how many steps all that waits would leave, and how long each takes.

        They are as small as deadlines make them at the least (`forming`), and the last one of each line is half full.
        """
        most = min(self._limits.max_step_tokens, max(1.0, self._pace.rows_within(GIVEN_PART * left_seconds)))
        steps = max(lines, max(room / self._limits.max_step_tokens, tokens / most) + lines / 2)
        return steps, self._pace.expected_seconds(tokens / steps)
