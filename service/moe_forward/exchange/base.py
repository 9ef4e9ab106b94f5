"""What moves tokens between ranks: to the ranks of their experts, and the experts' rows back.

The shape of it is DeepEP's (github.com/deepseek-ai/DeepEP, ElasticBuffer): dispatch returns rows grouped by local
expert with the group boundaries on the device; combine sums a token's rows. Routing weights are applied by the
experts, in the down projection's epilogue, so combine only adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from w4afp8 import Quantized


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of several hosts meet: a store that rank 0 serves over TCP, on one address of its host.

    listener: on rank 0, the descriptor of the socket that is bound there; it is the store's from then on.
    """

    host: str
    port: int
    listener: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in a group, and the shape of what will travel.

    rank, ranks, num_experts: who, of how many, sharing which E experts.
    rendezvous: a file that every rank of the group sees and no other group uses, or where they meet over TCP.
    timeout_seconds: of one collective.
    device: where this rank's tensors lie.
    hidden_size, top_k: H and K.
    max_tokens: largest T that a rank passes to `dispatch`.
    scale_columns: scales of a token, 1 or H/128.
    """

    rank: int
    ranks: int
    num_experts: int
    rendezvous: Path | Meeting
    timeout_seconds: float
    device: torch.device
    hidden_size: int
    top_k: int
    max_tokens: int
    scale_columns: int


@dataclass(frozen=True, slots=True)
class Dispatched:
    """The rows this rank's experts compute in one step; valid until the exchange's next dispatch.

    rows: [R, H] e4m3 with their scales, grouped by local expert. Rows from offsets[-1] on belong to no expert: their
        values are undefined and may be NaN.
    offsets: [E_local + 1] int64, on the rows' device; rows of local expert e are [offsets[e], offsets[e + 1]).
    weights: [R] float32, routing weight of each row.
    expected_rows: of one expert if tokens spread evenly, at least 1; a hint, known on the host.
    handle: what this exchange needs to combine; valid for one `combine`.
    """

    rows: Quantized
    offsets: Tensor
    weights: Tensor
    expected_rows: int
    handle: Any


class Exchange(Protocol):
    """One rank's part in the collective movement of tokens. Every rank makes the same calls, also with no tokens.

    pads: True: every rank must pass the same T (callers add rows whose ids are all -1), R depends on T alone, nothing
        waits for the host, and a call can be captured in a CUDA graph. False: T may differ, R is exact.
    """

    name: str
    pads: bool

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Send each token to the ranks that hold its experts.

        tokens: [T, H] e4m3 with scales [T, S] float32, this rank's rows; T may be 0.
        topk_ids: [T, K] int64, global expert ids, distinct in a row; -1 is a slot of no expert.
        topk_weights: [T, K] float32.
        """
        ...

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Bring the experts' rows back and add each token's contributions, in an order that depends on its ids alone.

        rows: [R, H] float32 (CPU) or bfloat16 (GPU) in the order of `Dispatched.rows`, already times their routing
            weight; rows of no expert may hold anything.
        Returns: [T, H] float32 or bfloat16; zeros for a token without experts.
        """
        ...

    def count_bytes(self, rows: Tensor, handle: Any, out: Tensor) -> None:
        """Say how much payload moved between this rank and the others, without what an exchange adds to it.

        rows, handle: as `combine` was given them.
        out: [2] int64 on the rows' device, set to the bytes that came in dispatch and those that combine sent back.
        """
        ...

    def close(self) -> None:
        """Leave the group, with every other rank. CUDA graphs that hold its collectives must be gone by then."""
        ...


def token_bytes(hidden_size: int, scale_columns: int, top_k: int) -> int:
    """Payload of one token on its way to a rank: e4m3 values, float32 scales, int32 expert ids, float32 weights."""
    return hidden_size + 4 * scale_columns + 8 * top_k


def expected_rows(ranks: int, tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of one expert if `tokens` tokens of each rank spread evenly, at least 1."""
    return max(1, -(-ranks * tokens * top_k // num_experts))
