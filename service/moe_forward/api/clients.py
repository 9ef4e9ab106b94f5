"""Who sent a request, as a number that the engine can be fair by."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from hashlib import blake2b

from starlette.types import Scope

from moe_forward.api.keys import caller

HOST_BITS = 64
"""Of an IPv6 address: one machine may have them all, so they do not tell clients apart."""


def client_number(scope: Scope) -> int:
    """Return a stable 64-bit number of the API key's name, or of the peer's address where nobody is asked for a key.

    The same from every front end, and after a restart.
    """
    name = caller(scope)
    if name is not None:
        return _number("key", name)
    address = scope.get("client")
    return _number("address", address[0] if address else "")


@lru_cache(maxsize=4096)
def _number(kind: str, name: str) -> int:
    if kind == "address" and ":" in name:
        name = str(ipaddress.IPv6Network((name.partition("%")[0], 128 - HOST_BITS), strict=False))
    return int.from_bytes(blake2b(f"{kind} {name}".encode(), digest_size=8).digest(), "little")
