"""Through a real uvicorn (uvloop, httptools) and real sockets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np

FORWARD = "/v1/moe/forward"


def test_keep_alive_serves_many_requests_on_one_connection(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    with serve(front).connect() as connection:
        for tokens in (1, 7, 300, 2):  # 300 rows make a reply of more than one chunk
            states = kit.states(tokens, seed=tokens)
            connection.sendall(wire.request(kit.body(hidden_states=states)))
            status, _, body = wire.reply(connection)
            assert status == 200
            assert np.array_equal(kit.output(body), states * 2)
    kit.wait(lambda: front.requests(200) == 4)
    front.check_idle()


def test_pipelined_requests_are_answered_in_order(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    batches = [kit.states(3, seed=seed) for seed in range(4)]
    with serve(front).connect() as connection:
        connection.sendall(b"".join(wire.request(kit.body(hidden_states=states)) for states in batches))
        received = b""
        replies: list[np.ndarray] = []
        while len(replies) < len(batches):
            head, mark, rest = received.partition(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
            if mark and len(rest) >= length:
                replies.append(kit.output(rest[:length]))
                received = rest[length:]
            else:
                received += connection.recv(65536)
    assert all(np.array_equal(reply, states * 2) for reply, states in zip(replies, batches, strict=True))


def test_a_body_cut_off_by_the_client_frees_its_memory(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    with serve(front).connect() as connection:
        connection.sendall(wire.request(b"x" * 1000, length=5000))
        kit.wait(lambda: front.link.slab.taken_bytes > 0)
    kit.wait(lambda: front.requests(499) == 1)
    front.check_idle()


def test_a_body_slower_than_the_timeout_is_408_and_the_connection_closes(
    make_front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    front = make_front(body_timeout_seconds=0.05)
    with serve(front).connect() as connection:
        connection.sendall(wire.request(b"x" * 1000, length=5000))
        status, headers, body = wire.reply(connection)
        assert status == 408
        assert headers["connection"] == "close"
        assert b"got 1000" in body
        assert wire.closed(connection)
    front.check_idle()


def test_more_bytes_than_announced_are_not_part_of_the_request(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    states = kit.states(1)
    body = kit.body(hidden_states=states)
    with serve(front).connect() as connection:
        connection.sendall(wire.request(body + b"smuggled rubbish\r\n\r\n", length=len(body)))
        status, _, reply = wire.reply(connection)
        if status == 200:  # the server may see the rubbish first
            assert np.array_equal(
                kit.output(reply[: int.from_bytes(reply[:8], "little") + 8 + states.nbytes]), states * 2
            )
        else:
            assert status == 400
        assert not front.link.requests or front.link.requests[0].tokens == 1
    kit.wait(lambda: front.link.slab.taken_bytes == 0)


def test_chunked_transfer_is_411(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    served = serve(front)
    with httpx.Client(base_url=served.url) as client:
        reply = client.post(FORWARD, content=iter([b"abc", b"def"]), headers=kit.headers)
        assert (reply.status_code, reply.json()["code"]) == (411, "length_required")
        states = kit.states(1)  # and the connection is still good
        body = kit.body(hidden_states=states)
        assert client.post(FORWARD, params={"layer": 1}, content=body, headers=kit.headers).status_code == 200
    kit.wait(lambda: front.requests(200) == 1)
    front.check_idle()


def test_413_comes_before_the_body_is_sent(make_front: Any, kit: Any, serve: Any, wire: Any) -> None:
    front = make_front(max_body_bytes=1024)
    with serve(front).connect() as connection:
        connection.sendall(wire.request(b"", length=1 << 40))
        status, _, body = wire.reply(connection)
        assert status == 413
        assert b"at most 1024 bytes" in body
    kit.wait(lambda: front.requests(413) == 1)
    front.check_idle()


def test_413_reaches_a_client_that_sends_its_whole_body_first(make_front: Any, kit: Any, serve: Any, wire: Any) -> None:
    front = make_front(max_body_bytes=1024)
    with httpx.Client(base_url=serve(front).url) as client:
        for _ in range(2):
            reply = client.post(FORWARD, content=b"x" * (3 << 20), headers=kit.headers)
            assert (reply.status_code, reply.json()["code"]) == (413, "too_large")


def test_a_refused_client_waiting_for_100_continue_sends_nothing(
    make_front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    front = make_front(max_body_bytes=1024)
    with serve(front).connect() as connection:
        request = wire.request(b"", length=4096).replace(b"Host:", b"Expect: 100-continue\r\nHost:")
        connection.sendall(request)
        assert wire.reply(connection)[0] == 413


def test_a_client_that_hangs_up_while_waiting_is_noticed(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    front.link.gate.clear()
    served = serve(front)
    with served.connect() as connection:
        connection.sendall(wire.request(kit.body(hidden_states=kit.states(2))))
        kit.wait(lambda: front.link.inflight == 1)
    kit.wait(lambda: front.link.cancelled == [1])
    assert front.link.slab.taken_bytes > 0  # the engine may still write there
    front.link.gate.set()
    kit.wait(lambda: front.link.slab.taken_bytes == 0)
    assert front.requests(499) == 1


def test_concurrent_requests_get_their_own_answers(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    served = serve(front)
    sizes = [1, 400, 3, 64, 300, 2, 17, 128]

    def work(worker: int) -> None:
        with httpx.Client(base_url=served.url) as client:
            for turn in range(6):
                states = kit.states(sizes[(worker + turn) % len(sizes)], seed=worker * 100 + turn)
                body = kit.body(hidden_states=states)
                reply = client.post(FORWARD, params={"layer": 1}, content=body, headers=kit.headers)
                assert reply.status_code in (200, 429)
                if reply.status_code == 200:
                    assert np.array_equal(kit.output(reply.content), states * 2)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, worker) for worker in range(8)]:
            done.result()
    kit.wait(lambda: front.requests(200) + front.requests(429) == 48)
    assert front.requests(200) >= 8
    front.check_idle()


def test_what_is_in_flight_finishes_while_draining(front: Any, kit: Any, serve: Any, wire: Any) -> None:
    served = serve(front)
    front.link.gate.clear()
    states = kit.states(2)
    replies: list[httpx.Response] = []

    def call() -> None:
        body = kit.body(hidden_states=states)
        replies.append(httpx.post(f"{served.url}{FORWARD}", params={"layer": 1}, content=body, headers=kit.headers))

    caller = threading.Thread(target=call)
    caller.start()
    kit.wait(lambda: front.link.inflight == 1)
    drained = httpx.post(f"{served.url}/v1/drain", headers={"authorization": f"Bearer {kit.token}"})
    assert drained.json() == {"draining": True, "inflight_requests": 1}
    refused = httpx.post(f"{served.url}{FORWARD}", content=b"x", headers=kit.headers)
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    front.link.gate.set()
    caller.join(5.0)
    assert np.array_equal(kit.output(replies[0].content), states * 2)
    kit.wait(lambda: front.app.state.availability.inflight == 0)
    front.check_idle()
