"""Steps in flight, measured: the real engine in a process of its own, and ranks that take a set time for a step.

    python tests/bench/bench_flight.py [--seconds 2] [--rounds 3] [--fixed-us 1000] [--token-us 1] [--layers 1]

For 1, 8 and 64 closed-loop clients with one token each: requests a second, milliseconds from request to answer, and
requests a step, with 1, 2 and 4 steps in flight, interleaved; medians of the rounds. Nothing is computed and no bytes
move, so what differs is what the engine does between steps. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import selectors
import statistics
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from moe_forward.batcher import BatchLimits
from moe_forward.channel import BlockingChannel, connect, listen
from moe_forward.engine import run_engine
from moe_forward.errors import ChannelClosed
from moe_forward.link import EngineLink
from moe_forward.messages import Announce, RankHello
from moe_forward.slab import Slab
from moe_forward.types import DType, ForwardRequest, RankInfo, Routing, Step, StepResult, TensorRef

RANKS = 2
WARM_UP_SECONDS = 0.3
REF = TensorRef(0, DType.BF16, 8)
CONTEXT = multiprocessing.get_context("spawn")


def engine_process(path: Path, depth: int) -> None:
    """Serve until killed, as the engine's actor does."""
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    limits = BatchLimits(8192, 256, 200e-6, 1024, 65536, depth)
    loop.run_until_complete(run_engine(listen(path), limits, 60.0))


def rank_process(path: Path, rank: int, fixed_seconds: float, token_seconds: float) -> None:
    """Answer each step after its time, which begins when the one before it has ended, until the engine is gone."""
    channel = BlockingChannel(connect(path))
    info = RankInfo(rank, "ready", time.time(), pid=os.getpid())
    channel.send(RankHello(1, info, "none", "none"))
    with contextlib.suppress(ChannelClosed):
        while True:
            message, fds = channel.receive()
            for fd in fds:
                os.close(fd)
            if isinstance(message, Step):
                time.sleep(fixed_seconds + token_seconds * message.tokens)
                channel.send(StepResult(message.step, message.generation, rank, (), 0))


def start(*calls: tuple[object, ...]) -> list[BaseProcess]:
    """Start a process for each call: function and arguments."""
    processes = [CONTEXT.Process(target=call[0], args=call[1:], daemon=True) for call in calls]  # type: ignore[arg-type]
    for process in processes:
        process.start()
    return list(processes)


async def drive(path: Path, clients: int, layers: int, seconds: float) -> dict[str, float]:
    """Have clients send until the time is over; returns what they saw after the warm-up."""
    slab = Slab(1 << 20)
    link = EngineLink(path, slab)
    link.start()
    link.announce(Announce(1, RANKS, 0))
    while not link.status.ready:
        await asyncio.sleep(0.01)
    begin = time.monotonic() + WARM_UP_SECONDS
    waits: list[float] = []
    batches: list[int] = []

    async def client(number: int) -> None:
        layer = number
        while (sent := time.monotonic()) < begin + seconds:
            layer += 1
            request = ForwardRequest(
                0,
                link.next_request(),
                layer % layers,
                1,
                sent + 30,
                True,
                REF,
                None,
                Routing.SERVER,
                None,
                None,
                REF,
                client=number,
            )
            result = await link.forward(request)
            assert result.code is None, result.message
            if sent >= begin:
                waits.append(time.monotonic() - sent)
                batches.append(result.batch_requests)

    await asyncio.gather(*(client(number) for number in range(clients)))
    await link.close()
    slab.close()
    waits.sort()
    return {
        "requests_per_second": len(waits) / seconds,
        "p50_ms": 1e3 * waits[len(waits) // 2],
        "p99_ms": 1e3 * waits[int(0.99 * len(waits))],
        "requests_per_step": 1 / statistics.mean(1 / batch for batch in batches),
    }


def measure(depth: int, clients: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one engine and its ranks."""
    with tempfile.TemporaryDirectory(prefix="moe-") as folder:
        path = Path(folder) / "engine.sock"
        processes = start((engine_process, path, depth))
        while not path.exists():
            time.sleep(0.02)

        async def run() -> dict[str, float]:
            driving = asyncio.create_task(drive(path, clients, arguments.layers, arguments.seconds))
            await asyncio.sleep(0.3)  # the engine must have heard of the group before its ranks come
            cost = (1e-6 * arguments.fixed_us, 1e-6 * arguments.token_us)
            processes.extend(start(*((rank_process, path, rank, *cost) for rank in range(RANKS))))
            return await driving

        try:
            return asyncio.run(run())
        finally:
            for process in processes:
                process.kill()
                process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fixed-us", type=float, default=1000.0)
    parser.add_argument("--token-us", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=1)
    arguments = parser.parse_args()
    report = {}
    for clients in (1, 8, 64):
        rounds = [{depth: measure(depth, clients, arguments) for depth in (1, 2, 4)} for _ in range(arguments.rounds)]
        for depth in (1, 2, 4):
            report[f"{clients} clients, {depth} in flight"] = {
                name: round(statistics.median(one[depth][name] for one in rounds), 3) for name in rounds[0][depth]
            }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
