"""Bodies that go from the socket into the slab, and replies that go from there, on a real server."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import socket
import ssl
import time
from typing import Any

import numpy as np
import pytest
import trustme

from moe_forward.api.direct import DirectPeer

ROWS = 300  # 307 kB: more than a connection's buffer, and than one read


def ask(kit: Any, wire: Any, states: np.ndarray) -> bytes:
    request: bytes = wire.request(kit.body(hidden_states=states))
    return request


def take(kit: Any, reply: tuple[int, dict[str, str], bytes]) -> np.ndarray:
    assert reply[0] == 200
    output: np.ndarray = kit.output(reply[2])
    return output


class Reader:
    """Reads replies that follow each other on one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = b""

    def reply(self) -> tuple[int, bytes]:
        head, rest = self._until(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        while len(rest) < length:
            rest += self._more()
        self._data = rest[length:]
        return int(head.split()[1]), rest[:length]

    def _until(self, mark: bytes) -> tuple[bytes, bytes]:
        while mark not in self._data:
            self._data += self._more()
        head, _, rest = self._data.partition(mark)
        return head, rest

    def _more(self) -> bytes:
        received = self._connection.recv(1 << 20)
        assert received, "closed inside a reply"
        return received


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_large_body_and_its_reply_keep_their_bits(front: Any, kit: Any, serve: Any, wire: Any, loop: str) -> None:
    states = kit.states(ROWS)
    with serve(front, loop=loop).connect() as connection:
        for _ in range(3):
            connection.sendall(ask(kit, wire, states))
            assert np.array_equal(take(kit, wire.reply(connection)), states * 2)
    kit.wait(lambda: front.requests(200) == 3)
    front.check_idle()


def test_bits_are_kept_under_tls(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    states = kit.states(ROWS)
    with (
        serve(front, tls=server).connect() as plain,
        client.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        for _ in range(3):
            connection.sendall(ask(kit, wire, states))
            assert np.array_equal(take(kit, wire.reply(connection)), states * 2)
    kit.wait(lambda: front.requests(200) == 3)
    front.check_idle()


def test_it_does_not_matter_where_a_request_is_cut(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    states = kit.states(2)
    request = ask(kit, wire, states)
    end = request.index(b"\r\n\r\n")
    with serve(front).connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in (1, end, end + 1, end + 2, end + 3, end + 4, end + 5, len(request) - 1):
            connection.sendall(request[:cut])
            time.sleep(0.01)  # so that it comes as two reads
            connection.sendall(request[cut:])
            assert np.array_equal(take(kit, wire.reply(connection)), states * 2)
    kit.wait(lambda: front.requests(200) == 8)
    front.check_idle()


def test_large_pipelined_requests_wait_their_turn_and_are_answered_in_order(
    make_front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    front = make_front(slab_bytes=8 << 20)
    front.link.gate.clear()
    batches = [kit.states(rows, seed=rows) for rows in (1, ROWS, 3, ROWS + 1, 2)]
    with serve(front).connect() as connection:
        for states in batches:
            connection.sendall(ask(kit, wire, states))
        kit.wait(lambda: front.link.inflight == 1)
        time.sleep(0.05)
        assert len(front.link.requests) == 1
        front.link.gate.set()
        reader = Reader(connection)
        for states in batches:
            status, body = reader.reply()
            assert status == 200
            assert np.array_equal(kit.output(body), states * 2)
    kit.wait(lambda: front.requests(200) == len(batches))
    front.check_idle()


def test_a_slow_reader_of_the_first_of_two_pipelined_replies_gets_both_right(
    make_front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    front = make_front(slab_bytes=4 << 20)
    first, second = kit.states(700, seed=1), kit.states(700, seed=2)
    served = serve(front, send_buffer_bytes=16 * 1024)
    with served.connect(receive_buffer_bytes=16 * 1024) as slow, served.connect() as other:
        slow.sendall(ask(kit, wire, first) + ask(kit, wire, second))
        for seed in range(3, 7):  # their memory is what the first reply's was, once that is free
            states = kit.states(700, seed=seed)
            other.sendall(ask(kit, wire, states))
            assert np.array_equal(take(kit, wire.reply(other)), states * 2)
        reader = Reader(slow)
        for states in (first, second):
            assert np.array_equal(kit.output(reader.reply()[1]), states * 2)
    kit.wait(lambda: front.link.slab.taken_bytes == 0)


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    states = kit.states(ROWS)
    head, _, body = ask(kit, wire, states).partition(b"\r\n\r\n")
    with serve(front).connect() as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert np.array_equal(take(kit, wire.reply(connection)), states * 2)


def test_a_refused_body_is_read_and_forgotten_and_the_next_request_is_served(
    front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    states = kit.states(ROWS)
    request = ask(kit, wire, states)
    refused = request.replace(b"vnd.safetensors", b"nd.safetensorss", 1)
    with serve(front).connect() as connection:
        connection.sendall(refused + request)
        reader = Reader(connection)
        assert reader.reply()[0] == 415
        assert np.array_equal(kit.output(reader.reply()[1]), states * 2)


def test_memory_of_a_body_that_took_too_long_is_not_written_to_any_more(
    make_front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    front = make_front(body_timeout_seconds=0.1)
    request = ask(kit, wire, kit.states(ROWS))
    with serve(front).connect() as connection:
        connection.sendall(request[: len(request) // 2])
        status, _, body = wire.reply(connection)
        assert (status, json.loads(body)["code"]) == (408, "body_timeout")
        kit.wait(lambda: front.link.slab.taken_bytes == 0)
        extent = front.link.slab.allocate(len(request))  # where the body was
        view = front.link.slab.view(extent.offset, extent.nbytes)
        view[:] = bytes(extent.nbytes)
        with contextlib.suppress(ConnectionError):
            connection.sendall(request[len(request) // 2 :])
        assert wire.closed(connection)
        assert not np.frombuffer(view, np.uint8).any()


def test_a_client_that_leaves_is_noticed_behind_a_second_request_and_is_no_error(
    front: Any, kit: Any, serve: Any, wire: Any, caplog: pytest.LogCaptureFixture
) -> None:
    front.link.gate.clear()
    with serve(front).connect() as connection:
        connection.sendall(ask(kit, wire, kit.states(1)) * 2)
        kit.wait(lambda: front.link.inflight == 1)
    kit.wait(lambda: front.link.cancelled == [1])
    front.link.gate.set()
    kit.wait(lambda: front.link.slab.taken_bytes == 0)
    kit.wait(lambda: front.requests(499) == 1)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_no_request_waits_for_the_garbage_collector(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    """It stops the process, for longer the more there is to look through."""

    def remembered() -> int:
        return sum(type(thing) is DirectPeer for thing in gc.get_objects())

    narrow = np.ascontiguousarray(kit.states(2)[:, :-1])
    gc.collect()
    gc.disable()
    try:
        with serve(front).connect() as connection:
            before = remembered()
            for states, status in [(kit.states(2), 200), (narrow, 400)] * 20:
                connection.sendall(ask(kit, wire, states))
                assert wire.reply(connection)[0] == status
            kit.wait(lambda: remembered() <= before + 1)
    finally:
        gc.enable()
