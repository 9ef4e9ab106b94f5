"""Who gets which HTTP connection, where several front ends serve one port: the one that has the fewest open.

Accepting in all of them on one listening socket would be less work, but clients keep their connections: of eight that
came at once one process had taken all eight, and the other none.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

log = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 64
REFUSALS_AT_ONCE = 64
"""Connections beyond its share that a taker may be refusing at a time; further ones wait in the listen queue."""
PAUSE_SECONDS = 0.25


class Taker(Protocol):
    """Somebody who serves connections. connections: handed over and not yet closed. handed: ever."""

    connections: int
    handed: int

    def take(self, connection: socket.socket) -> None:
        """Hand a connection over; the caller closes its own descriptor."""
        ...


class Acceptor:
    """Accepts connections and hands them over; made on a running loop.

    listener: where they come. takers: who could take one now. share: connections that a taker serves at most.
    """

    def __init__(self, listener: socket.socket, takers: Callable[[], Iterable[Taker]], share: int) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._takers = takers
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._accepting = False
        self._closed = False

    def resume(self) -> None:
        """Accept again, if somebody has room: to be called when it may be so."""
        if not self._accepting and not self._closed and self._freest() is not None:
            self._accepting = True
            self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Accept no more; the listener stays open."""
        self._closed = True
        self._pause()

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        """Hand over what waits; while nobody has room, it goes on waiting."""
        for _ in range(ACCEPTED_AT_ONCE):  # then let other events have their turn
            taker = self._freest()
            if taker is None:
                self._pause()
                return
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors are left, here or in the whole system
                log.warning("connections cannot be accepted: %s", error.strerror)
                self._pause()
                self._loop.call_later(PAUSE_SECONDS, self.resume)
                return
            with connection:
                taker.connections += 1
                taker.handed += 1
                taker.take(connection)

    def _freest(self) -> Taker | None:
        """Return who has the fewest connections, None where nobody has room even to refuse one."""
        taker = min(self._takers(), key=lambda taker: (taker.connections, taker.handed), default=None)
        if taker is None or taker.connections >= self._share + REFUSALS_AT_ONCE:
            return None
        return taker
