"""Where requests go: an address, whom to trust there, and the fixed part of a request's head."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from moe_forward.client.trust import tls_settings

MEDIA_TYPE = "application/vnd.safetensors"
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Target:
    """A service.

    prefix: path before the service's own, without a slash at its end. authority: as the Host header names it.
    api_key: None sends none. ca_file: PEM certificates to trust; None trusts the usual authorities.
    """

    host: str
    port: int
    tls: bool
    prefix: str
    authority: str
    api_key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None

    def trust(self) -> ssl.SSLContext | None:
        """Return what a connection is checked with, None for plain HTTP."""
        if not self.tls:
            return None
        settings = tls_settings(True if self.ca_file is None else self.ca_file, None)
        return settings if isinstance(settings, ssl.SSLContext) else httpx.create_ssl_context()

    def head(self, path: str, body_bytes: int) -> bytes:
        """Return a POST's request line and headers. path: with its query, from the service's root."""
        lines = [
            f"POST {self.prefix}{path} HTTP/1.1",
            f"Host: {self.authority}",
            f"Content-Type: {MEDIA_TYPE}",
            f"Accept: {MEDIA_TYPE}",
            "Accept-Encoding: identity",
            f"Content-Length: {body_bytes}",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")


def parse_target(url: str, api_key: str | None, ca_file: Path | None) -> Target:
    """Read http://HOST[:PORT][/PREFIX], or https. Raises: ValueError for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or not url.isascii() or parts.query or parts.fragment:
        raise ValueError(f"URL must be http://HOST[:PORT] or https://HOST[:PORT], got {url!r}")
    authority = parts.netloc.rpartition("@")[2]
    tls = parts.scheme == "https"
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    return Target(parts.hostname, port, tls, parts.path.rstrip("/"), authority, api_key, ca_file)
