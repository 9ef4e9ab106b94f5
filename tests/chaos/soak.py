"""Soak: mixed requests and clients that hang up, for a long time; what grows? `run.py soak --seconds 900`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe_forward import checkpoint

from ..service.whole.running import Service
from .connection import Connection
from .ledger import Ledger, Outcome
from .load import PAUSE_SECONDS, Load, ask
from .questions import Question, ask_all, make_questions
from .samples import Growth, Sampler, growths

QUESTIONS = 120
SIZES = (1, 1, 2, 5, 16, 33, 64, 128, 500)
STEADY_CLIENTS, FICKLE_CLIENTS = 4, 3
DEADLINE_SECONDS = 20.0
GRACE_SECONDS = 10.0
LONGEST_PATIENCE_SECONDS = 0.1
"""A fickle client hangs up at a random moment before that."""
MOST_MEGABYTES_PER_HOUR = 60.0
MOST_MEGABYTES = 4.0
"""Growth that a leak is judged by: a slope, which over few minutes says little, and an amount behind it."""
MOST_FILES = 4
MOST_THREADS = 2


def main(arguments: list[str]) -> int:
    """Run, print and write; returns 1 where something was wrong, lost or grew."""
    options = _options(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        model = Path(name) / "tiny"
        checkpoint.make_model("tiny", model, progress=False)
        questions = make_questions(model, QUESTIONS, DEADLINE_SECONDS, SIZES)
        config = {"slab_bytes": 128 << 20, "log_level": "warning"}
        with closing(Service(model, options.ranks, config)) as service:
            report = asyncio.run(_soak(service.wait_ready(), questions, options))
            report["exit_status"] = service.terminate()
    for line in describe(report):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if report["problems"] or report["exit_status"] else 0


def describe(report: dict[str, Any]) -> list[str]:
    """Return the report in words."""
    lines = [
        f"{report['seconds']:.0f} s: {report['counts']}, {report['codes']}, {report['aborted']} aborted",
        "process: anonymous MiB first -> last, most resident; MiB/h of the second half; descriptors, threads of it",
    ]
    for growth in report["growth"]:
        lines.append(
            f"{growth['process']}: {growth['first_megabytes']:.1f} -> {growth['last_megabytes']:.1f}, "
            f"{growth['most_megabytes']:.0f}; {growth['megabytes_per_hour']:+.1f}; "
            f"{growth['files']:+d}, {growth['threads']:+d}"
        )
    return lines + [f"PROBLEM: {problem}" for problem in report["problems"]]


def judge_growth(growth: Growth, seconds: float) -> list[str]:
    """Return what of a process' growth is too much. seconds: of the soak; its second half was looked at."""
    problems = []
    gained = growth.megabytes_per_hour * seconds / 2 / 3600
    if growth.megabytes_per_hour > MOST_MEGABYTES_PER_HOUR and gained > MOST_MEGABYTES:
        problems.append(f"{growth.process} grows by {growth.megabytes_per_hour:.0f} MiB/h")
    if growth.files > MOST_FILES:
        problems.append(f"{growth.process} holds {growth.files} more descriptors")
    if growth.threads > MOST_THREADS:
        problems.append(f"{growth.process} has {growth.threads} more threads")
    return problems


async def _soak(service: Service, questions: Sequence[Question], options: argparse.Namespace) -> dict[str, Any]:
    address = urlsplit(service.url)
    host, port = address.hostname or "", address.port or 0
    patience = DEADLINE_SECONDS + GRACE_SECONDS
    await ask_all(host, port, list(questions))
    load = Load(host, port, questions, STEADY_CLIENTS, patience)
    sampler = Sampler(service, options.interval_seconds)
    fickle = [Fickle(host, port, questions, number) for number in range(FICKLE_CLIENTS)]
    tasks = [asyncio.create_task(client.run()) for client in fickle]
    load.start()
    await asyncio.sleep(options.seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await load.stop()
    await asyncio.sleep(min(options.interval_seconds, 5.0))
    await sampler.close()
    await ask_all(host, port, list(questions))  # it still answers everything, and right

    found = growths(sampler.samples)
    problems = [problem for growth in found for problem in judge_growth(growth, options.seconds)]
    problems += load.ledger.worst(*(outcome for outcome in Outcome if outcome is not Outcome.RIGHT))
    problems += [f"a client that hangs up saw: {note}" for client in fickle for note in client.notes[:3]]
    return {
        "cores": os.cpu_count(),
        "seconds": options.seconds,
        "counts": load.ledger.counts(),
        "codes": load.ledger.codes(),
        "aborted": sum(client.aborted for client in fickle),
        "growth": [asdict(growth) for growth in found],
        "problems": problems,
        "samples": [asdict(sample) for sample in sampler.samples],
    }


class Fickle:
    """A client that hangs up at random moments, and holds what it gets in time against what is expected."""

    def __init__(self, host: str, port: int, questions: Sequence[Question], seed: int) -> None:
        self.aborted = 0
        self.notes: list[str] = []
        self._address = (host, port)
        self._questions = questions
        self._choose = random.Random(seed)

    async def run(self) -> None:
        """Ask until cancelled."""
        ledger = Ledger()
        while True:
            connection = Connection(*self._address)
            question = self._choose.choice(self._questions)
            patience = self._choose.random() * LONGEST_PATIENCE_SECONDS
            asking = asyncio.create_task(ask(connection, question, ledger, "fickle", DEADLINE_SECONDS + GRACE_SECONDS))
            done, _ = await asyncio.wait([asking], timeout=patience)
            if not done:
                self.aborted += 1
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            connection.close()
            self.notes += ledger.worst(*(outcome for outcome in Outcome if outcome is not Outcome.RIGHT))
            ledger.entries.clear()
            await asyncio.sleep(self._choose.random() * PAUSE_SECONDS)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests/chaos/run.py soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=900.0, help="(default: 900)")
    parser.add_argument("--interval-seconds", type=float, default=5.0, help="between two looks (default: 5)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(arguments)
