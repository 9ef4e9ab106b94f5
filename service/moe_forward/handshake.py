"""How two hosts' processes prove to each other, over TCP, that they belong to the same service.

Both know a random secret that the supervisor gave them at their start. Each sends a nonce, and proves with an
HMAC-SHA256 over both nonces, its part and the address that it knows the secret; the secret never travels. What comes
afterwards is neither encrypted nor signed: the network between the hosts of one service must be its own.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
from dataclasses import dataclass, field

from moe_forward.errors import ChannelClosed

SECRET_BYTES = 32
HANDSHAKE_SECONDS = 5.0
"""Until a stranger who says nothing is hung up on."""

BACKLOG_CONNECTIONS = 1024
"""More than there are ranks: all of them connect at once."""

_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_GREETING = b"moe-forward ranks 1\n"
"""The number changes with the messages and frames, which another version would read wrongly."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process of this service listens for its others.

    host: an IP address of its own, never a wildcard. secret: what the two must know.
    """

    host: str
    port: int
    secret: bytes = field(repr=False)


def new_secret() -> bytes:
    """Return a random secret."""
    return secrets.token_bytes(SECRET_BYTES)


def listen(host: str, port: int) -> socket.socket:
    """Listen on one address; port 0 takes a free one. Raises OSError when it cannot be had."""
    sock = socket.socket(_family(host), socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG_CONNECTIONS)
    except OSError:
        sock.close()
        raise
    return sock


def call(address: Address) -> socket.socket:
    """Connect to who listens at `address` and prove each other.

    Raises: OSError when nobody listens there; ChannelClosed when it is somebody else.
    """
    sock = socket.create_connection((address.host, address.port), HANDSHAKE_SECONDS)
    try:
        _send(sock, _GREETING)
        _expect_greeting(sock)
        theirs, mine = _receive(sock, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
        _send(sock, mine + _proof(address, b"caller", theirs, mine))
        _check(_receive(sock, _PROOF_BYTES), _proof(address, b"listener", theirs, mine))
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def welcome(sock: socket.socket, address: Address) -> None:
    """See that who connected to us at `address` knows the secret, and prove that we do.

    Raises: ChannelClosed.
    """
    sock.settimeout(HANDSHAKE_SECONDS)
    mine = secrets.token_bytes(_NONCE_BYTES)
    _send(sock, _GREETING + mine)
    _expect_greeting(sock)
    theirs = _receive(sock, _NONCE_BYTES)
    _check(_receive(sock, _PROOF_BYTES), _proof(address, b"caller", mine, theirs))
    _send(sock, _proof(address, b"listener", mine, theirs))
    sock.settimeout(None)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _proof(address: Address, part: bytes, listeners: bytes, callers: bytes) -> bytes:
    where = f"{address.host} {address.port}".encode()
    return hmac.digest(address.secret, b"\0".join((part, listeners, callers, where)), "sha256")


def _check(given: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(given, expected):
        raise ChannelClosed("the other end does not know this service's secret")


def _expect_greeting(sock: socket.socket) -> None:
    greeting = _receive(sock, len(_GREETING))
    if greeting != _GREETING:
        raise ChannelClosed(f"the other end says {greeting!r}, expected {_GREETING!r}: another program or version")


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except OSError as error:
        raise ChannelClosed(f"the other end went away during the handshake: {error}") from error


def _receive(sock: socket.socket, nbytes: int) -> bytes:
    """Return exactly `nbytes`, or raise ChannelClosed when they do not come in time."""
    received = b""
    while len(received) < nbytes:
        try:
            part = sock.recv(nbytes - len(received))
        except OSError as error:
            raise ChannelClosed(f"the other end went away during the handshake: {error}") from error
        if not part:
            raise ChannelClosed("the other end hung up during the handshake")
        received += part
    return received
