"""The ledger: every request that was sent, and the one way in which it ended."""

from __future__ import annotations

import enum
import itertools
import json
from collections import Counter
from dataclasses import dataclass

from .connection import Reply


class Outcome(enum.Enum):
    """How a request ended.

    RIGHT: answered with the bits that it had before the fault. REFUSED: an error of the service's own form, with
    Retry-After where the interface promises it. UNCONNECTED: nobody took the connection. CUT: the connection ended
    before the answer did. WRONG: answered with other bits. BROKEN: an error that the interface does not promise.
    LOST: no answer within the deadline that the request named, and some grace.
    """

    RIGHT = "right"
    REFUSED = "refused"
    UNCONNECTED = "unconnected"
    CUT = "cut"
    WRONG = "wrong"
    BROKEN = "broken"
    LOST = "lost"


REFUSALS = {
    (429, "queue_full"): True,
    (503, "not_ready"): True,
    (503, "rank_lost"): True,
    (503, "draining"): True,
    (503, "too_many_connections"): True,
    (504, "deadline_exceeded"): False,
}
"""Status and code of what a sound request may be refused with -> whether Retry-After comes along."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request. sent, ended: on the monotonic clock, seconds. code: as the service named it, or empty."""

    client: str
    sent: float
    ended: float
    outcome: Outcome
    status: int = 0
    code: str = ""
    retry_after_seconds: int | None = None
    note: str = ""

    @property
    def seconds(self) -> float:
        """From sending to the end."""
        return self.ended - self.sent


class Ledger:
    """Requests that are open, and how the others ended; a request that is closed twice or never opened is an error."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._open: dict[int, tuple[str, float]] = {}
        self._numbers = itertools.count()

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def send(self, client: str, now: float) -> int:
        """Open an entry before the request leaves; returns its number."""
        number = next(self._numbers)
        self._open[number] = (client, now)
        return number

    def end(
        self,
        number: int,
        now: float,
        outcome: Outcome,
        reply: Reply | None = None,
        note: str = "",
    ) -> Entry:
        """Close an entry. Raises: KeyError where it is not open."""
        client, sent = self._open.pop(number)
        status, code, retry_after = (0, "", None) if reply is None else (reply.status, error_code(reply), wait(reply))
        entry = Entry(client, sent, now, outcome, status, code, retry_after, note)
        self.entries.append(entry)
        return entry

    def forget(self, number: int) -> None:
        """Take an entry out whose client went away on purpose: nobody can tell how it ended."""
        del self._open[number]

    def give_up(self, now: float) -> None:
        """Close what is still open as lost."""
        for number in list(self._open):
            self.end(number, now, Outcome.LOST, note="its client never heard of it")

    def counts(self) -> dict[str, int]:
        """Return how many requests ended in each way, all ways named."""
        found = Counter(entry.outcome for entry in self.entries)
        return {outcome.value: found[outcome] for outcome in Outcome}

    def codes(self) -> dict[str, int]:
        """Return how many refusals came with each status and code."""
        return dict(Counter(f"{entry.status} {entry.code}" for entry in self.entries if entry.status not in (0, 200)))

    def worst(self, *outcomes: Outcome) -> list[str]:
        """Describe the first few requests that ended in one of these ways."""
        found = [entry for entry in self.entries if entry.outcome in outcomes]
        return [
            f"{entry.client}: {entry.outcome.value} after {entry.seconds:.3f} s: "
            f"{entry.status} {entry.code} {entry.note}"
            for entry in found[:5]
        ]


def judge(reply: Reply, expected: bytes) -> tuple[Outcome, str]:
    """Hold a reply against the bytes of the tensor that it must carry; returns the outcome and what is odd about it."""
    if reply.status == 200:
        output = tensor_bytes(reply.body)
        if output == expected:
            return Outcome.RIGHT, ""
        return Outcome.WRONG, f"{len(output)} bytes, {len(expected)} expected"
    promised = REFUSALS.get((reply.status, error_code(reply)))
    if promised is None:
        return Outcome.BROKEN, reply.body[:300].decode(errors="replace")
    if promised and wait(reply) is None:
        return Outcome.BROKEN, "no Retry-After"
    return Outcome.REFUSED, ""


def tensor_bytes(body: bytes) -> bytes:
    """Return what follows the header of a safetensors body; empty where it has none."""
    return body[8 + int.from_bytes(body[:8], "little") :]


def error_code(reply: Reply) -> str:
    """Return the code of an error in the service's own form, else nothing."""
    if reply.status == 200:
        return ""
    try:
        document = json.loads(reply.body)
    except ValueError:
        return ""
    complete = isinstance(document, dict) and document.keys() == {"error", "code", "request_id"} and document["error"]
    return str(document["code"]) if complete else ""


def wait(reply: Reply) -> int | None:
    """Return Retry-After in whole seconds, at least 1, else None."""
    text = reply.headers.get("retry-after", "")
    return int(text) if text.isdecimal() and int(text) >= 1 else None
