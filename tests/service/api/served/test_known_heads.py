"""Requests whose head came before, byte by byte, are served like the first one."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from moe_forward.api.heads import Head, Heads

ROWS = 2


def ask(kit: Any, wire: Any, seed: int, *further: str) -> bytes:
    request: bytes = wire.request(kit.body(hidden_states=kit.states(ROWS, seed=seed)))
    head, _, body = request.partition(b"\r\n\r\n")
    return b"\r\n".join((head, *(line.encode() for line in further))) + b"\r\n\r\n" + body


def check(kit: Any, reply: tuple[int, dict[str, str], bytes], seed: int) -> dict[str, str]:
    status, headers, body = reply
    assert status == 200
    assert np.array_equal(kit.output(body), kit.states(ROWS, seed=seed) * 2)
    return headers


def test_every_body_gets_its_own_answer_and_id_on_any_connection(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    served = serve(front)
    ids = set()
    with served.connect() as first, served.connect() as second:
        for seed, connection in enumerate((first, first, second, first, second)):
            connection.sendall(ask(kit, wire, seed))
            ids.add(check(kit, wire.reply(connection), seed)["x-request-id"])
    assert len(ids) == 5
    kit.wait(lambda: front.requests(200) == 5)
    assert {request.layer for request in front.link.requests} == {1}
    front.check_idle()


def test_a_known_head_behind_other_calls_on_the_same_connection(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    with serve(front).connect() as connection:
        for seed in range(3):
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: front\r\n\r\n")
            assert wire.reply(connection)[0] == 200
            connection.sendall(ask(kit, wire, seed))
            check(kit, wire.reply(connection), seed)


def test_known_heads_in_one_read_are_answered_in_order(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    with serve(front).connect() as connection:
        connection.sendall(ask(kit, wire, 0))
        check(kit, wire.reply(connection), 0)
        connection.sendall(b"".join(ask(kit, wire, seed) for seed in (1, 2, 3)))
        data = b""
        while data.count(b"HTTP/1.1 200") < 3 or len(data) < 3 * ROWS * kit.hidden * 4:
            data += connection.recv(65536)
        _, *replies = data.split(b"HTTP/1.1 200 OK\r\n")
        for seed, reply in enumerate(replies, start=1):
            assert np.array_equal(kit.output(reply.partition(b"\r\n\r\n")[2]), kit.states(ROWS, seed=seed) * 2)


def test_a_known_head_that_asks_to_close_closes_every_time(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    served = serve(front)
    for seed in range(3):
        with served.connect() as connection:
            connection.sendall(ask(kit, wire, seed, "Connection: close"))
            assert check(kit, wire.reply(connection), seed)["connection"] == "close"
            assert wire.closed(connection)


def test_a_known_head_that_waits_for_100_continue_is_told_every_time(
    front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    with serve(front).connect() as connection:
        for seed in range(3):
            head, _, body = ask(kit, wire, seed, "Expect: 100-continue").partition(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
            assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            check(kit, wire.reply(connection), seed)


def test_an_id_in_a_known_head_is_the_reply_s(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    with serve(front).connect() as connection:
        for seed in range(3):
            connection.sendall(ask(kit, wire, seed, "X-Request-Id: mine"))
            assert check(kit, wire.reply(connection), seed)["x-request-id"] == "mine"


@pytest.mark.parametrize(("line", "status"), [("Content-Encoding: gzip", 415), ("Layer: none", 400)])
def test_what_was_refused_is_refused_again(front: Any, kit: Any, serve: Any, wire: Any, line: str, status: int) -> None:
    with serve(front).connect() as connection:
        for seed in range(3):
            connection.sendall(ask(kit, wire, seed, line))
            assert wire.reply(connection)[0] == status
            connection.sendall(ask(kit, wire, seed))
            check(kit, wire.reply(connection), seed)


def test_a_key_that_was_taken_back_is_refused_in_a_known_head(
    make_front: Any, kit: Any, serve: Any, wire: Any, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a:0123456789abcdef\nb:fedcba9876543210\n")
    front = make_front(api_keys_file=keys)
    with serve(front).connect() as connection:
        for seed in range(2):
            connection.sendall(ask(kit, wire, seed, "X-API-Key: 0123456789abcdef"))
            check(kit, wire.reply(connection), seed)
        keys.write_text("b:fedcba9876543210\n")

        def refused() -> bool:
            connection.sendall(ask(kit, wire, 2, "X-API-Key: 0123456789abcdef"))
            status: int = wire.reply(connection)[0]
            assert status in (200, 401)
            return status == 401

        kit.wait(refused)


def test_a_known_head_is_refused_while_draining(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    with serve(front).connect() as connection:
        connection.sendall(ask(kit, wire, 0))
        check(kit, wire.reply(connection), 0)
        front.app.state.drain()
        connection.sendall(ask(kit, wire, 1))
        assert wire.reply(connection)[0] == 503


def test_nothing_of_a_connection_is_kept_with_its_head(
    front: Any, kit: Any, serve: Any, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Head] = []
    monkeypatch.setattr(Heads, "keep", lambda heads, text, head: kept.append(head))
    with serve(front).connect() as connection:
        connection.sendall(ask(kit, wire, 0))
        check(kit, wire.reply(connection), 0)
    (head,) = kept
    assert head.scope.keys() == {
        *("type", "asgi", "http_version", "method", "root_path", "path", "raw_path", "query_string", "headers")
    }
    assert len(head.notes) == 1


LINES = (
    "Host: front",
    "Host: other",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Transfer-Encoding: chunked",
    "Content-Length: 7",
    "content-length: 07",
    "Expect: 100-continue",
    "X-Request-Id: mine",
    "X-Request-Id: not\tmine",
    "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "Content-Encoding: identity",
    "Content-Encoding: br",
    "Layer: 2",
    "X-Moe-Timeout-Ms: 5000",
    "X-Odd: caf\u00e9",
    "X-Empty:",
    "Bad Header: 1",
)
TARGETS = (
    "/v1/moe/forward?layer=1",
    "/v1/moe/forward",
    "/v1/moe%2Fforward?layer=1",
    "http://front/v1/moe/forward?layer=1",
)


def any_head(random: Random, length: int) -> bytes:
    """A head that may be fine, odd or wrong in several ways."""
    method = random.choices(("POST", "PUT", "GET", "HEAD"), (12, 1, 1, 1))[0]
    version = random.choices(("HTTP/1.1", "HTTP/1.0"), (8, 1))[0]
    lines = [f"{method} {random.choice(TARGETS)} {version}", "Content-Type: application/vnd.safetensors"]
    lines += [f"Content-Length: {length}"] * random.choices((1, 2, 0), (12, 1, 1))[0]
    lines += random.sample(LINES, random.choice((0, 0, 1, 1, 2, 3)))
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n"


def exchange(served: Any, head: bytes, body: bytes, times: int) -> bytes:
    """What comes back when a request is sent several times on one connection, without what is new in every reply."""
    last = b"GET /v2/health/live HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n"
    data = b""
    with served.connect() as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(0.3)  # of those that wait for more
        connection.sendall((head + body) * times + last)
        with contextlib.suppress(TimeoutError):
            while received := connection.recv(65536):
                data += received
            data += b"closed"
    return re.sub(rb"[0-9a-f]{32}|dur=[0-9.]+|date: [^\r]+", b"", data)


def test_any_head_is_answered_as_by_a_server_that_remembers_none(
    make_front: Any, kit: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembering = serve(make_front())
    kept: list[bytes] = []
    keep = Heads.keep

    def note(heads: Heads, text: bytes, head: Head) -> None:
        kept.append(text)
        keep(heads, text, head)

    monkeypatch.setattr(Heads, "keep", note)
    random = Random(7)
    body = kit.body(hidden_states=kit.states(1))
    requests = [(any_head(random, len(body)), 1 + number % 3) for number in range(150)]
    remembered = []
    for head, times in requests:
        exchange(remembering, head, body, 1)
        remembered.append(exchange(remembering, head, body, times))
    monkeypatch.setattr(Heads, "keep", lambda heads, text, head: None)
    forgetful = serve(make_front())
    for (head, times), reply in zip(requests, remembered, strict=True):
        assert exchange(forgetful, head, body, times) == reply, head
    assert len(set(kept)) > 20
