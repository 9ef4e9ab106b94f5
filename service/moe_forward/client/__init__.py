"""Python client of moe-forward: tensors in, tensors out, over HTTP.

    with Client("http://127.0.0.1:8000") as client:
        output = client.forward(hidden_states, layer=3)

`Client` and `AsyncClient` have the same calls. Each takes and gives torch tensors or numpy arrays, whichever it was
given. Everything raised about a call is a `MoEForwardClientError`; wrong arguments are TypeError or ValueError and
send nothing. A result that lacks what some experts would have added comes with the warning `MissingExperts`.
"""

from __future__ import annotations

from moe_forward.client.asynchronous import AsyncClient
from moe_forward.client.blocking import Client
from moe_forward.client.errors import (
    DeadlineExceeded,
    MissingExperts,
    MoEForwardClientError,
    RequestRefused,
    ServerFailed,
    TransportFailed,
    Unavailable,
)
from moe_forward.client.trust import read_api_key

__all__ = [
    "AsyncClient",
    "Client",
    "DeadlineExceeded",
    "MissingExperts",
    "MoEForwardClientError",
    "RequestRefused",
    "ServerFailed",
    "TransportFailed",
    "Unavailable",
    "read_api_key",
]
