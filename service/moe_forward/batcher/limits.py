"""What bounds a step and the queue, and what waits in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from moe_forward.messages import Ticket

SMALL_PART = 8
"""A request of at most this part of a step is small: eight of them fit, and one adds little to a step's time."""

Key: TypeAlias = tuple[int, int]
"""Front end and request: what a request is called."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """max_step_tokens, max_step_requests: size of one step. max_wait_seconds: patience of a step that is not full.
    max_queue_requests, max_queue_tokens: what may wait at most; a quarter more is kept for clients with little there.
    max_steps_in_flight: steps at the ranks at a time."""

    max_step_tokens: int
    max_step_requests: int
    max_wait_seconds: float
    max_queue_requests: int
    max_queue_tokens: int
    max_steps_in_flight: int = 2

    def share(self, tokens: int) -> float:
        """Return how much of a step a request of `tokens` takes: by its rows or by its place, whichever is more."""
        return max(tokens / self.max_step_tokens, 1 / self.max_step_requests)

    def is_large(self, tokens: int) -> bool:
        """Tell whether small requests go before one of `tokens`."""
        return tokens * SMALL_PART > self.max_step_tokens


@dataclass(slots=True)
class Account:
    """A client that waits: what it was given, in shares of a step, and how much of it waits."""

    given: float
    requests: int
    tokens: int
    small_tokens: int


class Queued:
    """A waiting request. arrived_seconds: when it came (CLOCK_MONOTONIC). large: small ones go before it.

    key: what it is called. given_seconds: from its arrival to its deadline. account: its client's, while it waits.

    Worked out once, and equal to itself only: the queue asks for them a dozen times, and keeps requests in
    dictionaries.
    """

    __slots__ = ("account", "arrived_seconds", "given_seconds", "key", "large", "request")

    account: Account

    def __init__(self, request: Ticket, arrived_seconds: float, large: bool = False) -> None:
        self.request = request
        self.arrived_seconds = arrived_seconds
        self.large = large
        self.key: Key = (request.front, request.request)
        self.given_seconds = request.deadline_seconds - arrived_seconds
