"""Whether a new forward may be taken now: the engine's state, and draining."""

from __future__ import annotations

from typing import Protocol

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import EngineStatus

FAILED_PREFIX = "failed:"
"""`EngineStatus.reason` starts so when the rank group cannot come back by itself."""


class HasStatus(Protocol):
    """The part of a link that says how the engine is."""

    @property
    def status(self) -> EngineStatus:
        """The engine as it last described itself."""


class Availability:
    """One front end's answer to "ready?" and "live?". inflight: forwards being served, counted by their routes."""

    def __init__(self, link: HasStatus) -> None:
        self._link = link
        self.draining = False
        self.inflight = 0

    def drain(self) -> None:
        """Refuse what is new from now on; what is in flight goes on. Cannot be undone."""
        self.draining = True

    def refusal(self) -> ForwardError | None:
        """Return why a forward cannot be taken now, or None when it can."""
        status = self._link.status
        if self.draining:
            return ForwardError(
                ErrorCode.DRAINING, "the service is draining: it finishes what it has and takes no more"
            )
        if status.ready:
            return None
        code = ErrorCode.RANK_LOST if status.lost else ErrorCode.NOT_READY
        return ForwardError(code, f"the service is not ready: {status.reason}")

    def failure(self) -> ForwardError | None:
        """Return why the service cannot come back by itself, or None while it works or can."""
        reason = self._link.status.reason
        if not reason.startswith(FAILED_PREFIX):
            return None
        return ForwardError(ErrorCode.NOT_READY, f"the service cannot come back by itself: {reason}")
