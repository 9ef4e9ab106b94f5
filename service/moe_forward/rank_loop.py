"""A rank's loop: messages in, steps launched one ahead of the one that runs, results out in their order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from moe_forward.channel import BlockingChannel
from moe_forward.errors import ChannelClosed
from moe_forward.messages import AttachSlab, DetachSlab, Message
from moe_forward.polling import poll_until
from moe_forward.remote_channel import RemoteChannel
from moe_forward.slab_rows import attach, detach, wait
from moe_forward.types import Step, StepResult

Channel: TypeAlias = BlockingChannel | RemoteChannel
"""To an engine on this host, or on another."""

MAX_LAUNCHED = 2
"""The step that runs, and one whose rows come meanwhile; a third would only wait on the device instead of here."""


class LaunchedStep(Protocol):
    """What the loop needs of a `rank.Launched`."""

    def done(self) -> bool:
        """Whether `finish` returns at once."""
        ...

    def finish(self) -> StepResult:
        """Wait for the step and return its result."""
        ...


class StepRank(Protocol):
    """What the loop needs of a `rank.Rank`."""

    def launch(self, step: Step, slabs: Mapping[int, Tensor]) -> LaunchedStep:
        """Start a step."""
        ...


class RankLoop:
    """Serves one engine. channel: to it. rank: does the steps. number: of the rank. device: where it computes.

    poll_seconds: how long to look for a message before sleeping (`moe_forward.polling`).
    """

    def __init__(
        self, channel: Channel, rank: StepRank, number: int, device: torch.device, poll_seconds: float = 0.0
    ) -> None:
        self._channel = channel
        self._rank = rank
        self._number = number
        self._device = device
        self._poll_seconds = poll_seconds
        self._slabs: dict[int, Tensor] = {}
        self._launched: deque[tuple[Step, LaunchedStep]] = deque()

    def serve(self, message: Message, fds: list[int]) -> None:
        """Take messages until the engine hangs up. message, fds: the first one, and the descriptors it carried.

        Raises: ChannelClosed at the end; whatever broke a step, after telling the engine; TypeError for a message that
        is not for ranks.
        """
        try:
            self._serve(message, fds)
        except ChannelClosed:
            for slab in self._slabs.values():
                detach(slab, self._device)
            raise

    def _serve(self, message: Message, fds: list[int]) -> None:
        try:
            while True:
                self._take(message, fds)
                message, fds = self._next()
        finally:
            # Once our end of the channel closes, the engine lets requests' bytes be used again.
            wait(self._device)

    def _take(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, Step):
            with self._told(message):
                self._launched.append((message, self._rank.launch(message, self._slabs)))
            return
        while self._launched:  # no copy may be under way when memory goes
            self._finish()
        if isinstance(message, AttachSlab):
            (fd,) = fds
            self._slabs[message.front] = attach(fd, message.slab_bytes, self._device)
            os.close(fd)
        elif isinstance(message, DetachSlab):
            if message.front in self._slabs:
                detach(self._slabs.pop(message.front), self._device)
        else:
            raise TypeError(f"the engine sent a {type(message).__name__}, which ranks do not take")

    def _next(self) -> tuple[Message, list[int]]:
        """Return the next message; steps that end before it comes are finished, in order.

        What is done is told before more is launched: on a CPU a launch takes as long as the step.
        """
        while self._launched:
            if len(self._launched) == MAX_LAUNCHED or self._launched[0][1].done():
                self._finish()
            elif self._channel.ready():
                break
        else:
            poll_until(self._channel.ready, self._poll_seconds)
        return self._channel.receive()

    def _finish(self) -> None:
        step, launched = self._launched.popleft()
        with self._told(step):
            result = launched.finish()
        self._channel.send(result)

    @contextmanager
    def _told(self, step: Step) -> Iterator[None]:
        """Tell the engine what breaks the step, before it ends this process."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:2000]
            self._channel.send(StepResult(step.step, step.generation, self._number, (), 0, error=reason))
            raise
