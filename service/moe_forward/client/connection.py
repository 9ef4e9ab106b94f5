"""How both clients connect: the keyword arguments that httpx' two clients share."""

from __future__ import annotations

from typing import Any

import httpx

from moe_forward.client.calls import check_token
from moe_forward.client.trust import Cert, Verify, tls_settings

DEFAULT_URL = "http://127.0.0.1:8000"

# No limit on connections: the caller's threads or tasks are the limit. An idle one is dropped before uvicorn's default
# of 5 seconds ends it, or a request could go out on a connection that is just being closed.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0)


def connection_options(base_url: str, api_key: str | None, verify: Verify, cert: Cert | None) -> dict[str, Any]:
    """Keyword arguments of `httpx.Client` and `httpx.AsyncClient`.

    Raises: ValueError naming the argument.
    """
    url = httpx.URL(base_url)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url must be http://HOST[:PORT] or https://HOST[:PORT], got {base_url!r}")
    headers = {"Accept-Encoding": "identity"}  # activations hardly compress, and trying costs more than sending
    if api_key is not None:
        headers["Authorization"] = f"Bearer {check_token('api_key', api_key)}"
    return {"base_url": url, "headers": headers, "limits": LIMITS, "verify": tls_settings(verify, cert)}
