"""Both clients against a real server on the loopback: keep-alive, lost connections, and time."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from moe_forward.client import Client, DeadlineExceeded, TransportFailed

HIDDEN = np.arange(8, dtype=np.float32).reshape(2, 4)
BODY = save({"output": HIDDEN * 2})


def start_reply(exchange: BaseHTTPRequestHandler) -> None:
    exchange.send_response(200)
    exchange.send_header("content-type", "application/vnd.safetensors")
    exchange.send_header("content-length", str(len(BODY)))
    exchange.end_headers()


def answer(exchange: BaseHTTPRequestHandler) -> None:
    start_reply(exchange)
    exchange.wfile.write(BODY)


def drop(exchange: BaseHTTPRequestHandler) -> None:
    exchange.close_connection = True


def truncate(exchange: BaseHTTPRequestHandler) -> None:
    start_reply(exchange)
    exchange.wfile.write(BODY[:-1])
    exchange.close_connection = True


def answer_and_close_later(exchange: BaseHTTPRequestHandler) -> None:
    """Keep-alive by its headers, but the connection ends: what an idle timeout of the server looks like."""
    answer(exchange)
    exchange.close_connection = True


def babble(exchange: BaseHTTPRequestHandler) -> None:
    exchange.wfile.write(b"this is not HTTP\r\n\r\n")
    exchange.close_connection = True


def forward(client: Any) -> Any:
    return client.forward(HIDDEN, layer=3)


def several(run: Any, url: str, times: int, **options: Any) -> list[Any]:
    """The outputs of `times` forwards of one client, one after the other."""
    outputs: list[Any] = []
    if run.kind == "blocking":
        run(url, lambda client: outputs.extend(forward(client) for _ in range(times)), **options)
    else:

        async def use(client: Any) -> None:
            for _ in range(times):
                outputs.append(await forward(client))

        run(url, use, **options)
    return outputs


def test_forwards_share_one_connection(run: Any, serve: Any) -> None:
    server = serve(answer)
    outputs = several(run, server.url, 5)
    assert all(np.array_equal(output, HIDDEN * 2) for output in outputs)
    assert (server.served, server.connections) == (5, 1)


@pytest.mark.parametrize("loss", [drop, truncate, babble])
def test_a_lost_connection_is_replaced(run: Any, serve: Any, loss: Any) -> None:
    server = serve(loss, answer)
    assert np.array_equal(run(server.url, forward), HIDDEN * 2)
    assert (server.served, server.connections) == (2, 2)


@pytest.mark.parametrize("loss", [drop, truncate, babble])
def test_a_connection_that_is_always_lost_is_a_transport_failure(run: Any, serve: Any, loss: Any) -> None:
    server = serve(loss)
    with pytest.raises(TransportFailed, match="POST /v1/moe/forward got no reply"):
        run(server.url, forward, retries=1)
    assert server.served == 2


def test_a_connection_that_the_server_closed_while_idle_costs_no_error(run: Any, serve: Any) -> None:
    server = serve(answer_and_close_later, answer)
    assert len(several(run, server.url, 2)) == 2
    assert server.connections == 2


def test_a_refused_connection_is_a_transport_failure(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port, and it refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TransportFailed, match="ConnectError"):
            run(url, forward, retries=1)


def test_a_silent_server_is_given_up_at_the_deadline(run: Any, serve: Any) -> None:
    done = threading.Event()

    def hold(exchange: BaseHTTPRequestHandler) -> None:
        done.wait(20)
        drop(exchange)

    server = serve(hold)
    try:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
            run(server.url, forward, timeout_seconds=0.5)
    finally:
        done.set()
    assert server.served <= 1


def test_a_body_that_trickles_in_is_given_up_at_the_deadline(run: Any, serve: Any) -> None:
    done = threading.Event()

    def trickle(exchange: BaseHTTPRequestHandler) -> None:
        start_reply(exchange)
        for byte in BODY[:100]:  # 10 seconds in all, each byte far inside the deadline
            exchange.wfile.write(bytes([byte]))
            if done.wait(0.1):
                break
        exchange.close_connection = True

    server = serve(trickle)
    try:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.45 s"):
            run(server.url, forward, timeout_seconds=0.45)
    finally:
        done.set()


def test_threads_share_one_client(serve: Any) -> None:
    server = serve(answer)
    outputs: list[Any] = []
    with Client(server.url) as client:
        threads = [threading.Thread(target=lambda: outputs.append(forward(client))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outputs) == 8
    assert all(np.array_equal(output, HIDDEN * 2) for output in outputs)


def test_a_closed_client_cannot_be_used(serve: Any) -> None:
    server = serve(answer)
    client = Client(server.url)
    forward(client)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        forward(client)
