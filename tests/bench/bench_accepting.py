"""Who gets which connection, in three ways of sharing a port among processes: why the service hands them over.

    python tests/bench/bench_accepting.py --json accepting.json

`shared`: all processes accept on one listening socket. `reuseport`: each has its own (SO_REUSEPORT), and the kernel
chooses by a hash. `handed over`: one process accepts and passes each on to the process that has the fewest, as
`moe_forward.acceptor` does. Shares are counted, so a busy machine does not spoil them; rates are of a short answer.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop

from moe_forward.acceptor import Acceptor

WAYS = ("shared", "reuseport", "handed over")


class Answer(asyncio.Protocol):
    """Says which process it is, after as much work as a small request is."""

    def __init__(self, name: bytes, closed: Any) -> None:
        self._name = name
        self._closed = closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._closed()

    def data_received(self, data: bytes) -> None:
        end = time.perf_counter() + 80e-6
        while time.perf_counter() < end:
            pass
        self._transport.write(self._name)


async def serve(name: bytes, listener: socket.socket | None, handed: socket.socket) -> None:
    """Accept on `listener`, or take what comes over `handed`."""
    loop = asyncio.get_running_loop()
    taking: set[asyncio.Task[Any]] = set()
    if listener is not None:
        await loop.create_server(lambda: Answer(name, lambda: None), sock=listener)
    else:

        def take() -> None:
            _, fds, _, _ = socket.recv_fds(handed, 1, 1)
            for fd in fds:
                connection = socket.socket(fileno=fd)
                made = loop.connect_accepted_socket(lambda: Answer(name, lambda: handed.send(b"c")), connection)
                task = loop.create_task(made)
                taking.add(task)
                task.add_done_callback(taking.discard)

        loop.add_reader(handed, take)
    await asyncio.Event().wait()


class Process:
    """A `Taker` in another process. to: the socket to it."""

    def __init__(self, to: socket.socket) -> None:
        self.connections = self.handed = 0
        self._to = to

    def take(self, connection: socket.socket) -> None:
        """See `Taker`."""
        socket.send_fds(self._to, [b"t"], [connection.fileno()])

    def closed(self) -> None:
        """Take in that a connection is closed."""
        self._to.recv(1)
        self.connections -= 1


async def hand_over(listener: socket.socket, to: list[socket.socket]) -> None:
    """Accept for all of them."""
    processes = [Process(sock) for sock in to]
    for sock, process in zip(to, processes, strict=True):
        asyncio.get_running_loop().add_reader(sock, process.closed)
    Acceptor(listener, lambda: processes, 1 << 20).resume()
    await asyncio.Event().wait()


async def ask(port: int, connections: int, requests: int, seconds: float) -> dict[str, Any]:
    """Load the port. requests: of a connection, before it is opened again; 0: it stays."""
    opened: collections.Counter[bytes] = collections.Counter()
    answered: collections.Counter[bytes] = collections.Counter()
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for number in range(requests or 1 << 60):
                if time.perf_counter() >= end:
                    break
                writer.write(b"?")
                name = await reader.read(100)
                answered[name] += 1
                opened[name] += number == 0
            writer.close()
            await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(connections)))
    rate = sum(answered.values()) / seconds
    return {"opened": sorted(opened.values()), "answered": sorted(answered.values()), "requests_per_second": rate}


def run(way: str, count: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Start processes that share a port in one way, and load them in every case."""
    context = multiprocessing.get_context("fork")
    listeners = [socket.socket() for _ in range(count if way == "reuseport" else 1)]
    port = 0
    for listener in listeners:
        if way == "reuseport":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(2048)
        port = listener.getsockname()[1]
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    mains: list[Coroutine[Any, Any, None]] = []
    for number in range(count):
        mine = None if way == "handed over" else listeners[number % len(listeners)]
        mains.append(serve(b"%d" % number, mine, pairs[number][1]))
    if way == "handed over":
        mains.append(hand_over(listeners[0], [ours for ours, _ in pairs]))
    processes = [context.Process(target=uvloop.run, args=(main,), daemon=True) for main in mains]
    for process in processes:
        process.start()
    for main in mains:
        main.close()
    time.sleep(1.0)
    results = []
    for connections in given.connections:
        for requests in given.requests:
            found = asyncio.run(ask(port, connections, requests, given.seconds))
            results.append({"way": way, "processes": count, "connections": connections, "requests": requests, **found})
            share = max(found["answered"]) / sum(found["answered"])
            each = f"{requests} requests each" if requests else "that stay"
            rate = found["requests_per_second"]
            print(f"{way:12s} {count} processes, {connections} connections {each}: {found['opened']}, ", end="")
            print(f"busiest {share:.2f} of the requests, {rate:.0f} requests/s", flush=True)
    for process in processes:
        process.kill()
        process.join()
    return results


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--requests", type=int, nargs="+", default=[0, 20, 1], help="of a connection; 0: it stays")
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    results = [result for count in given.processes for way in WAYS for result in run(way, count, given)]
    if given.json is not None:
        given.json.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
