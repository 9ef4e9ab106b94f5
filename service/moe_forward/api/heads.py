"""Request heads that came before: a client sends the same bytes with every call, and to parse them again costs more
than all else that HTTP asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

LONGEST_BYTES = 2048
"""Longer ones are not kept."""

MOST_HEADS = 256
"""Kept at a time, so half a megabyte of them."""


class Head(NamedTuple):
    """A request line with headers, of a call whose body follows as it is.

    scope: what an ASGI scope has of it, without what belongs to one connection; shared, so nobody may change it.
    body_bytes: of the body. keep_alive, expects_continue: what the headers ask for.
    notes: what applications made of this head, each under a key of its own.
    """

    scope: dict[str, Any]
    body_bytes: int
    keep_alive: bool
    expects_continue: bool
    notes: dict[object, Any]


class Heads:
    """The heads that connections of one server have parsed lately."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def find(self, text: bytes) -> Head | None:
        """Return what `text` means, None when it has not come before."""
        return self._known.get(text)

    def keep(self, text: bytes, head: Head) -> None:
        """Remember a head, unless it is a long one; for one too many all others are forgotten, which is rare: who has
        something new in every head, such as an id, gains nothing here and loses as little."""
        if len(text) > LONGEST_BYTES:
            return
        if len(self._known) == MOST_HEADS:
            self._known.clear()
        self._known[text] = head
