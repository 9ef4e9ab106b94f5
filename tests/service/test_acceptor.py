from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from moe_forward.acceptor import REFUSALS_AT_ONCE, Acceptor

WAIT_SECONDS = 10.0


class FakeTaker:
    """Keeps the connections that it is given."""

    def __init__(self) -> None:
        self.connections = 0
        self.handed = 0
        self.taken: list[socket.socket] = []

    def take(self, connection: socket.socket) -> None:
        self.taken.append(connection.dup())

    def close_one(self) -> None:
        self.taken.pop().close()
        self.connections -= 1


class Door:
    """A listener, who takes from it, and clients. starved: how often accepting fails for want of descriptors."""

    def __init__(self, takers: int, share: int = 100) -> None:
        self.takers = [FakeTaker() for _ in range(takers)]
        self.here = list(self.takers)
        self.starved = 0
        self._clients: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.acceptor = Acceptor(self, lambda: self.here, share)  # type: ignore[arg-type]

    def setblocking(self, flag: bool) -> None:
        self._listener.setblocking(flag)

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        if self.starved:
            self.starved -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()

    def connect(self, count: int) -> None:
        self._clients += [socket.create_connection(self._listener.getsockname()) for _ in range(count)]

    async def taken(self, *expected: int) -> None:
        """Wait until each taker has so many connections."""

        async def wait() -> None:
            while [taker.connections for taker in self.takers] != list(expected):
                await asyncio.sleep(0.005)

        await asyncio.wait_for(wait(), WAIT_SECONDS)

    def close(self) -> None:
        self.acceptor.close()
        for sock in (self._listener, *self._clients, *(sock for taker in self.takers for sock in taker.taken)):
            sock.close()


@pytest.fixture
def doors() -> Iterator[list[Door]]:
    made: list[Door] = []
    yield made
    for door in made:
        door.close()


async def test_connections_that_stay_are_shared_evenly(doors: list[Door]) -> None:
    doors.append(door := Door(takers=4))
    door.connect(8)
    door.acceptor.resume()
    await door.taken(2, 2, 2, 2)
    door.connect(100)
    await door.taken(27, 27, 27, 27)


async def test_a_new_connection_goes_where_the_fewest_are_open(doors: list[Door]) -> None:
    doors.append(door := Door(takers=2))
    door.connect(6)
    door.acceptor.resume()
    await door.taken(3, 3)
    for _ in range(2):
        door.takers[1].close_one()
    door.connect(2)
    await door.taken(3, 3)
    assert [taker.handed for taker in door.takers] == [3, 5]


async def test_short_connections_are_shared_too(doors: list[Door]) -> None:
    doors.append(door := Door(takers=2))
    door.acceptor.resume()
    for number in range(6):
        door.connect(1)
        while sum(taker.handed for taker in door.takers) == number:
            await asyncio.sleep(0.001)
        next(taker for taker in door.takers if taker.connections).close_one()
    assert [taker.handed for taker in door.takers] == [3, 3]


async def test_connections_wait_while_nobody_is_there_to_take_them(doors: list[Door]) -> None:
    doors.append(door := Door(takers=1))
    door.here = []
    door.connect(3)
    door.acceptor.resume()
    await asyncio.sleep(0.05)
    assert door.takers[0].handed == 0
    door.here = list(door.takers)
    door.acceptor.resume()
    await door.taken(3)


async def test_beyond_its_share_a_taker_gets_what_it_can_refuse_at_a_time_and_no_more(doors: list[Door]) -> None:
    doors.append(door := Door(takers=1, share=2))
    door.acceptor.resume()
    most = 2 + REFUSALS_AT_ONCE
    door.connect(most + 3)
    await door.taken(most)
    await asyncio.sleep(0.05)
    assert door.takers[0].handed == most
    for _ in range(3):
        door.takers[0].close_one()
    door.acceptor.resume()
    await door.taken(most)
    assert door.takers[0].handed == most + 3


async def test_a_lack_of_descriptors_is_told_and_passes(doors: list[Door], caplog: pytest.LogCaptureFixture) -> None:
    doors.append(door := Door(takers=1))
    door.starved = 1
    door.connect(2)
    door.acceptor.resume()
    await door.taken(2)
    assert "connections cannot be accepted: Too many open files" in caplog.text


async def test_after_closing_nothing_is_accepted(doors: list[Door]) -> None:
    doors.append(door := Door(takers=1))
    door.acceptor.resume()
    door.acceptor.close()
    door.acceptor.resume()
    door.connect(1)
    await asyncio.sleep(0.05)
    assert door.takers[0].handed == 0
