"""Two hosts' processes prove to each other that they know the service's secret; everybody else is hung up on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from moe_forward import handshake
from moe_forward.errors import ChannelClosed
from moe_forward.handshake import Address, call, listen, new_secret, welcome

GREETING_BYTES = len(handshake._GREETING)


class Listener:
    """Welcomes one caller in a thread. error: why it did not."""

    def __init__(self, secret: bytes, serve: Callable[[socket.socket, Address], None] = welcome) -> None:
        self.error: Exception | None = None
        self._listener = listen("127.0.0.1", 0)
        self._listener.settimeout(20.0)
        self.address = Address("127.0.0.1", self._listener.getsockname()[1], secret)
        self._thread = threading.Thread(target=self._run, args=(serve,))
        self._thread.start()

    def _run(self, serve: Callable[[socket.socket, Address], None]) -> None:
        sock, _ = self._listener.accept()
        with sock:
            try:
                serve(sock, self.address)
                sock.sendall(b"in")
            except Exception as error:
                self.error = error

    def join(self) -> Exception | None:
        self._thread.join(20.0)
        assert not self._thread.is_alive()
        self._listener.close()
        return self.error


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, Listener]]:
    """A connection to a listener that has not said anything yet."""
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.5)
    listener = Listener(new_secret())
    with socket.create_connection((listener.address.host, listener.address.port), 20.0) as sock:
        yield sock, listener
    listener.join()


def hung_up(sock: socket.socket) -> bool:
    """Read until the end; True where it comes, whatever was said before."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        return True
    return True


def test_both_who_know_the_secret_are_connected_and_wait_without_limit() -> None:
    listener = Listener(new_secret())
    with call(listener.address) as sock:
        assert sock.recv(2) == b"in"
        assert sock.gettimeout() is None
    assert listener.join() is None


def test_a_caller_with_another_secret_is_hung_up_on() -> None:
    listener = Listener(new_secret())
    with pytest.raises(ChannelClosed, match=r"during the handshake"):
        call(replace(listener.address, secret=new_secret()))
    assert "does not know this service's secret" in str(listener.join())


def test_a_proof_for_another_address_is_worth_nothing() -> None:
    listener = Listener(new_secret())
    elsewhere = replace(listener.address, host="127.0.0.2")

    def answer_as_listener_of_another_address() -> None:
        with socket.create_connection((listener.address.host, listener.address.port), 20.0) as sock:
            mine = b"m" * 32
            sock.sendall(handshake._GREETING)
            handshake._expect_greeting(sock)
            theirs = handshake._receive(sock, 32)
            sock.sendall(mine + handshake._proof(elsewhere, b"caller", theirs, mine))
            assert hung_up(sock)

    answer_as_listener_of_another_address()
    assert "does not know this service's secret" in str(listener.join())


def test_a_listener_that_sends_the_callers_own_proof_back_is_found_out() -> None:
    def parrot(sock: socket.socket, address: Address) -> None:
        sock.sendall(handshake._GREETING + b"n" * 32)
        handshake._expect_greeting(sock)
        said = handshake._receive(sock, 64)
        sock.sendall(said[32:])
        assert hung_up(sock)

    listener = Listener(new_secret(), parrot)
    with pytest.raises(ChannelClosed, match="does not know this service's secret"):
        call(listener.address)
    listener.join()


@pytest.mark.parametrize(
    "says", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"moe-forward ranks 0\n" + b"x" * 96, bytes(range(256))]
)
def test_another_program_or_version_is_hung_up_on(stranger: tuple[socket.socket, Listener], says: bytes) -> None:
    sock, listener = stranger
    sock.sendall(says)
    assert hung_up(sock)
    assert "another program or version" in str(listener.join())


@pytest.mark.parametrize("part", [0, 3, GREETING_BYTES, GREETING_BYTES + 32, GREETING_BYTES + 63])
def test_who_falls_silent_in_the_middle_is_hung_up_on(stranger: tuple[socket.socket, Listener], part: int) -> None:
    sock, listener = stranger
    sock.sendall((handshake._GREETING + b"p" * 64)[:part])
    assert hung_up(sock)
    assert isinstance(listener.join(), ChannelClosed)


def test_random_bytes_in_place_of_a_proof_are_hung_up_on(stranger: tuple[socket.socket, Listener]) -> None:
    sock, listener = stranger
    sock.sendall(handshake._GREETING + b"p" * 64)
    assert hung_up(sock)
    assert "does not know this service's secret" in str(listener.join())


def test_a_secret_is_not_shown() -> None:
    address = Address("127.0.0.1", 1, new_secret())
    assert repr(address.secret) not in repr(address)
    assert "secret" not in repr(address)


def test_listening_is_on_one_address() -> None:
    with listen("127.0.0.2", 0) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", sock.getsockname()[1]), 5.0)
