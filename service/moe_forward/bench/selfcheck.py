"""What the generator itself can do: the same load against a server that does nothing.

The server answers with as many bytes as the service would, from a process of its own for each client process, without
TLS. A service that comes near this ceiling is not what was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

import uvloop

from moe_forward.bench.crew import Crew, spawned
from moe_forward.bench.sender import BUFFER_BYTES
from moe_forward.bench.target import MEDIA_TYPE, Target
from moe_forward.bench.worker import Job

CHECK_SECONDS = 1.0
CHECK_WARMUP_SECONDS = 0.2
MAX_CALLERS = 64
"""Of a check for an open loop, whose requests in flight are bounded far above what it usually takes."""
HEAD_END = b"\r\n\r\n"


@contextlib.contextmanager
def echoes(number: int) -> Iterator[list[int]]:
    """Start so many idle servers on loopback; give their ports."""
    with spawned(_serve, number) as pipes:
        yield [int(pipe.recv()) for pipe in pipes]


def ceiling(crew: Crew, jobs: Sequence[Job], ports: Sequence[int]) -> float:
    """Return the requests a second that these jobs reach against idle servers, in a closed loop."""
    checks = [_check(job, port) for job, port in zip(jobs, ports, strict=True)]
    tally, start_ns = crew.run(checks, lambda progress: None)
    if tally.errors or not tally.answered:
        raise RuntimeError(f"the generator's check of itself failed: {dict(tally.errors) or 'no request was answered'}")
    seconds = (tally.last_ns - start_ns) / 1e9 - CHECK_WARMUP_SECONDS
    return tally.answered / seconds


def _check(job: Job, port: int) -> Job:
    replies = {(layer, tokens): f"/?bytes={job.reply_bytes[tokens]}" for layer, tokens in job.paths}
    return dataclasses.replace(
        job,
        target=Target("127.0.0.1", port, tls=False, prefix="", authority="echo", api_key=job.target.api_key),
        paths=replies,
        connections=job.connections if job.rate is None else min(job.connections, MAX_CALLERS),
        rate=None,
        warmup_seconds=CHECK_WARMUP_SECONDS,
        seconds=CHECK_SECONDS,
        requests=None,
        slo_ns=None,
    )


class _Echo(asyncio.BufferedProtocol):
    def __init__(self, buffer: memoryview, replies: dict[bytes, bytes]) -> None:
        self._buffer = buffer
        self._replies = replies
        self._head = b""
        self._reply = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self._left:
            self._head += self._buffer[:nbytes]
            end = self._head.find(HEAD_END)
            if end < 0:
                return
            self._left = int(_between(self._head, b"Content-Length: ", b"\r\n"))
            self._reply = self._reply_of(_between(self._head, b"?bytes=", b" "))
            nbytes = len(self._head) - end - len(HEAD_END)
            self._head = b""
        self._left -= nbytes
        if not self._left:
            self._transport.write(self._reply)

    def _reply_of(self, length: bytes) -> bytes:
        if length not in self._replies:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %b\r\n\r\n" % (MEDIA_TYPE.encode(), length)
            self._replies[length] = head + bytes(int(length))
        return self._replies[length]


def _between(head: bytes, before: bytes, after: bytes) -> bytes:
    start = head.index(before) + len(before)
    return head[start : head.index(after, start)]


def _serve(pipe: Connection[Any, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the client processes

    async def serve() -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        replies: dict[bytes, bytes] = {}
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Echo(buffer, replies), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        closed = asyncio.Event()
        loop.add_reader(pipe.fileno(), closed.set)  # nothing is ever sent: readable is closed
        await closed.wait()

    uvloop.run(serve())
