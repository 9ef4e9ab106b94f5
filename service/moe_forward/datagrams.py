"""How a message becomes the bytes of a datagram, and comes out of them again.

The messages of every request and step are packed structs (`packed_messages`); the rare ones (hello, status, slabs) are
JSON (`json_messages`). The first byte says which. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from moe_forward import json_messages, packed_messages
from moe_forward.errors import ChannelClosed
from moe_forward.messages import Message, Several

_SEVERAL = 17
_SEVERAL_HEAD = bytes((_SEVERAL,))
_COUNT = struct.Struct("<I")
_COUNT_AND_KIND = struct.Struct("<IB")


class Decoders(dict[int, Callable[[memoryview], Message]]):
    """How to read messages, by kind."""

    def __missing__(self, number: int) -> NoReturn:
        raise ValueError(f"unknown message kind {number}")


def _pack_several(m: Several) -> bytes:
    return _join(list(map(pack, m.messages)))


_CODECS = {**packed_messages.CODECS, **json_messages.CODECS}
_ENCODERS = {kind: (bytes((number,)), encode) for kind, (number, encode, _) in _CODECS.items()}
_ENCODERS[Several] = (_SEVERAL_HEAD, _pack_several)
DECODERS = Decoders({number: decode for number, _, decode in _CODECS.values()})
ENGINE_DECODERS = Decoders({**DECODERS, **packed_messages.OF_ENGINE})
"""The same, but a step's result as a `RankWord`."""


def pack(message: Message) -> bytes:
    """Return the datagram for `message`."""
    number, encode = _ENCODERS[type(message)]
    return number + encode(message)


def pack_together(messages: Iterable[Message], most_bytes: int) -> list[bytes]:
    """Return datagrams for messages to one peer, as few as fit into `most_bytes` each (one alone may be longer)."""
    packed = list(map(pack, messages))
    if len(packed) < 2:
        return packed
    if 1 + sum(map(len, packed)) + 4 * len(packed) <= most_bytes:
        return [_bundle(packed)]
    return _bundles(packed, most_bytes)


def _bundles(packed: Sequence[bytes], most_bytes: int) -> list[bytes]:
    datagrams: list[bytes] = []
    waiting: list[bytes] = []
    size = 1
    for one in packed:
        if waiting and size + 4 + len(one) > most_bytes:
            datagrams.append(_datagram(waiting))
            waiting, size = [], 1
        waiting.append(one)
        size += 4 + len(one)
    return [*datagrams, _datagram(waiting)]


def _datagram(packed: Sequence[bytes]) -> bytes:
    return packed[0] if len(packed) == 1 else _bundle(packed)


def _bundle(packed: Sequence[bytes]) -> bytes:
    return _SEVERAL_HEAD + _join(packed)


def _join(packed: Sequence[bytes]) -> bytes:
    parts: list[bytes] = []
    for one in packed:
        parts += (_COUNT.pack(len(one)), one)
    return b"".join(parts)


def unpack(data: memoryview, decoders: Decoders = DECODERS) -> Message:
    """Return the message of a datagram; raises ValueError for a kind this version does not know."""
    number = data[0]
    if number == _SEVERAL:
        return Several(_messages(data, decoders))
    return decoders[number](data[1:])


def _messages(data: memoryview, decoders: Decoders) -> tuple[Message, ...]:
    """Return the messages of a datagram of several, which does not hold another such."""
    messages: list[Message] = []
    at, end = 1, len(data)
    while at < end:
        size, number = _COUNT_AND_KIND.unpack_from(data, at)
        start, at = at + 5, at + 4 + size
        if not size or at > end:
            raise ValueError("a datagram of several messages is cut off")
        messages.append(decoders[number](data[start:at]))
    return tuple(messages)


def read(data: memoryview, decoders: Decoders = DECODERS) -> Message:
    """Return the message in what a peer sent; what cannot be read means another program or version.

    Raises: ChannelClosed.
    """
    try:
        return unpack(data, decoders)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ChannelClosed(f"a message could not be read: {error}") from error
