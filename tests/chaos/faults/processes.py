"""Processes that die, hang or are slow."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

from ..scene import Fault, Scene, in_thread

PULSE_SECONDS = 0.05
PULSES = 20
REPLACED_SECONDS = 30.0
ATTENTIVE = {"silence_seconds": 5.0}
SEVERAL = {"frontends": 2, **ATTENTIVE}


def strike(scene: Scene, pid: int, number: signal.Signals) -> None:
    """Send a signal, now that it is known to whom."""
    scene.now()
    os.kill(pid, number)


def kill_rank(scene: Scene) -> None:
    """SIGKILL to the last rank."""
    strike(scene, scene.service.rank_pids()[-1], signal.SIGKILL)


def stop_rank(scene: Scene) -> None:
    """SIGSTOP to rank 0, for ever: it keeps its connections and says nothing."""
    strike(scene, scene.service.rank_pids()[0], signal.SIGSTOP)


def kill_engine(scene: Scene) -> None:
    """SIGKILL to the engine."""
    strike(scene, scene.service.pid_of("ray::EngineProcess"), signal.SIGKILL)


def hang_engine(scene: Scene) -> None:
    """SIGSTOP to the engine, for ever: it keeps its connections and says nothing."""
    strike(scene, scene.service.pid_of("ray::EngineProcess"), signal.SIGSTOP)


def stop_engine(scene: Scene) -> None:
    """SIGSTOP to the engine for two seconds."""
    pid = scene.service.pid_of("ray::EngineProcess")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(pid, signal.SIGCONT)


async def slow_rank(scene: Scene) -> None:
    """Pulses of SIGSTOP: half of the time a rank does nothing."""
    pid = (await asyncio.to_thread(scene.service.rank_pids))[0]
    for _ in range(PULSES):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(PULSE_SECONDS)
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(PULSE_SECONDS)


def kill_everything_else(scene: Scene) -> None:
    """SIGKILL to the main process: front end and supervisor at once."""
    scene.service.process.kill()
    scene.service.process.wait()


def terminate(scene: Scene) -> None:
    """SIGTERM to the main process."""
    with contextlib.suppress(ProcessLookupError):
        scene.service.process.send_signal(signal.SIGTERM)


def kill_front(scene: Scene) -> None:
    """SIGKILL to one of several front ends."""
    _lose_front(scene, signal.SIGKILL)


def stop_front(scene: Scene) -> None:
    """SIGSTOP to one of several front ends, for ever: it keeps its connections and says nothing."""
    _lose_front(scene, signal.SIGSTOP)


def _lose_front(scene: Scene, number: signal.Signals) -> None:
    """Send a signal to a front end, and wait until there is another in its place."""
    before = _fronts(scene)
    assert len(before) == SEVERAL["frontends"], before
    victim = min(before)
    served = scene.service.log.count(" serves (process ")
    strike(scene, victim, number)
    until = time.monotonic() + REPLACED_SECONDS
    while scene.service.log.count(" serves (process ") == served:
        assert time.monotonic() < until, f"no other front end within {REPLACED_SECONDS:g} s"
        time.sleep(0.02)
    scene.whole = time.monotonic()
    after = _fronts(scene)
    assert len(after) == len(before), after
    assert victim not in after, after


def _fronts(scene: Scene) -> set[int]:
    return {pid for pid, line in scene.service.pids().items() if "moe_forward.front_process" in line}


FAULTS = (
    Fault("rank-killed", in_thread(kill_rank), "kill -9 of a rank"),
    Fault("rank-stopped", in_thread(stop_rank), "SIGSTOP of a rank"),
    Fault("engine-killed", in_thread(kill_engine), "kill -9 of the engine"),
    Fault("engine-paused", in_thread(stop_engine), "SIGSTOP of the engine for 2 s", after="unharmed"),
    Fault("rank-slow", slow_rank, "50 ms SIGSTOP pulses to a rank, for 2 s", after="unharmed"),
    Fault("engine-stopped", in_thread(hang_engine), "SIGSTOP of the engine", config=ATTENTIVE),
    Fault("front-killed", in_thread(kill_front), "kill -9 of one of two front ends", "cut", SEVERAL),
    Fault("front-stopped", in_thread(stop_front), "SIGSTOP of one of two front ends", "cut", SEVERAL),
    Fault("main-killed", in_thread(kill_everything_else), "kill -9 of the main process", after="ended"),
    Fault("sigterm", in_thread(terminate), "SIGTERM under load", after="ended", exit_status=0),
)
