"""The HTTP front end: routes, errors, and the way of a request body into and out of the slab."""

from __future__ import annotations

from moe_forward.api.app import create_app
from moe_forward.api.keys import read_keys
from moe_forward.api.listening import allow_connections, listening
from moe_forward.api.reports import Reports
from moe_forward.api.server import server_settings
from moe_forward.api.tls import LiveContext, TlsFiles

__all__ = [
    "LiveContext",
    "Reports",
    "TlsFiles",
    "allow_connections",
    "create_app",
    "listening",
    "read_keys",
    "server_settings",
]
