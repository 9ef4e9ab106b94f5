"""Ends a wait of the running task for a reason of ours, without a second task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Value = TypeVar("Value")


class Interruption:
    """One wait of the task that makes this object, which callbacks may end by `because`."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[object] | None = task
        self._reason: Exception | None = None

    def because(self, reason: Exception) -> None:
        """Have the wait raise `reason`; the first reason counts, and none after the wait is over."""
        if self._task is not None and self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def wait(self, awaitable: Awaitable[Value]) -> Value:
        """Await `awaitable`, which is cancelled when the wait is interrupted.

        Raises: what `because` was given; CancelledError when somebody else cancelled the task.
        """
        try:
            value = await awaitable
            if self._reason is not None:  # our cancellation is on its way, since nothing was waited for
                await asyncio.sleep(0)
            return value
        except asyncio.CancelledError:
            if self._reason is None or self._cancelled_by_another():
                raise
            raise self._reason from None
        finally:
            self._task = None

    def _cancelled_by_another(self) -> bool:
        """Take our own cancellation back, where this Python counts them (3.11); whether others remain."""
        uncancel = getattr(self._task, "uncancel", None)
        return uncancel is not None and uncancel() > 0
