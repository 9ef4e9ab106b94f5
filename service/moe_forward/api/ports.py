"""What the front end needs of its link to the engine; `moe_forward.link.EngineLink` is the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from moe_forward.slab import Slab
from moe_forward.types import EngineStatus, ForwardRequest, ForwardResult, QueueReport, StepReport


class Link(Protocol):
    """The engine as a front end sees it.

    slab: memory that bodies and outputs lie in. front: this front end's number. status: always current.
    on_report, on_queue, on_status: called with each finished step, with what waits in the engine after it has changed,
        and with each change of status; the application sets them.
    """

    slab: Slab
    front: int
    status: EngineStatus
    on_report: Callable[[StepReport], None]
    on_queue: Callable[[QueueReport], None]
    on_status: Callable[[EngineStatus], None]

    def next_request(self) -> int:
        """Return a request number not used before."""

    def forward(self, request: ForwardRequest) -> asyncio.Future[ForwardResult]:
        """Send a request; how it ends is the future's result, a refusal one with a code. Whoever ends the future
        otherwise calls `cancel`."""

    def cancel(self, request: int) -> None:
        """Say that nobody wants a request's result any more."""

    def release_when_done(self, request: int, callback: Callable[[], None]) -> None:
        """Call back once no rank can touch the request's bytes; at once when that is already so."""
