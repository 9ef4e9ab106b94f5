"""Requests at a rate that does not ask how the service is, each on a connection of its own for as long as it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from .connection import Connection
from .ledger import Ledger
from .load import ask
from .questions import Question

IDLE_SECONDS = 2.0
"""A connection that rested longer is not used again: the service may be about to close it."""
MOST_OPEN = 6000


class OpenLoop:
    """Offers requests of one client.

    ledger: where they are accounted for. patience_seconds: with one answer. skipped: requests that were due while
    MOST_OPEN others waited.
    """

    def __init__(
        self, host: str, port: int, questions: Sequence[Question], ledger: Ledger, client: str, patience_seconds: float
    ) -> None:
        self.skipped = 0
        self._address = (host, port)
        self._questions = questions
        self._ledger = ledger
        self._client = client
        self._patience_seconds = patience_seconds
        self._idle: list[tuple[float, Connection]] = []
        self._asking: set[asyncio.Task[None]] = set()

    async def offer(self, rate: float, seconds: float) -> None:
        """Offer `rate` requests a second for some time, and wait until the last one has ended."""
        started = time.monotonic()
        count = round(rate * seconds)
        for number in range(count):
            due = started + number / rate
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
            elif number % 16 == 0:
                await asyncio.sleep(0)  # late: still let answers be read
            if len(self._asking) >= MOST_OPEN:
                self.skipped += 1
                continue
            task = asyncio.create_task(self._ask(self._questions[number % len(self._questions)]))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        await asyncio.gather(*self._asking)
        for _, connection in self._idle:
            connection.close()

    async def _ask(self, question: Question) -> None:
        connection = self._connection()
        await ask(connection, question, self._ledger, self._client, self._patience_seconds)
        self._idle.append((time.monotonic(), connection))

    def _connection(self) -> Connection:
        while self._idle:
            since, connection = self._idle.pop()
            if time.monotonic() - since < IDLE_SECONDS:
                return connection
            connection.close()
        return Connection(*self._address)
