"""Requests whose head came before, byte by byte, are served like the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
