"""One fault, once: load, fault, load, and what the ledger says."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .ledger import Ledger, Outcome
from .leftovers import shared_memory, until_gone
from .load import Load
from .questions import Question, ask_all
from .scene import Fault, Scene
from .watch import Watch

CLIENTS = 6
LOAD_SECONDS = 1.0
"""Of undisturbed load before and after."""
DEADLINE_SECONDS = 15.0
GRACE_SECONDS = 5.0
NOTICE_SECONDS = 40.0
RECOVERY_SECONDS = 120.0
GONE_SECONDS = 75.0
"""How long what a killed service started may take to end: Ray's agents try for a minute to tell a GCS that is gone."""
POLL_SECONDS = 0.02


@dataclass
class Result:
    """What a trial showed. detected, recovered: seconds after the fault; None where there was nothing to see.

    left: what a service that ended has left, and should not have. kept: what it left on disk.
    problems: what must not be; empty where the trial passed.
    """

    fault: str
    about: str
    detected: float | None = None
    recovered: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


async def run_trial(fault: Fault, scene: Scene, questions: Sequence[Question]) -> Result:
    """Let a fault happen once to a service that is ready."""
    address = urlsplit(scene.service.url)
    host, port = address.hostname or "", address.port or 0
    memory_before = shared_memory()
    await ask_all(host, port, list(questions))
    load = Load(host, port, questions, CLIENTS, DEADLINE_SECONDS + GRACE_SECONDS)
    watch = Watch(host, port)
    result = Result(fault.name, fault.about)
    load.start()
    with scene.undo:
        try:
            await asyncio.sleep(LOAD_SECONDS)
            scene.now()
            try:
                await fault.strike(scene)
            except AssertionError as error:  # what the fault itself saw must not be
                result.problems.append(str(error))
            if fault.after == "lost":
                await _until_recovered(load.ledger, watch, scene.struck, result)
            elif fault.after == "ended":
                await _until_ended(fault, scene, result)
            else:
                await asyncio.sleep(fault.hold_seconds)
                if fault.after == "either":
                    await _until_answering(load.ledger, watch, scene.struck, result)
                if fault.after == "cut":
                    result.detected = _first_notice(load.ledger, watch, scene.struck)
                    result.recovered = None if scene.whole is None else scene.whole - scene.struck
            if fault.after != "ended":
                await asyncio.sleep(LOAD_SECONDS)
        finally:
            await watch.close()
            await load.stop()
    if fault.after == "ended":
        result.detected = _first_notice(load.ledger, watch, scene.struck)
        result.recovered, result.left, result.kept = await until_gone(scene.service, memory_before, GONE_SECONDS)
        result.problems += [f"left after {GONE_SECONDS:g} s: {thing}" for thing in result.left]
        if fault.exit_status is not None:  # killed, it cannot remove its folder: the next start does
            result.problems += [f"left on disk: {thing}" for thing in result.kept if not thing.startswith("ray/")]
    _judge(fault, load.ledger, watch, result)
    result.notes = scene.notes
    return result


def _first_notice(ledger: Ledger, watch: Watch, struck: float) -> float | None:
    """Return how long after the fault a client or /v2/health/ready first heard of it."""
    quiet = (Outcome.RIGHT, Outcome.WRONG)  # of a wrong answer only the test knows
    moments = [entry.ended for entry in ledger.entries if entry.ended > struck and entry.outcome not in quiet]
    moments += [moment for moment in (watch.first(False, struck),) if moment is not None]
    return min(moments) - struck if moments else None


async def _until_recovered(ledger: Ledger, watch: Watch, struck: float, result: Result) -> None:
    while time.monotonic() < struck + (NOTICE_SECONDS if result.detected is None else RECOVERY_SECONDS):
        await asyncio.sleep(POLL_SECONDS)
        if result.detected is None:
            result.detected = _first_notice(ledger, watch, struck)
            continue
        noticed = struck + result.detected
        answered = [entry.ended for entry in ledger.entries if entry.sent > noticed and entry.outcome is Outcome.RIGHT]
        ready = watch.first(True, noticed)
        if answered and ready is not None:
            result.recovered = max(min(answered), ready) - struck
            return
    if result.detected is None:
        result.problems.append(f"not noticed within {NOTICE_SECONDS:g} s")
    else:
        result.problems.append(f"not ready again within {RECOVERY_SECONDS:g} s")


async def _until_answering(ledger: Ledger, watch: Watch, struck: float, result: Result) -> None:
    """Wait until it answers, whether it was lost in between, once or more often, or not."""
    since = time.monotonic()
    while time.monotonic() < since + RECOVERY_SECONDS:
        answered = [entry.ended for entry in ledger.entries if entry.sent > since and entry.outcome is Outcome.RIGHT]
        if answered and watch.ready:
            result.detected = _first_notice(ledger, watch, struck)
            result.recovered = None if result.detected is None else min(answered) - struck
            return
        await asyncio.sleep(POLL_SECONDS)
    result.problems.append(f"no answer within {RECOVERY_SECONDS:g} s")


async def _until_ended(fault: Fault, scene: Scene, result: Result) -> None:
    try:
        status = await asyncio.to_thread(scene.service.process.wait, RECOVERY_SECONDS)
    except subprocess.TimeoutExpired:
        result.problems.append(f"still there after {RECOVERY_SECONDS:g} s")
        return
    if fault.exit_status is not None and status != fault.exit_status:
        result.problems.append(f"exit status {status}, expected {fault.exit_status}")


def _judge(fault: Fault, ledger: Ledger, watch: Watch, result: Result) -> None:
    """Say what the ledger must not hold after this fault."""
    result.counts, result.codes = ledger.counts(), ledger.codes()
    never = [Outcome.WRONG, Outcome.BROKEN, Outcome.LOST]
    if fault.after not in ("ended", "cut"):
        never += [Outcome.CUT, Outcome.UNCONNECTED]
    elif fault.exit_status is not None:  # it ended in order: whom it let in it answered
        never.append(Outcome.CUT)
    if fault.after in ("unharmed", "cut"):
        never.append(Outcome.REFUSED)
        if fault.after == "unharmed" and watch.changes:
            result.problems.append("it was not ready for a while")
    result.problems += ledger.worst(*never)
    if not result.counts["right"]:
        result.problems.append("nothing was answered")
