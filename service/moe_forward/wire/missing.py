"""How a reply says that its rank group lacked experts: headers in every encoding, fields where the body has room."""

from __future__ import annotations

from dataclasses import dataclass

from moe_forward.types import ForwardResult
from moe_forward.wire.base import WireReply

DEGRADED, MISSING_ROUTES = "x-moe-degraded", "x-moe-missing-routes"


@dataclass(frozen=True, slots=True)
class Missing:
    """What a reply was made without.

    routes: of the request to experts that are missing, which added nothing. experts: that are missing, of num_experts.
    """

    routes: int
    experts: int
    num_experts: int

    @property
    def fields(self) -> dict[str, int]:
        """For a body or parameters in JSON."""
        return {"missing_routes": self.routes, "missing_experts": self.experts}

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """That the group lacks experts, and how many routes that cost the request, if any."""
        degraded = (DEGRADED, f"missing-experts={self.experts} of {self.num_experts}")
        return (degraded, (MISSING_ROUTES, str(self.routes))) if self.routes else (degraded,)


def missing_of(result: ForwardResult, num_experts: int) -> Missing | None:
    """Return what a result was made without; None for a group with all experts."""
    return Missing(result.missing_routes, result.missing_experts, num_experts) if result.missing_experts else None


def marked(reply: WireReply, missing: Missing | None) -> WireReply:
    """Return the reply with the headers that say what it was made without."""
    return reply if missing is None else reply._replace(headers=(*reply.headers, *missing.headers))
