"""Where a fault happens: a running service, load on it, and what has to be undone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..service.whole.running import Service

CONFIG: dict[str, Any] = {
    "slab_bytes": 64 << 20,
    "max_body_bytes": 32 << 20,
    "max_rank_restarts": 1000,
    "step_timeout_seconds": 5.0,
    "start_timeout_seconds": 120.0,
}
"""Enough for small requests, as many losses as trials, and a hung step noticed before clients give up."""


@dataclass
class Scene:
    """A service under load. model: what it serves. undo: called when the trial has ended, last first.

    notes: what the fault wants to say of this trial. struck: when it happened, monotonic seconds.
    whole: when what was lost had been replaced, where the fault itself looks for that.
    """

    service: Service
    model: Path
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    notes: list[str] = field(default_factory=list)
    struck: float = 0.0
    whole: float | None = None

    def now(self) -> None:
        """Say that the fault happens at this moment: until then it was being prepared."""
        self.struck = time.monotonic()


Start = Callable[[Path, Mapping[str, Any]], AbstractContextManager[Service]]


@contextlib.contextmanager
def on_one_host(model: Path, config: Mapping[str, Any]) -> Iterator[Service]:
    """Run a service on this host; it is ready."""
    with contextlib.closing(Service(model, 2, {**CONFIG, **config})) as service:
        yield service.wait_ready()


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    strike: does it; returns when it is done or in place. config: of the service that it happens to.
    after: lost: the group is lost, and comes back; cut: some connections end, all other requests are answered;
        unharmed: every request is answered; either: lost or unharmed; ended: the service ends.
    start: how that service is started. exit_status: with which the service ends; None: it was killed.
    hold_seconds: how long the load goes on where nothing is to be noticed.
    unavailable: why it cannot be done here, or None.
    about: one sentence for the table.
    """

    name: str
    strike: Callable[[Scene], Awaitable[None]]
    about: str
    after: Literal["lost", "cut", "unharmed", "either", "ended"] = "lost"
    config: Mapping[str, Any] = field(default_factory=dict)
    start: Start = on_one_host
    exit_status: int | None = None
    hold_seconds: float = 3.0
    unavailable: Callable[[], str | None] = lambda: None


def in_thread(strike: Callable[[Scene], None]) -> Callable[[Scene], Awaitable[None]]:
    """Let a fault that blocks happen beside the load."""

    async def run(scene: Scene) -> None:
        await asyncio.to_thread(strike, scene)

    return run
