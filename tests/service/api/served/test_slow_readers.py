"""Replies must not change while they wait to be read (uvloop keeps a pointer to what it was given)."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np

FORWARD = "/v1/moe/forward"


def test_a_slow_reader_never_sees_bytes_of_requests_that_reuse_its_memory(
    make_front: Any, kit: Any, serve: Any, wire: Any
) -> None:
    tokens = 700  # 717 kB in and out; memory freed too early would be the first to be taken again
    front = make_front(slab_bytes=4 << 20)
    served = serve(front, send_buffer_bytes=16 * 1024)
    mine = kit.states(tokens, seed=1)
    with httpx.Client(base_url=served.url) as others:
        for turn in range(2):
            with served.connect(receive_buffer_bytes=16 * 1024) as reader:
                reader.sendall(wire.request(kit.body(hidden_states=mine)))
                kit.wait(lambda turn=turn: len(front.link.requests) == 4 * turn + 1 and front.link.inflight == 0)
                for seed in range(2, 5):
                    states = kit.states(tokens, seed=seed)
                    body = kit.body(hidden_states=states)
                    reply = others.post(FORWARD, params={"layer": 1}, content=body, headers=kit.headers)
                    assert reply.status_code == 200
                    assert np.array_equal(kit.output(reply.content), states * 2)
                status, _, body = wire.reply(reader)
                assert status == 200
                assert np.array_equal(kit.output(body), mine * 2)
    kit.wait(lambda: front.link.slab.taken_bytes == 0)


def test_a_reply_that_waits_for_its_reader_holds_no_memory(make_front: Any, kit: Any, serve: Any, wire: Any) -> None:
    front = make_front(slab_bytes=1 << 20)
    served = serve(front, send_buffer_bytes=8 * 1024)
    mine, rows = kit.states(250, seed=1), [kit.states(250, seed=seed) for seed in range(2, 8)]
    with served.connect(receive_buffer_bytes=4 * 1024) as reader, httpx.Client(base_url=served.url) as others:
        reader.sendall(wire.request(kit.body(hidden_states=mine)))  # one chunk: copied as soon as it is there
        kit.wait(lambda: len(front.link.requests) == 1 and front.link.slab.taken_bytes == 0)
        for states in rows:  # 256 kB in and out, over the bytes that the unread reply came from
            body = kit.body(hidden_states=states)
            reply = others.post(FORWARD, params={"layer": 1}, content=body, headers=kit.headers)
            assert np.array_equal(kit.output(reply.content), states * 2)
        _, _, body = wire.reply(reader)
        assert np.array_equal(kit.output(body), mine * 2)


def test_a_reader_that_stops_for_good_is_hung_up_on(make_front: Any, kit: Any, serve: Any, wire: Any) -> None:
    front = make_front(body_timeout_seconds=0.1)
    served = serve(front, send_buffer_bytes=8 * 1024)
    with served.connect(receive_buffer_bytes=4 * 1024) as reader:
        reader.sendall(wire.request(kit.body(hidden_states=kit.states(1000))))
        kit.wait(lambda: front.requests(499) == 1)
        assert front.link.slab.taken_bytes == 0
