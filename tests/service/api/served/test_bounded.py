"""What a client may hold without a request, and how what is no HTTP is answered."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from moe_forward.api import listening

GET = b"GET /v2/health/live HTTP/1.1\r\nHost: front\r\n\r\n"


def refused(wire: Any, connection: socket.socket) -> tuple[int, str]:
    """Read an error of the common form after which the connection closes: (status, code)."""
    status, headers, body = wire.reply(connection)
    document = json.loads(body)
    assert set(document) == {"error", "code", "request_id"}
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == document["request_id"]
    assert headers["connection"] == "close"
    assert wire.closed(connection)
    return status, document["code"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"rubbish\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/moe/forward?layer=1 HTTP/1.1\r\nHost: front\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/moe/forward?layer=1 HTTP/1.1\r\nHost: front\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: front\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: front\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : front\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: front\r\n folded: header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: fr\x00nt\r\n\r\n",
        b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: front\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: front\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_400_in_the_form_of_all_errors(
    front: Any, serve: Callable[..., Any], wire: Any, request_bytes: bytes
) -> None:
    with serve(front).connect() as connection:
        connection.sendall(request_bytes)
        assert refused(wire, connection) == (400, "malformed_request")


def test_garbage_after_a_request_never_takes_the_place_of_its_reply(
    front: Any, kit: Any, serve: Callable[..., Any], wire: Any
) -> None:
    front.link.gate.clear()
    states = kit.states(3)
    with serve(front).connect() as connection:
        connection.sendall(wire.request(kit.body(hidden_states=states)) + b"rubbish\r\n\r\n")
        kit.wait(lambda: front.link.inflight == 1)
        front.link.gate.set()
        status, _, body = wire.reply(connection)
        assert status == 200
        assert np.array_equal(kit.output(body), states * 2)
        assert wire.closed(connection)
    kit.wait(lambda: front.requests(200) == 1)
    front.check_idle()


def test_a_broken_body_behind_an_unanswered_request_closes_without_a_word(
    front: Any, kit: Any, serve: Callable[..., Any], wire: Any
) -> None:
    front.link.gate.clear()
    broken = b"POST /x HTTP/1.1\r\nHost: front\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with serve(front).connect() as connection:
        connection.sendall(wire.request(kit.body(hidden_states=kit.states(3))) + broken)
        assert wire.closed(connection)
    front.link.gate.set()
    kit.wait(lambda: front.link.slab.taken_bytes == 0)


@pytest.mark.parametrize(
    "headers",
    [
        b"X-Large: " + b"x" * 2000 + b"\r\n\r\n",
        b"X-Endless: " + b"x" * 200_000,
        b"".join(b"X-%d: x\r\n" % number for number in range(300)),
        b"".join(b"X-%d: x\r\n" % number for number in range(300)) + b"\r\n",
    ],
    ids=["one", "one without an end", "many without an end", "many"],
)
def test_too_many_bytes_of_headers_are_431(
    make_front: Any, serve: Callable[..., Any], wire: Any, headers: bytes
) -> None:
    with serve(make_front(max_header_bytes=1024)).connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: front\r\n" + headers)
        assert refused(wire, connection) == (431, "headers_too_large")


def test_a_long_request_line_is_431_too(make_front: Any, serve: Callable[..., Any], wire: Any) -> None:
    with serve(make_front(max_header_bytes=1024)).connect() as connection:
        connection.sendall(b"GET /v2?" + b"x" * 1100)
        assert refused(wire, connection) == (431, "headers_too_large")


def test_headers_that_just_fit_and_follow_large_bodies_are_taken(
    make_front: Any, kit: Any, serve: Callable[..., Any], wire: Any
) -> None:
    front = make_front(max_header_bytes=1024)
    request = wire.request(kit.body(hidden_states=kit.states(200)))
    long = GET[:-2] + b"X-Long: " + b"x" * 900 + b"\r\n\r\n"
    with serve(front).connect() as connection:
        for cut in (10, 60, 500):
            connection.sendall(request + long[:cut])  # a head that begins in the read in which a body ends
            assert wire.reply(connection)[0] == 200
            connection.sendall(long[cut:])
            assert wire.reply(connection)[0] == 200
    kit.wait(lambda: front.requests(200) == 3)
    front.check_idle()


def test_headers_that_trickle_in_are_408(make_front: Any, serve: Callable[..., Any], wire: Any) -> None:
    with serve(make_front(header_timeout_seconds=0.3)).connect() as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /v2 HTTP/1.1\r\nHost: front\r\nX-Slow: xxxxxxxxxxxxxxxxxxxxxx":
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        assert refused(wire, connection) == (408, "header_timeout")
        assert time.monotonic() - started < 5.0


def test_a_second_request_has_the_same_time_for_its_headers(
    make_front: Any, serve: Callable[..., Any], wire: Any
) -> None:
    with serve(make_front(header_timeout_seconds=0.3)).connect() as connection:
        for _ in range(3):
            connection.sendall(GET)
            assert wire.reply(connection)[0] == 200
            time.sleep(0.2)
        connection.sendall(GET[:20])
        assert refused(wire, connection) == (408, "header_timeout")


@pytest.mark.parametrize("sent", [b"", b"\r\n"], ids=["nothing", "empty lines"])
def test_a_connection_without_a_request_is_closed(
    make_front: Any, serve: Callable[..., Any], wire: Any, sent: bytes
) -> None:
    with serve(make_front(header_timeout_seconds=0.2)).connect() as connection:
        connection.sendall(sent)
        assert wire.closed(connection)


def test_a_connection_at_rest_is_closed_after_keep_alive_seconds(
    make_front: Any, serve: Callable[..., Any], wire: Any
) -> None:
    with serve(make_front(keep_alive_seconds=1, header_timeout_seconds=60.0)).connect() as connection:
        connection.sendall(GET)
        wire.reply(connection)
        started = time.monotonic()
        assert wire.closed(connection)
        assert 0.5 < time.monotonic() - started < 5.0


def test_the_rest_of_a_refused_body_has_body_timeout_seconds(
    make_front: Any, serve: Callable[..., Any], wire: Any
) -> None:
    front = make_front(max_body_bytes=1024, body_timeout_seconds=0.4)
    with serve(front).connect() as connection:
        connection.sendall(wire.request(b"", length=1 << 30))
        assert wire.reply(connection)[0] == 413
        connection.settimeout(0.05)
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 5.0:
                connection.sendall(b"x" * 100)  # never silent, never done
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(1) == b""
                    break
        assert 0.2 < time.monotonic() - started < 4.0


def test_waiting_for_the_engine_is_no_slow_client(
    make_front: Any, kit: Any, serve: Callable[..., Any], wire: Any
) -> None:
    front = make_front(header_timeout_seconds=0.1, keep_alive_seconds=1)
    front.link.gate.clear()
    with serve(front).connect() as connection:
        connection.sendall(wire.request(kit.body(hidden_states=kit.states(2))))
        time.sleep(1.3)
        front.link.gate.set()
        assert wire.reply(connection)[0] == 200


def test_one_connection_too_many_is_503_and_room_comes_back(
    make_front: Any, kit: Any, serve: Callable[..., Any], wire: Any
) -> None:
    served = serve(make_front(max_connections=3))
    with contextlib.ExitStack() as held:
        connections = [held.enter_context(served.connect()) for _ in range(3)]
        for connection in connections:
            connection.sendall(GET)
            assert wire.reply(connection)[0] == 200
        with served.connect() as one_more:
            assert refused(wire, one_more) == (503, "too_many_connections")
        connections[0].close()
        kit.wait(lambda: httpx.get(f"{served.url}/v2/health/live").status_code == 200)


def test_a_thousand_idle_connections_take_no_time_from_others(front: Any, kit: Any, serve: Callable[..., Any]) -> None:
    served = serve(front)
    with contextlib.ExitStack() as held:
        for _ in range(1000):
            held.enter_context(served.connect())
        with httpx.Client(base_url=served.url) as client:
            for _ in range(5):
                body = kit.body(hidden_states=kit.states(4))
                reply = client.post("/v1/moe/forward", params={"layer": 1}, content=body, headers=kit.headers)
                assert reply.status_code == 200
    kit.wait(lambda: front.requests(200) == 5)
    front.check_idle()


def test_accepted_connections_notice_a_client_that_is_gone() -> None:
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            found = [accepted.getsockopt(socket.IPPROTO_TCP, option) for option in options]
    assert found == [30, 10, 3, 60_000]


def test_replies_do_not_name_the_server_software(front: Any, serve: Callable[..., Any]) -> None:
    assert "server" not in httpx.get(f"{serve(front).url}/v2/health/live").headers
