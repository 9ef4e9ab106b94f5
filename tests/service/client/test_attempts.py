"""The retry policy, on a clock of its own: nothing here waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import httpx
import pytest

from moe_forward.client.attempts import Attempt, Outcome, TimeLeft, attempts
from moe_forward.client.calls import Call
from moe_forward.client.errors import (
    DeadlineExceeded,
    MoEForwardClientError,
    RequestRefused,
    ServerFailed,
    TransportFailed,
    Unavailable,
)
from moe_forward.client.replies import Reply


def label(value: object) -> str:
    """A short name of an outcome or an error class, for the ids of tests."""
    return str(value.status) if isinstance(value, Reply) else getattr(value, "__name__", type(value).__name__)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def reply(status: int, body: bytes = b"") -> Reply:
    return Reply(status, httpx.Headers(), body)


def busy(status: int = 503, seconds: str | None = None) -> Reply:
    return reply(status) if seconds is None else Reply(status, httpx.Headers({"Retry-After": seconds}), b"")


def drive(
    outcomes: Sequence[Outcome],
    *,
    retries: int = 5,
    timeout_seconds: float = 30.0,
    takes_seconds: float = 0.0,
    jitter: Callable[[], float] = lambda: 0.5,
    decode: Callable[[Reply], bytes] = lambda answer: answer.body,
) -> tuple[bytes | MoEForwardClientError, list[float]]:
    """Play `outcomes`; returns the end and the wait before each attempt. Every outcome must be asked for."""
    clock = Clock()
    asked = attempts(Call("GET", "/x", timeout_seconds, retries, decode, request_id="id"), clock=clock, jitter=jitter)
    attempt, waits = next(asked), []
    for outcome in outcomes:
        waits.append(attempt.wait_seconds)
        clock.seconds += attempt.wait_seconds + takes_seconds
        last = outcome is outcomes[-1]
        try:
            attempt = asked.send(outcome)
        except StopIteration as done:
            assert last, "it ended before the script did"
            return done.value, waits
        except MoEForwardClientError as error:
            assert last, "it ended before the script did"
            return error, waits
    raise AssertionError("it asks for more than the script has")


@pytest.mark.parametrize(
    "hindrance",
    [
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.WriteError("broken pipe"),
        httpx.RemoteProtocolError("disconnected without a reply"),
        busy(429),
        busy(503),
    ],
    ids=label,
)
def test_lost_connections_and_a_busy_service_are_tried_again(hindrance: Outcome) -> None:
    end, waits = drive([hindrance, hindrance, reply(200, b"ok")])
    assert end == b"ok"
    assert waits == [0.0, 0.025, 0.05]


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (reply(400), RequestRefused),
        (reply(404), RequestRefused),
        (reply(422), RequestRefused),
        (reply(408), DeadlineExceeded),
        (reply(504), DeadlineExceeded),
        (reply(500), ServerFailed),
        (reply(502), ServerFailed),
        (httpx.ReadTimeout("slow"), DeadlineExceeded),
        (httpx.ConnectTimeout("slow"), DeadlineExceeded),
        (httpx.PoolTimeout("slow"), DeadlineExceeded),
        (httpx.LocalProtocolError("bad header"), TransportFailed),
        (httpx.DecodingError("bad gzip"), TransportFailed),
    ],
    ids=label,
)
def test_what_would_come_again_or_took_all_the_time_is_not(outcome: Outcome, kind: type[Exception]) -> None:
    end, _ = drive([outcome])
    assert type(end) is kind


def test_attempts_end_with_the_last_error_and_its_cause() -> None:
    first, last = httpx.ConnectError("first"), httpx.ConnectError("last")
    end, waits = drive([first, first, last], retries=2)
    assert isinstance(end, TransportFailed)
    assert str(end) == "GET /x got no reply (ConnectError: last)"
    assert end.__cause__ is last
    assert end.request_id == "id"
    assert len(waits) == 3


@pytest.mark.parametrize("hindrance", [busy(), httpx.ConnectError("refused")], ids=label)
def test_no_retries_means_one_attempt(hindrance: Outcome) -> None:
    end, waits = drive([hindrance], retries=0)
    assert isinstance(end, (Unavailable, TransportFailed))
    assert waits == [0.0]


def test_retry_after_is_waited_for_and_jitter_comes_on_top() -> None:
    _, waits = drive([busy(503, "2"), busy(429, "7"), reply(200)])
    assert waits == [0.0, 2.025, 7.05]
    _, least = drive([busy(503, "2"), reply(200)], jitter=lambda: 0.0)
    assert least == [0.0, 2.0]


def test_backoff_doubles_up_to_its_limit() -> None:
    _, waits = drive([busy()] * 9 + [reply(200)], retries=20, jitter=lambda: 1.0)
    assert waits == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    end, waits = drive([busy(503, "31")], timeout_seconds=30.0)
    assert isinstance(end, Unavailable)
    assert end.retry_after_seconds == 31.0
    assert waits == [0.0]


def test_attempts_and_waits_together_keep_the_deadline() -> None:
    end, waits = drive([busy(503, "3")] * 3, timeout_seconds=10.0, takes_seconds=1.0, jitter=lambda: 0.0)
    assert isinstance(end, Unavailable)
    assert waits == [0.0, 3.0, 3.0]  # 9 of 10 seconds are gone: 3 more are too many


def test_a_lying_reply_is_not_tried_again_and_names_the_request() -> None:
    def refuse(_: Reply) -> bytes:
        raise TransportFailed("not what was asked for")

    end, _ = drive([reply(200)], decode=refuse)
    assert isinstance(end, TransportFailed)
    assert (end.status, end.request_id) == (200, "id")


def test_the_error_of_a_timeout_names_the_time() -> None:
    end, _ = drive([httpx.ReadTimeout("")], timeout_seconds=1.5)
    assert str(end) == "GET /x did not end within 1.5 s (ReadTimeout)"


def attempt_at(clock: Clock, sends_timeout: bool = True) -> Attempt:
    call = Call("POST", "/x", 5.0, 0, lambda answer: answer, params={"layer": "3"}, sends_timeout=sends_timeout)
    return next(attempts(call, clock=clock))


def test_the_server_is_told_the_time_that_is_left() -> None:
    clock = Clock()
    attempt = attempt_at(clock)
    assert attempt.arguments()["params"] == {"layer": "3", "timeout_ms": "5000"}
    clock.seconds += 4.0
    assert attempt.arguments()["params"]["timeout_ms"] == "1000"
    clock.seconds += 4.0
    assert attempt.arguments()["params"]["timeout_ms"] == "1"
    assert "timeout_ms" not in attempt_at(clock, sends_timeout=False).arguments()["params"]


def test_every_phase_of_an_attempt_gets_what_is_left_of_one_deadline() -> None:
    clock = Clock()
    left = attempt_at(clock).arguments()["extensions"]["timeout"]
    assert isinstance(left, TimeLeft)
    assert left.get("connect") == 5.0
    clock.seconds += 3.0
    assert left.get("read") == 2.0
    clock.seconds += 3.0
    assert 0 < left.get("read") < 0.01


def test_a_body_that_trickles_in_is_given_up_at_the_deadline() -> None:
    clock = Clock()
    attempt = attempt_at(clock)
    attempt.check_deadline()
    clock.seconds += 5.1
    with pytest.raises(httpx.ReadTimeout):
        attempt.check_deadline()
