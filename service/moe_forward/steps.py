"""The steps at the ranks: which are on their way, when each could begin, and when the last of them will be done.

Pure: time is an argument. Ranks do steps strictly in the order in which they were sent, so the oldest ends first.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from moe_forward.batcher import Ahead, BatchLimits, Pace, Queued
from moe_forward.messages import RankWord, StepOrder


@dataclass(slots=True)
class Sent:
    """A step at the ranks. queued: its requests. tokens: its rows. results: of the ranks that have answered.

    sent_seconds: when it left. began_seconds: when it could begin: it was sent, and the step before it had ended.
    """

    step: StepOrder
    queued: list[Queued]
    tokens: int
    sent_seconds: float
    began_seconds: float
    large: bool
    results: dict[int, RankWord] = field(default_factory=dict)


class StepsInFlight:
    """Steps that were sent and have not ended. limits: how many there may be. pace: how long they take."""

    def __init__(self, limits: BatchLimits, pace: Pace) -> None:
        self._limits = limits
        self._pace = pace
        self._sent: deque[Sent] = deque()
        self._ahead: tuple[int, Ahead] | None = None  # what was said last, and after how many finished steps

    @property
    def oldest(self) -> Sent | None:
        """The step that ranks work on, None while they are free."""
        return self._sent[0] if self._sent else None

    @property
    def began_seconds(self) -> float:
        """When that step could begin, infinite while ranks are free; those behind it are not late by waiting."""
        return self._sent[0].began_seconds if self._sent else math.inf

    @property
    def have_room(self) -> bool:
        """Whether one more may be sent."""
        return len(self._sent) < self._limits.max_steps_in_flight

    def add(self, step: StepOrder, queued: list[Queued], now: float) -> None:
        """Note a step that is being sent."""
        tokens, large = 0, False
        for item in queued:
            tokens += item.request.tokens
            large = large or item.large
        self._sent.append(Sent(step, queued, tokens, now, now, large))
        self._ahead = None

    def find(self, result: RankWord) -> Sent | None:
        """Return the step that a rank speaks of; None for a late word of one that was given up."""
        for sent in self._sent:
            if sent.step.step == result.step and sent.step.generation == result.generation:
                return sent
        return None

    def pop_finished(self, ranks: int, now: float) -> Sent | None:
        """Take out the oldest step if all ranks have answered; the next one can begin."""
        if not self._sent or len(self._sent[0].results) < ranks:
            return None
        finished = self._sent.popleft()
        self._ahead = None
        if self._sent:
            self._sent[0].began_seconds = now
        return finished

    def pop_all(self) -> list[Sent]:
        """Take out everything, oldest first."""
        sent = list(self._sent)
        self._sent.clear()
        self._ahead = None
        return sent

    def ahead(self) -> Ahead | None:
        """Return what stands before the next step; None while ranks are free."""
        if not self._sent:
            return None
        if self._ahead is None or self._ahead[0] != self._pace.steps:
            self._ahead = (self._pace.steps, self._look_ahead())
        return self._ahead[1]

    def _look_ahead(self) -> Ahead:
        end, last = self._sent[0].began_seconds, 0.0
        for sent in self._sent:
            last = self._pace.step_seconds(sent.tokens) or math.inf
            end += last
        return Ahead(end, last, any(sent.large for sent in self._sent))
