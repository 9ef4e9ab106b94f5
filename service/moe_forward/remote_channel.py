"""A rank's channel to an engine on another host: the same messages, and the rows they speak of in a mirror.

A mirror is memory of this host as large as the front end's slab; rows lie in it at the offsets that a step names, so
the rank does with it what it does with a slab of its own host. Only this rank's rows travel, and pages of the mirror
are taken from the system when they are first touched. `moe_forward.gateway` is the other end.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading

from moe_forward.errors import ChannelClosed
from moe_forward.frames import FramedSocket, views
from moe_forward.handshake import Address, call
from moe_forward.messages import AttachSlab, DetachSlab, Message
from moe_forward.segments import input_windows, output_windows
from moe_forward.slab import map_slab
from moe_forward.types import Step, StepResult


class RemoteChannel:
    """What a `BlockingChannel` is to a rank of the engine's host.

    A thread of its own reads whatever comes at once, also while the rank computes: rows that nobody reads would close
    TCP's window, and a window closed for longer than `frames.SILENCE_SECONDS` ends the connection. Rows of a next step
    never lie where an earlier one's do, since its requests keep their extents of the slab until it is answered; how
    much waits here is bounded by how many steps the engine has under way.

    address: of the gateway on the engine's host. rank, ranks: whose rows travel.
    Raises: OSError when nobody listens there; ChannelClosed when it is not this service's gateway.
    """

    def __init__(self, address: Address, rank: int, ranks: int) -> None:
        self._peer = FramedSocket(call(address))
        self._rank = rank
        self._ranks = ranks
        self._mirrors: dict[int, memoryview] = {}  # the reader's alone
        self._outputs: dict[int, list[memoryview]] = {}  # by step; there before the step is in `_come`
        self._sending = threading.Lock()
        self._come: queue.SimpleQueue[tuple[Message, list[int]] | Exception] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"reader of rank {rank}", daemon=True)
        self._reader.start()

    def ready(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        return not self._come.empty()

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for the next message; a step's rows are in the mirrors when it returns.

        Returns: the message, and with `AttachSlab` the mirror's descriptor, which the caller closes.
        Raises: ChannelClosed, once all that came before is taken, when the engine's host is gone or sends what does
            not fit; OSError when this host has no memory for a mirror.
        """
        come = self._come.get()
        if isinstance(come, Exception):
            self._come.put(come)  # the end stays the end
            raise come
        return come

    def send(self, message: Message) -> None:
        """Send one message, and behind a step's result the rows of its outputs. Another thread may send too.

        Raises: ChannelClosed when the other end is gone.
        """
        rows: list[memoryview] = []
        if isinstance(message, StepResult):
            outputs = self._outputs.pop(message.step)
            rows = [] if message.error else outputs
        with self._sending:
            self._peer.send(message, rows)

    def hang_up(self) -> None:
        """End the connection, so that a thread that waits on it gets ChannelClosed; `close` is still to be called."""
        self._peer.hang_up()

    def close(self) -> None:
        """Close our end, and the descriptors that nobody took."""
        self._peer.hang_up()
        self._reader.join()
        self._peer.close()
        with contextlib.suppress(queue.Empty):
            while True:
                come = self._come.get_nowait()
                for fd in () if isinstance(come, Exception) else come[1]:
                    os.close(fd)
        self._come.put(ChannelClosed("closed by this end"))

    def _read(self) -> None:
        try:
            while True:
                self._come.put(self._read_message())
        except Exception as error:  # whatever it is, `receive` raises it
            self._peer.hang_up()  # nobody reads any more
            self._come.put(error)

    def _read_message(self) -> tuple[Message, list[int]]:
        message = self._peer.receive()
        if isinstance(message, AttachSlab):
            return message, [self._add_mirror(message)]
        if isinstance(message, DetachSlab):
            self._mirrors.pop(message.front, None)
        elif isinstance(message, Step):
            self._outputs[message.step] = views(self._mirrors, output_windows(message, self._rank, self._ranks))
            self._peer.receive_rows(views(self._mirrors, input_windows(message, self._rank, self._ranks)))
        return message, []

    def _add_mirror(self, message: AttachSlab) -> int:
        fd = os.memfd_create("moe-forward-mirror", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, message.slab_bytes)
            self._mirrors[message.front] = memoryview(map_slab(fd, message.slab_bytes))
        except BaseException:
            os.close(fd)
            raise
        return fd
