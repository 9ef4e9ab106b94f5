"""moe-forward: the MoE part of a transformer layer as a service."""

from __future__ import annotations

from moe_forward.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]

__version__ = "0.1.0"
