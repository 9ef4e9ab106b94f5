"""Overload: the most that the service answers, then several times that offered for some time; and two clients, one
of which sends ten times as much. `python tests/chaos/run.py overload --seconds 600`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe_forward import checkpoint

from ..service.whole.running import Service
from .ledger import Entry, Ledger, Outcome
from .load import Load
from .open_loop import OpenLoop
from .questions import Question, ask_all, make_questions
from .samples import MIB, Sampler

QUESTIONS = 48
CLIENTS = (2, 4, 8, 16, 32)
"""Closed loops that look for the most; the best counts."""
GRACE_SECONDS = 10.0
KEYS = {"large": "key-of-the-large-client", "small": "key-of-the-small-client"}
LARGE_SHARE = 10 / 11
GOAL = 0.9


def main(arguments: list[str]) -> int:
    """Measure, print and write; returns 1 where requests were wrong or lost, or goodput fell below the goal."""
    options = _options(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        model = Path(name) / "tiny"
        checkpoint.make_model("tiny", model, progress=False)
        keys = Path(name) / "keys"
        keys.write_text("".join(f"{who}:{key}\n" for who, key in KEYS.items()))
        questions = make_questions(model, QUESTIONS, options.deadline_seconds, (options.tokens,))
        config = {"api_keys_file": str(keys), "log_level": "warning", "slab_bytes": 512 << 20, **dict(options.set)}
        with closing(Service(model, options.ranks, config)) as service:
            report = asyncio.run(_measure(service.wait_ready(), questions, options))
            report["exit_status"] = service.terminate()
    report["config"] = dict(options.set)
    for line in describe(report):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if sound(report) else 1


def sound(report: dict[str, Any]) -> bool:
    """Tell whether nothing was wrong or lost, and goodput held under overload."""
    counts = report["overload"]["counts"]
    bad = sum(counts[outcome.value] for outcome in (Outcome.WRONG, Outcome.BROKEN, Outcome.LOST, Outcome.CUT))
    return bad == 0 and report["overload"]["goodput_of_peak"] >= GOAL and report["exit_status"] == 0


def describe(report: dict[str, Any]) -> list[str]:
    """Return the report in words."""
    over = report["overload"]
    lines = [
        f"peak: {report['peak_per_second']:.1f} answers/s of {report['tokens']} tokens "
        f"({', '.join(f'{clients} clients {rate:.1f}' for clients, rate in report['closed'].items())}; "
        f"afterwards {report['closed_after']:.1f})",
        f"offered {over['offered_per_second']:.1f}/s ({over['offered_of_peak']:.1f} x peak) for {over['seconds']:g} s: "
        f"goodput {over['goodput_per_second']:.1f}/s, {100 * over['goodput_of_peak']:.0f} % of the peak",
        f"ended: {over['counts']}, {over['codes']}; not offered {over['skipped']}",
        f"429: {100 * over['share_429']:.1f} %, Retry-After {over['retry_after']}; "
        f"answered in p50 {over['p50']:.2f} s, p99 {over['p99']:.2f} s; refused in p99 {over['refused_p99']:.3f} s",
    ]
    for who, part in over["clients"].items():
        lines.append(
            f"client {who}: offered {part['offered']}, answered {part['answered']} ({100 * part['share']:.1f} %), "
            f"p50 {part['p50']:.2f} s, p99 {part['p99']:.2f} s"
        )
    for process, (first, most) in report["resident_megabytes"].items():
        lines.append(f"{process}: {first:.0f} MiB at first, {most:.0f} MiB at most")
    return lines


async def _measure(service: Service, questions: Sequence[Question], options: argparse.Namespace) -> dict[str, Any]:
    address = urlsplit(service.url)
    host, port = address.hostname or "", address.port or 0
    mine = {who: [question.by(key) for question in questions] for who, key in KEYS.items()}
    patience = options.deadline_seconds + GRACE_SECONDS
    await ask_all(host, port, mine["large"])
    closed = {
        clients: await _answered_per_second(host, port, mine["large"], clients, options.peak_seconds, patience)
        for clients in CLIENTS
    }
    best = max(closed, key=lambda clients: closed[clients])
    rate = options.times * closed[best]

    sampler = Sampler(service, 1.0)
    ledger = Ledger()
    loops = {who: OpenLoop(host, port, mine[who], ledger, who, patience) for who in KEYS}
    started = time.monotonic()
    await asyncio.gather(
        loops["large"].offer(rate * LARGE_SHARE, options.seconds),
        loops["small"].offer(rate * (1 - LARGE_SHARE), options.seconds),
    )
    ledger.give_up(time.monotonic())
    await sampler.close()
    resident: dict[str, tuple[float, float]] = {}
    for sample in sampler.samples:
        first, most = resident.get(sample.process, (sample.resident_bytes / MIB, 0.0))
        resident[sample.process] = (first, max(most, sample.resident_bytes / MIB))
    after = await _answered_per_second(host, port, mine["large"], best, 2 * options.peak_seconds, patience)
    peak = (closed[best] + after) / 2  # before and after: a machine is not the same for long
    over = _overload(ledger, started, options.seconds, peak, {who: loop.skipped for who, loop in loops.items()})
    return {
        "cores": os.cpu_count(),
        "tokens": options.tokens,
        "peak_per_second": peak,
        "closed": closed,
        "closed_after": after,
        "overload": over,
        "resident_megabytes": resident,
        "samples": [asdict(sample) for sample in sampler.samples],
    }


async def _answered_per_second(
    host: str, port: int, questions: Sequence[Question], clients: int, seconds: float, patience_seconds: float
) -> float:
    """Return what closed loops of `clients` get answered."""
    load = Load(host, port, questions, clients, patience_seconds)
    load.start()
    started = time.monotonic()
    await asyncio.sleep(seconds)
    taken = time.monotonic() - started
    answered = load.ledger.counts()[Outcome.RIGHT.value]
    await load.stop()
    return answered / taken


def _overload(ledger: Ledger, started: float, seconds: float, peak: float, skipped: dict[str, int]) -> dict[str, Any]:
    entries = ledger.entries
    right = [entry for entry in entries if entry.outcome is Outcome.RIGHT]
    full = [entry for entry in entries if entry.status == 429]
    goodput = sum(entry.ended < started + seconds for entry in right) / seconds
    waits = sorted({entry.retry_after_seconds for entry in full if entry.retry_after_seconds is not None})
    return {
        "seconds": seconds,
        "offered_per_second": len(entries) / seconds,
        "offered_of_peak": len(entries) / seconds / peak,
        "goodput_per_second": goodput,
        "goodput_of_peak": goodput / peak,
        "counts": ledger.counts(),
        "codes": ledger.codes(),
        "skipped": skipped,
        "share_429": len(full) / len(entries),
        "retry_after": f"{waits[0]} to {waits[-1]} s" if waits else "-",
        "p50": quantile([entry.seconds for entry in right], 0.5),
        "p99": quantile([entry.seconds for entry in right], 0.99),
        "refused_p99": quantile([entry.seconds for entry in full], 0.99),
        "clients": {who: _client([entry for entry in entries if entry.client == who]) for who in KEYS},
    }


def _client(entries: Sequence[Entry]) -> dict[str, float]:
    seconds = [entry.seconds for entry in entries if entry.outcome is Outcome.RIGHT]
    return {
        "offered": len(entries),
        "answered": len(seconds),
        "share": len(seconds) / max(1, len(entries)),
        "p50": quantile(seconds, 0.5),
        "p99": quantile(seconds, 0.99),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests/chaos/run.py overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of overload (default: 600)")
    parser.add_argument("--peak-seconds", type=float, default=10.0, help="of each closed loop (default: 10)")
    parser.add_argument("--times", type=float, default=4.0, help="offered, in peaks (default: 4)")
    parser.add_argument("--tokens", type=int, default=64, help="rows of a request (default: 64)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--deadline-seconds", type=float, default=10.0, help="that each request names (default: 10)")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", help="configuration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(arguments)


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)
