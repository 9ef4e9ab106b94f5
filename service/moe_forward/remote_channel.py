"""A rank's channel to an engine on another host: the same messages, and the rows they speak of in a mirror.

A mirror is memory of this host as large as the front end's slab; rows lie in it at the offsets that a step names, so
the rank does with it what it does with a slab of its own host. Only this rank's rows travel, and pages of the mirror
are taken from the system when they are first touched. `moe_forward.gateway` is the other end.
"""

from __future__ import annotations

import os

from moe_forward.frames import FramedSocket, views
from moe_forward.handshake import Address, call
from moe_forward.messages import AttachSlab, DetachSlab, Message
from moe_forward.segments import input_windows, output_windows
from moe_forward.slab import map_slab
from moe_forward.types import Step, StepResult


class RemoteChannel:
    """What a `BlockingChannel` is to a rank of the engine's host.

    address: of the gateway on the engine's host. rank, ranks: whose rows travel.
    Raises: OSError when nobody listens there; ChannelClosed when it is not this service's gateway.
    """

    def __init__(self, address: Address, rank: int, ranks: int) -> None:
        self._peer = FramedSocket(call(address))
        self._rank = rank
        self._ranks = ranks
        self._mirrors: dict[int, memoryview] = {}
        self._outputs: list[memoryview] = []

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for the next message; a step's rows are in the mirrors when it returns.

        Returns: the message, and with `AttachSlab` the mirror's descriptor, which the caller closes.
        Raises: ChannelClosed when the engine's host is gone, or sends what does not fit.
        """
        message = self._peer.receive()
        if isinstance(message, AttachSlab):
            fd = os.memfd_create("moe-forward-mirror", os.MFD_CLOEXEC)
            os.ftruncate(fd, message.slab_bytes)
            self._mirrors[message.front] = memoryview(map_slab(fd, message.slab_bytes))
            return message, [fd]
        if isinstance(message, DetachSlab):
            self._mirrors.pop(message.front, None)
        elif isinstance(message, Step):
            self._outputs = views(self._mirrors, output_windows(message, self._rank, self._ranks))
            self._peer.receive_rows(views(self._mirrors, input_windows(message, self._rank, self._ranks)))
        return message, []

    def send(self, message: Message) -> None:
        """Send one message, and behind a step's result the rows of its outputs; raises ChannelClosed as `receive`."""
        done = isinstance(message, StepResult) and not message.error
        self._peer.send(message, self._outputs if done else ())

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on several channels."""
        return self._peer.fileno()

    def close(self) -> None:
        """Close our end."""
        self._peer.close()
