"""The door for ranks of other hosts: on the engine's host, it takes their place before the engine.

To the engine each of them is one more connection to its socket, with the same messages as a rank of its own host. The
gateway reads the rows of a step out of the front ends' slabs, sends them behind the message, and writes the outputs
that come back into the slabs before it passes the result on: the engine still touches no tensor bytes. A rank that is
gone, or whose host is silent, is a closed connection to the engine. `moe_forward.remote_channel` is the other end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path

from moe_forward.channel import BlockingChannel, connect
from moe_forward.errors import ChannelClosed
from moe_forward.frames import FramedSocket, views
from moe_forward.handshake import Address, welcome
from moe_forward.messages import AttachSlab, DetachSlab, Heartbeat, RankHello
from moe_forward.segments import input_windows, output_windows
from moe_forward.slab import map_slab
from moe_forward.types import Step, StepResult

log = logging.getLogger(__name__)

MAX_STRANGERS = 64
"""Connections that have not proved yet who they are; more are hung up on at once."""


class Gateway:
    """Lets ranks of other hosts in. address: its own. socket_path: where the engine listens. ranks: of the group."""

    def __init__(self, address: Address, socket_path: Path, ranks: int) -> None:
        self._address = address
        self._socket_path = socket_path
        self._ranks = ranks
        self._strangers = threading.Semaphore(MAX_STRANGERS)

    def serve(self, listener: socket.socket) -> None:
        """Take connections until the process is killed or `listener` is shut down, a thread for each."""
        while True:
            try:
                sock, (host, *_) = listener.accept()
            except OSError as error:
                log.info("the gateway ends: %s", error)
                return
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._let_in, args=(sock, host), name=f"rank at {host}", daemon=True).start()
            else:
                log.warning("refused a connection from %s: %d others are not known yet", host, MAX_STRANGERS)
                sock.close()

    def _let_in(self, sock: socket.socket, host: str) -> None:
        with contextlib.ExitStack() as open_ends:
            open_ends.callback(sock.close)
            try:
                try:
                    welcome(sock, self._address)
                finally:
                    self._strangers.release()
                peer = FramedSocket(sock)
                hello = peer.receive()
                if not isinstance(hello, RankHello) or not 0 <= hello.info.rank < self._ranks:
                    raise ChannelClosed("it is no rank of this group")
                engine = BlockingChannel(connect(self._socket_path))
                open_ends.callback(engine.close)
                engine.send(hello)
                _Bridge(peer, engine, hello.info.rank, self._ranks).run()
            except (ChannelClosed, OSError) as error:
                log.warning("hung up on %s: %s", host, error)


class _Bridge:
    """Between one rank and the engine. peer: the rank's end, engine: the engine's."""

    def __init__(self, peer: FramedSocket, engine: BlockingChannel, rank: int, ranks: int) -> None:
        self._peer = peer
        self._engine = engine
        self._rank = rank
        self._ranks = ranks
        self._slabs: dict[int, memoryview] = {}
        self._outputs: dict[int, list[memoryview]] = {}  # by step that the rank has not answered
        self._why: Exception | None = None

    def run(self) -> None:
        """Pass everything on until one of them is gone: raises ChannelClosed.

        A thread for each direction: the rows of a step may be on their way there while those of a result come back, and
        with one thread each end could wait for the other to read.
        """
        back = threading.Thread(target=self._run_back, name=f"rank {self._rank} to the engine", daemon=True)
        back.start()
        try:
            while True:
                self._to_rank()
        except (ChannelClosed, OSError) as error:
            raise self._why or error from error
        finally:
            self._peer.hang_up()
            back.join()

    def _run_back(self) -> None:
        try:
            while True:
                self._to_engine()
        except (ChannelClosed, OSError) as error:
            self._why = error
        finally:
            self._engine.hang_up()

    def _to_rank(self) -> None:
        message, fds = self._engine.receive()
        rows: list[memoryview] = []
        if isinstance(message, AttachSlab):
            (fd,) = fds
            self._slabs[message.front] = memoryview(map_slab(fd, message.slab_bytes))
            os.close(fd)
        elif isinstance(message, DetachSlab):
            self._slabs.pop(message.front, None)  # outputs of steps under way keep their memory
        elif isinstance(message, Step):
            self._outputs[message.step] = views(self._slabs, output_windows(message, self._rank, self._ranks))
            rows = views(self._slabs, input_windows(message, self._rank, self._ranks))
        self._peer.send(message, rows)

    def _to_engine(self) -> None:
        message = self._peer.receive()
        if isinstance(message, StepResult) and message.rank == self._rank:
            if message.step not in self._outputs:
                raise ChannelClosed(f"rank {self._rank} sent the result of step {message.step}, which it does not have")
            outputs = self._outputs.pop(message.step)
            if not message.error:
                self._peer.receive_rows(outputs)
        elif not (isinstance(message, Heartbeat) and message.rank == self._rank):
            raise ChannelClosed(f"rank {self._rank} sent a {type(message).__name__}, expected the result of a step")
        self._engine.send(message)
