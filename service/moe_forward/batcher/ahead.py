"""What is at the ranks already, and so when the next step should leave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

LEAD_SECONDS = 100e-6
"""How long before the ranks are free a step that could still grow leaves: not longer than the way to them and back."""
COPY_LEAD_SECONDS = 1e-3
"""The same for a full step of large requests, whose rows take that long to a device."""


@dataclass(frozen=True)
class Ahead:
    """The steps at the ranks. end_seconds: when they are expected to be done; infinite where that is not known.

    last_seconds: how long the last of them takes. large: there are large requests in them.
    """

    end_seconds: float
    last_seconds: float
    large: bool

    @cached_property
    def hurry_seconds(self) -> float:
        """When a step that could still grow should leave; asked for twice a request, and the same for a whole step."""
        return self.leave_seconds(LEAD_SECONDS)

    def leave_seconds(self, lead_seconds: float) -> float:
        """Return when to send the next step: so long before the end, but not before half of the last step is over,
        since short steps, too, shall gather who comes while they run."""
        if self.end_seconds == math.inf:
            return math.inf
        return self.end_seconds - min(lead_seconds, self.last_seconds / 2)
