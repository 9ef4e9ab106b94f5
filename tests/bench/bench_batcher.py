"""What the queue costs the engine: microseconds of CPU a request to queue, to cancel and to serve, with 1000 waiting.

    python tests/bench/bench_batcher.py [--rounds 20]

Prints JSON: for 1 and 58 layers, the median of the rounds of each. Requests come from 100 clients; every arrival is
followed by a look at what is due behind a running step, as in the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from moe_forward.batcher import Ahead, Batcher, BatchLimits
from moe_forward.messages import Ticket

WAITING, CLIENTS = 1000, 100
LIMITS = BatchLimits(8192, 256, 200e-6, WAITING, 65536)


def make_requests(layers: int) -> list[Ticket]:
    """Return requests of 1 to 64 tokens, layers and clients in turn."""
    return [
        Ticket(0, number, number % layers, 1 + number % 64, 1e9, client=number % CLIENTS) for number in range(WAITING)
    ]


def measure(layers: int) -> dict[str, float]:
    """Return microseconds a request of each part, once."""
    requests, parts = make_requests(layers), {}
    behind = Ahead(1e9, 1.0, False)
    batcher = Batcher(LIMITS)

    def timed(name: str, started: float) -> None:
        parts[name] = 1e6 * (time.process_time() - started) / WAITING

    started = time.process_time()
    for number, request in enumerate(requests):
        assert batcher.add(request, number * 1e-6)
        batcher.expire(number * 1e-6)
        assert not batcher.next_step(number * 1e-6, behind) or layers == 1
        batcher.wake_seconds(number * 1e-6, behind)
    timed("queue_and_look", started)
    batcher.drop_all()
    for number, request in enumerate(requests):
        assert batcher.add(request, number * 1e-6)
    started = time.process_time()
    served = 0
    while served < WAITING:
        served += len(batcher.next_step(1.0))
    timed("serve", started)
    for number, request in enumerate(requests):
        assert batcher.add(request, number * 1e-6)
    started = time.process_time()
    for request in requests:
        assert batcher.cancel(request.front, request.request)
    timed("cancel", started)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    report = {}
    for layers in (1, 58):
        measured = [measure(layers) for _ in range(rounds)]
        medians = {name: round(statistics.median(parts[name] for parts in measured), 2) for name in measured[0]}
        report[f"{layers} layers, microseconds a request"] = medians
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
