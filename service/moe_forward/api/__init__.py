"""The HTTP front end: routes, errors, and the way of a request body into and out of the slab."""

from __future__ import annotations

from moe_forward.api.app import create_app

__all__ = ["create_app"]
