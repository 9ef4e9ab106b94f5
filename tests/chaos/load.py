"""Clients that ask one question after the other, and write into the ledger how each ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from .connection import Connection, Cut, Unconnected
from .ledger import Ledger, Outcome, judge
from .questions import Question

PAUSE_SECONDS = 0.2
"""Between a refusal and the next request of the same client: far less than Retry-After, to see when it ends."""


async def ask(
    connection: Connection, question: Question, ledger: Ledger, client: str, patience_seconds: float
) -> Outcome:
    """Ask a question and account for it. patience_seconds: the deadline it names and some grace."""
    number = ledger.send(client, time.monotonic())
    try:
        reply = await asyncio.wait_for(connection.request(question.head, question.body), patience_seconds)
    except asyncio.TimeoutError:
        return ledger.end(number, time.monotonic(), Outcome.LOST, note=f"no answer in {patience_seconds:g} s").outcome
    except Unconnected as error:
        return ledger.end(number, time.monotonic(), Outcome.UNCONNECTED, note=str(error)).outcome
    except Cut as error:
        return ledger.end(number, time.monotonic(), Outcome.CUT, note=str(error)).outcome
    except asyncio.CancelledError:
        ledger.forget(number)
        raise
    outcome, note = judge(reply, question.expected)
    return ledger.end(number, time.monotonic(), outcome, reply, note).outcome


class Load:
    """A closed loop: each client has a connection and a share of the questions, and waits for every answer.

    patience_seconds: of a client with one answer.
    """

    def __init__(
        self, host: str, port: int, questions: Sequence[Question], clients: int, patience_seconds: float
    ) -> None:
        self.ledger = Ledger()
        self._address = (host, port)
        self._shares = [questions[number::clients] for number in range(clients)]
        self._patience_seconds = patience_seconds
        self._stopping = False
        self._clients: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Let every client begin."""
        self._clients = [
            asyncio.create_task(self._client(f"client {number}", share)) for number, share in enumerate(self._shares)
        ]

    async def stop(self) -> None:
        """Let every client finish what it asked; what it does not hear of is lost."""
        self._stopping = True
        await asyncio.gather(*self._clients)
        self.ledger.give_up(time.monotonic())

    async def _client(self, name: str, questions: Sequence[Question]) -> None:
        connection = Connection(*self._address)
        try:
            while not self._stopping:
                for question in questions:
                    if self._stopping:
                        break
                    outcome = await ask(connection, question, self.ledger, name, self._patience_seconds)
                    if outcome is not Outcome.RIGHT:
                        await asyncio.sleep(PAUSE_SECONDS)
        finally:
            connection.close()
