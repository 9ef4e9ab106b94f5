"""The engine's two kinds of peers: front ends with their slabs, and the ranks of one or more generations."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moe_forward.channel import AsyncChannel
from moe_forward.datagrams import pack
from moe_forward.messages import (
    Alive,
    AttachSlab,
    DetachSlab,
    FrontHello,
    FrontWelcome,
    Message,
    Released,
    StepAnswers,
    StepSummary,
    Ticket,
)
from moe_forward.types import EngineStatus, ForwardResult, QueueReport


class Ranks:
    """Ranks that said hello; those of a lost generation may linger until they are killed."""

    def __init__(self) -> None:
        self._members: dict[AsyncChannel, tuple[int, int]] = {}  # channel -> (generation, rank)

    def __contains__(self, channel: AsyncChannel) -> bool:
        return channel in self._members

    def add(self, channel: AsyncChannel, generation: int, rank: int) -> None:
        """Remember a rank."""
        self._members[channel] = (generation, rank)

    def remove(self, channel: AsyncChannel) -> tuple[int, int] | None:
        """Forget a rank; returns its generation and number, None where the channel is not a rank's."""
        return self._members.pop(channel, None)

    def alive(self, generation: int) -> bool:
        """Tell whether a rank of `generation` is still connected, and so may touch requests' bytes."""
        return any(other == generation for other, _ in self._members.values())

    def send(self, message: Message, fd: int | None = None, generation: int | None = None) -> None:
        """Send to every rank, or to those of one generation."""
        data = pack(message)
        for channel, (other, _) in self._members.items():
            if generation is None or other == generation:
                channel.send_packed(data, fd)


@dataclass(frozen=True, slots=True)
class _Front:
    number: int
    channel: AsyncChannel
    slab_fd: int
    slab_bytes: int
    wants_reports: bool


class Fronts:
    """Front ends by number, and their slabs' descriptors, which every rank gets too."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._fronts: dict[int, _Front] = {}
        self._numbers: dict[AsyncChannel, int] = {}
        self._told: _Front | None = None  # of steps and of the queue: told by two, they would be counted twice
        self._next = 0

    def number(self, channel: AsyncChannel) -> int | None:
        """Return the front end's number, None where the channel is none's."""
        return self._numbers.get(channel)

    def add(self, channel: AsyncChannel, hello: FrontHello, slab_fd: int) -> None:
        """Welcome a front end and show its slab, whose descriptor is ours from now on, to the ranks."""
        number = self._next
        self._next += 1
        self._fronts[number] = _Front(number, channel, slab_fd, hello.slab_bytes, hello.wants_reports)
        self._numbers[channel] = number
        self._told = self._first_to_tell()
        self._ranks.send(AttachSlab(number, hello.slab_bytes), slab_fd)
        channel.send(FrontWelcome(number))

    def remove(self, channel: AsyncChannel) -> int | None:
        """Forget a front end and have the ranks forget its slab; returns its number, None where it is none."""
        number = self._numbers.pop(channel, None)
        if number is not None:
            self._ranks.send(DetachSlab(number))
            os.close(self._fronts.pop(number).slab_fd)
            self._told = self._first_to_tell()
        return number

    def show_slabs(self, rank: AsyncChannel) -> None:
        """Show every slab to a rank that has just come."""
        for number, front in self._fronts.items():
            rank.send(AttachSlab(number, front.slab_bytes), front.slab_fd)

    def answer(self, result: ForwardResult) -> None:
        """Tell a request's front end how it ended; a front end that is gone needs no answer."""
        front = self._fronts.get(result.front)
        if front is not None:
            front.channel.send(result)

    def release(self, request: Ticket) -> None:
        """Tell a request's front end that nobody can touch its bytes any more."""
        front = self._fronts.get(request.front)
        if front is not None:
            front.channel.send(Released((request.request,)))

    def finish(self, answers: dict[int, StepAnswers], report: StepSummary) -> None:
        """Tell front ends how the requests of a step ended, each in one message, and one of them of the step."""
        told = self._told
        for number, mine in answers.items():
            front = self._fronts.get(number)
            if front is not None and front is not told:
                front.channel.send(mine)
        if told is not None:
            mine_too = answers.get(told.number)
            told.channel.send_all((report,) if mine_too is None else (mine_too, report))

    def report(self, report: QueueReport) -> None:
        """Send what waits to one front end."""
        if self._told is not None:
            self._told.channel.send(report)

    def _first_to_tell(self) -> _Front | None:
        return next((front for front in self._fronts.values() if front.wants_reports), None)

    def tell(self, message: EngineStatus | Alive) -> None:
        """Send the engine's status, or that it is there, to every front end."""
        for front in self._fronts.values():
            front.channel.send(message)

    def close(self) -> None:
        """Close the slabs' descriptors."""
        for front in self._fronts.values():
            os.close(front.slab_fd)
