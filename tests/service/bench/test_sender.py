"""The raw HTTP of the load against a real socket: what it sends, and what it makes of replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from moe_forward.bench.sender import BUFFER_BYTES, Answer, Request, Sender, server_timing
from moe_forward.bench.target import parse_target

KIND = "Content-Type: application/vnd.safetensors\r\n"


def ask(service: Any, times: int = 1, pause_seconds: float = 0.0, timeout_seconds: float = 5.0) -> list[Answer]:
    async def run() -> list[Answer]:
        target = parse_target(service.url, None, None)
        sender = Sender(target, None, memoryview(bytearray(BUFFER_BYTES)), timeout_seconds)
        answers = []
        for _ in range(times):
            body = bytes(100)
            answers.append(await sender.ask(Request(1, target.head("/v1/moe/forward?layer=3", 100), body, 100)))
            await asyncio.sleep(pause_seconds)
        sender.close()
        return answers

    return asyncio.run(run())


def test_a_connection_is_kept_and_bytes_and_server_times_are_read(service: Any) -> None:
    began_ns = time.monotonic_ns()
    answers = ask(service, times=3)
    for answer in answers:
        assert (answer.status, answer.code, answer.received_bytes) == (200, "", 100)
        assert (answer.queue_ns, answer.step_ns) == (500_000, 1_250_000)
        assert began_ns < answer.ended_ns <= time.monotonic_ns()
    assert service.connections == 1
    assert service.heads[0].splitlines()[:3] == [
        "POST /v1/moe/forward?layer=3 HTTP/1.1",
        f"Host: {service.url.removeprefix('http://')}",
        "Content-Type: application/vnd.safetensors",
    ]


def test_a_large_reply_in_many_pieces_is_whole(service: Any, as_output: Any) -> None:
    service.reply = lambda number: as_output(bytes(3 * BUFFER_BYTES + 7))
    assert [answer.received_bytes for answer in ask(service, times=2)] == [3 * BUFFER_BYTES + 7] * 2
    assert service.connections == 1


def test_a_chunked_reply_is_read(service: Any) -> None:
    service.reply = lambda number: (
        b"HTTP/1.1 200 OK\r\n" + KIND.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
        b"3c\r\n" + bytes(60) + b"\r\n28\r\n" + bytes(40) + b"\r\n0\r\n\r\n"
    )
    assert [(answer.code, answer.received_bytes) for answer in ask(service, times=2)] == [("", 100)] * 2


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (b"HTTP/1.1 200 OK\r\n" + KIND.encode() + b"Content-Length: 99\r\n\r\n" + bytes(99), "bad_reply"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100\r\n\r\n" + bytes(100), "bad_reply"),
        (b"HTTP/1.1 200 OK\r\n" + KIND.encode() + b"Content-Length: 100\r\n\r\n" + bytes(101), "bad_reply"),
        (b"SSH-2.0-OpenSSH\r\n", "bad_reply"),
        (b'HTTP/1.1 422 X\r\nContent-Length: 21\r\n\r\n{"code":"non_finite"}', "non_finite"),
        (b"HTTP/1.1 502 X\r\nContent-Length: 3\r\n\r\nbad", "http_502"),
        (b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n[]", "http_500"),
    ],
)
def test_a_reply_without_an_output_is_named(service: Any, reply: bytes, code: str) -> None:
    service.reply = lambda number: reply
    (answer,) = ask(service)
    assert answer.code == code


def test_retry_after_is_told(service: Any, refusal: Any) -> None:
    service.refusals = [refusal(429, "queue_full", "Retry-After: 2\r\n")]
    (answer,) = ask(service)
    assert (answer.status, answer.code, answer.retry_after_seconds) == (429, "queue_full", 2.0)


def test_a_connection_that_the_server_closes_is_opened_again(service: Any, as_output: Callable[..., bytes]) -> None:
    closing = as_output(bytes(100)).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    service.reply = lambda number: closing
    assert [answer.code for answer in ask(service, times=3)] == ["", "", ""]
    assert service.connections == 3


def test_a_reply_that_does_not_come_is_a_timeout_and_its_connection_is_given_up(service: Any) -> None:
    service.delay_seconds = 0.5
    answers = ask(service, times=2, timeout_seconds=0.15)
    assert [answer.code for answer in answers] == ["timeout", "timeout"]
    assert service.connections == 2


def test_nobody_there_is_said(service: Any) -> None:
    class Nobody:
        url = "http://127.0.0.1:1"

    (answer,) = ask(Nobody())
    assert (answer.status, answer.code) == (0, "connect_failed")


@pytest.mark.parametrize(
    ("value", "times"),
    [
        (b"", (None, None)),
        (b"queue;dur=0.125, step;dur=3.1", (125_000, 3_100_000)),
        (b'cdn;desc="x";dur=1, step; dur=2', (None, 2_000_000)),
        (b"queue;dur=soon,step;dur=1", (None, 1_000_000)),
    ],
)
def test_server_timing_is_read_as_the_standard_writes_it(value: bytes, times: tuple[int | None, int | None]) -> None:
    assert server_timing(value) == times


def test_a_url_is_taken_apart() -> None:
    plain = parse_target("http://moe.test", "k-1", None)
    assert (plain.host, plain.port, plain.tls, plain.prefix, plain.authority) == ("moe.test", 80, False, "", "moe.test")
    assert b"\r\nAuthorization: Bearer k-1\r\n\r\n" in plain.head("/x", 1)
    assert "k-1" not in repr(plain)
    far = parse_target("https://[::1]:8443/moe/", None, None)
    assert (far.host, far.port, far.tls, far.authority) == ("::1", 8443, True, "[::1]:8443")
    assert far.head("/v1", 3).startswith(b"POST /moe/v1 HTTP/1.1\r\nHost: [::1]:8443\r\n")


@pytest.mark.parametrize("url", ["moe.test:80", "ftp://moe.test", "http://", "http://x:port", "http://x?a=1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL must be"):
        parse_target(url, None, None)
