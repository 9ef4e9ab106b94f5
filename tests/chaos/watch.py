"""A look at /v2/health/ready every few milliseconds, beside the load."""

from __future__ import annotations

import asyncio
import time

from .connection import Connection, Cut, Unconnected, get_head

LOOK_SECONDS = 0.05


class Watch:
    """Notes each moment at which readiness changed: (monotonic seconds, ready)."""

    def __init__(self, host: str, port: int) -> None:
        self.changes: list[tuple[float, bool]] = []
        self._connection = Connection(host, port)
        self._task = asyncio.create_task(self._look())

    def first(self, ready: bool, since: float) -> float | None:
        """Return the first moment after `since` at which it became ready, or was no longer."""
        return next((moment for moment, was in self.changes if moment > since and was == ready), None)

    @property
    def ready(self) -> bool:
        """Whether it was ready at the last look."""
        return not self.changes or self.changes[-1][1]

    async def close(self) -> None:
        """Stop looking."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._connection.close()

    async def _look(self) -> None:
        last = True
        while True:
            try:
                ready = (await self._connection.request(get_head("/v2/health/ready"))).status == 200
            except (Cut, Unconnected):
                ready = False
            if ready != last:
                self.changes.append((time.monotonic(), ready))
            last = ready
            await asyncio.sleep(LOOK_SECONDS)
