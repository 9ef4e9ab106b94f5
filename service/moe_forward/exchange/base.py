"""What moves tokens between ranks: to the ranks of their experts, and the experts' rows back.

The shape of it is DeepEP's (github.com/deepseek-ai/DeepEP, ElasticBuffer): dispatch returns rows grouped by local
expert with the group boundaries on the device; combine sums a token's rows. Routing weights are applied by the
experts, in the down projection's epilogue, so combine only adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from w4afp8 import Quantized


@dataclass(frozen=True, slots=True)
class Dispatched:
    """The rows this rank's experts compute in one step.

    rows: [R, H] e4m3 with their scales, sorted by local expert, inside one by source rank, token and slot.
    offsets: [E_local + 1] int64, on the rows' device; rows of local expert e are [offsets[e], offsets[e + 1]).
    weights: [R] float32, routing weight of each row.
    handle: what this exchange needs to combine; valid for one `combine`.
    """

    rows: Quantized
    offsets: Tensor
    weights: Tensor
    handle: Any


class Exchange(Protocol):
    """One rank's part in the collective movement of tokens. Every rank makes the same calls, also with no tokens."""

    name: str

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Send each token once to every rank that holds one of its experts.

        tokens: [T, H] e4m3 with scales [T, S] float32, this rank's rows (T may be 0 and differs between ranks).
        topk_ids: [T, K] int64, global expert ids. topk_weights: [T, K] float32.
        """
        ...

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Bring the experts' rows back and add each token's K contributions in the order of its slots.

        rows: [R, H] float32 in the order of `Dispatched.rows`, already times their routing weight.
        Returns: [T, H] float32.
        """
        ...

    def close(self) -> None:
        """Leave the group."""
        ...
