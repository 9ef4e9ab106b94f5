"""Connections that want nothing: ten thousand idle ones, headers that come a byte a second, bodies that stop, and more
connections than are allowed; the service answers meanwhile. `python tests/chaos/run.py connections`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe_forward import checkpoint

from ..service.whole.running import Service
from .ledger import Outcome
from .load import Load
from .questions import Question, ask_all, make_questions
from .samples import MIB, look

QUESTIONS = 36
CLIENTS = 4
DEADLINE_SECONDS = 20.0
GRACE_SECONDS = 10.0
SLOW_CLIENTS, STOPPED_CLIENTS = 100, 100
MOST_CONNECTIONS = 12_000
EXTRA = 50
TIMEOUT_SECONDS = 30.0
"""header_timeout_seconds and body_timeout_seconds: long enough to have all of them at once."""
LATE_SECONDS = 10.0
BATCH = 250


def main(arguments: list[str]) -> int:
    """Run, print and write; returns 1 where the service did not answer as it should."""
    options = _options(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files < MOST_CONNECTIONS + 500:
        print(f"needs {MOST_CONNECTIONS + 500} descriptors (ulimit -n), {most_files} are allowed")
        return 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        model = Path(name) / "tiny"
        checkpoint.make_model("tiny", model, progress=False)
        questions = make_questions(model, QUESTIONS, DEADLINE_SECONDS)
        config = {
            "slab_bytes": 64 << 20,
            "max_body_bytes": 32 << 20,
            "max_connections": MOST_CONNECTIONS,
            "header_timeout_seconds": TIMEOUT_SECONDS,
            "body_timeout_seconds": TIMEOUT_SECONDS,
            "log_level": "warning",
        }
        with closing(Service(model, 2, config)) as service:
            report = asyncio.run(_measure(service.wait_ready(), questions, options.idle))
            report["exit_status"] = service.terminate()
    for key, value in report.items():
        print(f"{key}: {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if report["problems"] or report["exit_status"] else 0


async def _measure(service: Service, questions: Sequence[Question], idle: int) -> dict[str, Any]:
    address = urlsplit(service.url)
    host, port = address.hostname or "", address.port or 0
    await ask_all(host, port, list(questions))
    before = _front_end_megabytes(service)
    load = Load(host, port, questions, CLIENTS, DEADLINE_SECONDS + GRACE_SECONDS)
    load.start()
    problems: list[str] = []
    opened = time.monotonic()
    silent = await _open(host, port, idle)
    slow = await _open(host, port, SLOW_CLIENTS)
    drips = [asyncio.create_task(_drip(connection)) for connection in slow]
    stopped = await _open(host, port, STOPPED_CLIENTS)
    for connection in stopped:
        await asyncio.get_running_loop().sock_sendall(connection, _half_a_request())
    report: dict[str, Any] = {
        "cores": os.cpu_count(),
        "idle": len(silent),
        "slow_headers": len(slow),
        "stopped_bodies": len(stopped),
        "opened_in_seconds": round(time.monotonic() - opened, 1),
    }
    answered = load.ledger.counts()["right"]
    held = time.monotonic()
    full = await _open(host, port, max(0, MOST_CONNECTIONS - idle - SLOW_CLIENTS - STOPPED_CLIENTS - CLIENTS))
    extra = await _open(host, port, EXTRA)
    refusals = await asyncio.gather(*(_read(connection) for connection in extra))
    refused = sum(b" 503 " in text and b"too_many_connections" in text for text in refusals)
    report["refused_over_the_limit"] = f"{refused} of {EXTRA} with 503 too_many_connections"
    if refused != EXTRA:
        problems.append(f"{EXTRA - refused} connections over the limit were not refused: {refusals[0][:200]!r}")
    await asyncio.sleep(5.0)
    report["answered_per_second_meanwhile"] = round(
        (load.ledger.counts()["right"] - answered) / (time.monotonic() - held), 1
    )
    report["front_end_megabytes"] = [round(before), round(_front_end_megabytes(service))]

    everyone = silent + slow + stopped + full
    ends = await asyncio.gather(
        *(_end(connection, opened + 2 * TIMEOUT_SECONDS + LATE_SECONDS) for connection in everyone)
    )
    for drip in drips:
        drip.cancel()
    await asyncio.gather(*drips, return_exceptions=True)
    late = sum(end is None for end in ends)
    report["all_closed_after_seconds"] = round(
        max((end for end in ends if end is not None), default=opened) - opened, 1
    )
    if late:
        problems.append(f"{late} connections were still open {2 * TIMEOUT_SECONDS + LATE_SECONDS:g} s after the first")
    await asyncio.sleep(1.0)
    await load.stop()
    await ask_all(host, port, list(questions))
    report["counts"], report["codes"] = load.ledger.counts(), load.ledger.codes()
    problems += load.ledger.worst(*(outcome for outcome in Outcome if outcome is not Outcome.RIGHT))
    report["front_end_megabytes"].append(round(_front_end_megabytes(service)))
    report["problems"] = problems
    return report


async def _open(host: str, port: int, count: int) -> list[socket.socket]:
    """Open connections, some hundred at a time."""
    loop = asyncio.get_running_loop()
    made: list[socket.socket] = []
    while len(made) < count:
        batch = [socket.socket() for _ in range(min(BATCH, count - len(made)))]
        for connection in batch:
            connection.setblocking(False)
        await asyncio.gather(*(loop.sock_connect(connection, (host, port)) for connection in batch))
        made += batch
    return made


async def _drip(connection: socket.socket) -> None:
    """Send a request's head a byte a second."""
    loop = asyncio.get_running_loop()
    try:
        for byte in b"GET /v2/health/ready HTTP/1.1\r\nHost: chaos\r\nX-Slow: " + b"a" * 10_000:
            await loop.sock_sendall(connection, bytes([byte]))
            await asyncio.sleep(1.0)
    except OSError:
        pass  # the service closed it, which is what is waited for


def _half_a_request() -> bytes:
    head = "POST /v1/moe/forward?layer=1 HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/vnd.safetensors\r\n"
    return f"{head}Content-Length: 4096\r\n\r\n".encode() + bytes(2048)


async def _read(connection: socket.socket) -> bytes:
    """Read what comes at once, and hang up."""
    loop = asyncio.get_running_loop()
    with connection:
        try:
            return await asyncio.wait_for(loop.sock_recv(connection, 4096), LATE_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            return f"{type(error).__name__}: {error}".encode()


async def _end(connection: socket.socket, give_up: float) -> float | None:
    """Return when the service closed a connection, or None where it did not in time."""
    loop = asyncio.get_running_loop()
    with connection:
        while True:
            try:
                data = await asyncio.wait_for(loop.sock_recv(connection, 4096), max(0.001, give_up - time.monotonic()))
            except asyncio.TimeoutError:
                return None
            except OSError:
                data = b""
            if not data:
                return time.monotonic()


def _front_end_megabytes(service: Service) -> float:
    (sample,) = [sample for sample in look(service, 0.0) if sample.process == "front end"]
    return sample.resident_bytes / MIB


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests/chaos/run.py connections", description=__doc__)
    parser.add_argument("--idle", type=int, default=10_000, help="connections (default: 10000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(arguments)
