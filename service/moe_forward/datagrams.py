"""How a message becomes the bytes of a datagram, and comes out of them again.

The messages of every request and step are packed structs (`packed_messages`); the rare ones (hello, status, slabs) are
JSON (`json_messages`). The first byte says which. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from moe_forward import json_messages, packed_messages
from moe_forward.errors import ChannelClosed
from moe_forward.messages import Message, Several

_SEVERAL = 17
_COUNT = struct.Struct("<I")
_CODECS = {**packed_messages.CODECS, **json_messages.CODECS}
_ENCODERS = {kind: (bytes((number,)), encode) for kind, (number, encode, _) in _CODECS.items()}
_DECODERS = {number: decode for number, _, decode in _CODECS.values()}


def pack(message: Message) -> bytes:
    """Return the datagram for `message`."""
    if type(message) is Several:
        return _bundle(map(pack, message.messages))
    number, encode = _ENCODERS[type(message)]
    return number + encode(message)


def pack_together(messages: Iterable[Message], most_bytes: int) -> Iterator[bytes]:
    """Yield datagrams for messages to one peer, as few as fit into `most_bytes` each (one alone may be longer)."""
    waiting: list[bytes] = []
    size = 1
    for packed in map(pack, messages):
        if waiting and size + 4 + len(packed) > most_bytes:
            yield _datagram(waiting)
            waiting, size = [], 1
        waiting.append(packed)
        size += 4 + len(packed)
    if waiting:
        yield _datagram(waiting)


def _datagram(packed: list[bytes]) -> bytes:
    return packed[0] if len(packed) == 1 else _bundle(packed)


def _bundle(packed: Iterable[bytes]) -> bytes:
    return bytes((_SEVERAL,)) + b"".join(part for one in packed for part in (_COUNT.pack(len(one)), one))


def unpack(data: memoryview) -> Message:
    """Return the message of a datagram; raises ValueError for a kind this version does not know."""
    number = data[0]
    if number == _SEVERAL:
        return Several(tuple(_messages(data)))
    return _unpack_one(number, data)


def _unpack_one(number: int, data: memoryview) -> Message:
    decode = _DECODERS.get(number)
    if decode is None:
        raise ValueError(f"unknown message kind {number}")
    message: Message = decode(data[1:])
    return message


def _messages(data: memoryview) -> Iterator[Message]:
    """Yield the messages of a datagram of several, which does not hold another such."""
    at = 1
    while at < len(data):
        (size,) = _COUNT.unpack_from(data, at)
        one = data[at + 4 : at + 4 + size]
        if len(one) < size:
            raise ValueError("a datagram of several messages is cut off")
        yield _unpack_one(one[0], one)
        at += 4 + size


def read(data: memoryview) -> Message:
    """Return the message in what a peer sent; what cannot be read means another program or version.

    Raises: ChannelClosed.
    """
    try:
        return unpack(data)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ChannelClosed(f"a message could not be read: {error}") from error
