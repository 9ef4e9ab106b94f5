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


FAULTS = (
    Fault("rank-killed", in_thread(kill_rank), "kill -9 of a rank"),
    Fault("rank-stopped", in_thread(stop_rank), "SIGSTOP of a rank"),
    Fault("engine-killed", in_thread(kill_engine), "kill -9 of the engine"),
    Fault("engine-paused", in_thread(stop_engine), "SIGSTOP of the engine for 2 s", after="unharmed"),
    Fault("rank-slow", slow_rank, "50 ms SIGSTOP pulses to a rank, for 2 s", after="unharmed"),
    Fault("main-killed", in_thread(kill_everything_else), "kill -9 of the main process", after="ended"),
    Fault("sigterm", in_thread(terminate), "SIGTERM under load", after="ended", exit_status=0),
)
