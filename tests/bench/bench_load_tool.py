"""What a request costs the client of `moe-forward bench`, beside the same request by httpx.

Both send the same body to the same idle server on loopback and get as many bytes back, in turn, round after round.
CPU microseconds of the client process and requests a second; ratios of medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import uvloop

from moe_forward.bench.environment import environment
from moe_forward.bench.selfcheck import echoes
from moe_forward.bench.sender import BUFFER_BYTES, Request, Sender
from moe_forward.bench.target import Target

HIDDEN = 7168
ROUND_BYTES = 64 << 20
FEWEST, MOST = 160, 3200


class Cost(NamedTuple):
    """Of one round: microseconds of the client's CPU a request, and requests a second."""

    cpu_us: float
    per_second: float


async def timed(callers: list[Callable[[], Awaitable[None]]], requests: int) -> Cost:
    """Have each caller send its share, one after the other, after one that opens its connection."""

    async def call(once: Callable[[], Awaitable[None]]) -> None:
        for _ in range(requests // len(callers)):
            await once()

    await asyncio.gather(*(once() for once in callers))
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(call(once) for once in callers))
    sent = requests // len(callers) * len(callers)
    return Cost((time.process_time() - cpu) / sent * 1e6, sent / (time.perf_counter() - wall))


async def by_sender(port: int, body: bytes, callers: int, requests: int) -> Cost:
    """Send with the load tool's own client."""
    target = Target("127.0.0.1", port, tls=False, prefix="", authority="echo")
    buffer = memoryview(bytearray(BUFFER_BYTES))
    request = Request(1, target.head(f"/?bytes={len(body)}", len(body)), body, len(body))
    senders = [Sender(target, None, buffer, 30.0) for _ in range(callers)]

    def caller(sender: Sender) -> Callable[[], Awaitable[None]]:
        async def once() -> None:
            answer = await sender.ask(request)
            assert answer.status == 200, answer

        return once

    cost = await timed([caller(sender) for sender in senders], requests)
    for sender in senders:
        sender.close()
    return cost


async def by_httpx(port: int, body: bytes, callers: int, requests: int) -> Cost:
    """Send with httpx, as the public client does."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

        async def once() -> None:
            reply = await client.post(f"/?bytes={len(body)}", content=body)
            assert reply.status_code == 200, reply

        return await timed([once] * callers, requests)


def measure(port: int, tokens: int, callers: int, rounds: int) -> dict[str, float]:
    """One line of the table."""
    body = bytes(tokens * HIDDEN * 2)
    requests = min(MOST, max(FEWEST, ROUND_BYTES // len(body)))
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(uvloop.run(by_sender(port, body, callers, requests)))
        theirs.append(uvloop.run(by_httpx(port, body, callers, max(callers, requests // 4))))
    sender, other = ([statistics.median(part) for part in zip(*costs, strict=True)] for costs in (ours, theirs))
    return {
        "tokens": tokens,
        "callers": callers,
        "sender_cpu_us": sender[0],
        "httpx_cpu_us": other[0],
        "cpu_ratio": other[0] / sender[0],
        "sender_per_second": sender[1],
        "httpx_per_second": other[1],
        "rate_ratio": sender[1] / other[1],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    where, rows = environment(), []
    print("tokens | callers | sender CPU us | httpx CPU us | ratio | sender req/s | httpx req/s | ratio")
    with echoes(1) as (port,):
        for tokens in (1, 4, 64):
            for callers in (1, 8):
                row = measure(port, tokens, callers, options.rounds)
                rows.append(row)
                cells = (
                    f"{tokens:6d}",
                    f"{callers:7d}",
                    f"{row['sender_cpu_us']:13.0f}",
                    f"{row['httpx_cpu_us']:12.0f}",
                    f"{row['cpu_ratio']:5.1f}",
                    f"{row['sender_per_second']:12.0f}",
                    f"{row['httpx_per_second']:11.0f}",
                    f"{row['rate_ratio']:5.1f}",
                )
                print(" | ".join(cells), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
