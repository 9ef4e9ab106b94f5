"""When a call is sent, sent again, or given up: one policy for the blocking and the asynchronous client.

`attempts` is a generator that asks for one attempt after the other and is sent what became of each, so that it does
no I/O and does not sleep itself (the sans-I/O pattern, https://sans-io.readthedocs.io).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from moe_forward.client.calls import Call
from moe_forward.client.errors import DeadlineExceeded, MoEForwardClientError, TransportFailed, Unavailable
from moe_forward.client.replies import Reply, reply_error

T = TypeVar("T")

Outcome = Reply | httpx.RequestError

FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 2.0
SHORTEST_WAIT_SECONDS = 0.001
"""A socket timeout of zero would mean "do not block" and no longer "time out"."""

LOST = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)
"""Failures of the connection, which a new connection may not meet. The rest of httpx' errors would come again."""


class TimeLeft(dict[str, float]):
    """httpx' `timeout` extension with one deadline for the whole attempt.

    httpx knows only timeouts of single phases (pool, connect, write, read); the time left is worked out when a phase
    asks for its timeout, so that the phases together keep the deadline.
    """

    def __init__(self, deadline_seconds: float, clock: Callable[[], float]) -> None:
        super().__init__()
        self._deadline_seconds = deadline_seconds
        self._clock = clock

    def get(self, _phase: str, _default: Any = None) -> float:
        """Seconds left now, more than 0."""
        return max(SHORTEST_WAIT_SECONDS, self._deadline_seconds - self._clock())


@dataclass(frozen=True, slots=True)
class Attempt:
    """Wait `wait_seconds`, then send `call`; `deadline_seconds` is on `clock`."""

    call: Call[Any]
    wait_seconds: float
    deadline_seconds: float
    clock: Callable[[], float]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `httpx.Client.stream`, with the time that is left now."""
        params = dict(self.call.params)
        if self.call.sends_timeout:
            params["timeout_ms"] = str(max(1, int((self.deadline_seconds - self.clock()) * 1000)))
        return {
            "method": self.call.method,
            "url": self.call.path,
            "params": params,
            "headers": {**self.call.headers, "X-Request-Id": self.call.request_id},
            "content": self.call.body,
            "extensions": {"timeout": TimeLeft(self.deadline_seconds, self.clock)},
        }

    def check_deadline(self) -> None:
        """Raises: httpx.ReadTimeout after the deadline, for a body that trickles in."""
        if self.clock() > self.deadline_seconds:
            raise httpx.ReadTimeout("the reply was still coming in")


def attempts(
    call: Call[T], *, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
) -> Generator[Attempt, Outcome, T]:
    """Ask for attempts of `call` until one gives its result; is sent the outcome of each.

    clock: seconds. jitter: a number in [0, 1).
    Returns: the caller's result.
    Raises: MoEForwardClientError when there is nothing more to try, or no time for it.
    """
    deadline_seconds = clock() + call.timeout_seconds
    wait_seconds = 0.0
    number = 0
    while True:
        outcome = yield Attempt(call, wait_seconds, deadline_seconds, clock)
        if isinstance(outcome, Reply) and outcome.status in call.accept:
            return _decode(call, outcome)
        error = reply_error(outcome, call.request_id) if isinstance(outcome, Reply) else _lost(call, outcome)
        wait_seconds = _backoff_seconds(number, error, jitter)
        worth_it = isinstance(error, Unavailable) or isinstance(error.__cause__, LOST)
        if number >= call.retries or not worth_it or clock() + wait_seconds >= deadline_seconds:
            raise error
        number += 1


def _decode(call: Call[T], reply: Reply) -> T:
    try:
        return call.decode(reply)
    except TransportFailed as error:
        error.status, error.request_id = reply.status, call.request_id
        raise


def _lost(call: Call[Any], cause: httpx.RequestError) -> MoEForwardClientError:
    error: MoEForwardClientError
    what = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    if isinstance(cause, httpx.TimeoutException):
        error = DeadlineExceeded(
            f"{call.method} {call.path} did not end within {call.timeout_seconds:g} s ({what})",
            request_id=call.request_id,
        )
    else:
        error = TransportFailed(f"{call.method} {call.path} got no reply ({what})", request_id=call.request_id)
    error.__cause__ = cause
    return error


def _backoff_seconds(number: int, error: MoEForwardClientError, jitter: Callable[[], float]) -> float:
    """Full jitter over an exponential limit, after what the server asked for, so that clients do not come in step.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
    """
    asked = error.retry_after_seconds if isinstance(error, Unavailable) else None
    limit = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(number, 16))
    return (asked or 0.0) + jitter() * limit
