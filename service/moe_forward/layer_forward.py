"""One layer over all ranks: tokens to the ranks of their experts, through them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_forward.exchange import Exchange
from moe_forward.experts import Experts, PhaseClock
from moe_forward.stopwatch import Untimed
from w4afp8 import Quantized


@dataclass(frozen=True, slots=True)
class TokenShape:
    """What the tokens of every step have in common.

    hidden_size, top_k, num_experts: H, K and E. scale_columns: activation scales of a token, 1 or H/128.
    shared: the model has shared experts. device: where they are computed.
    """

    hidden_size: int
    top_k: int
    num_experts: int
    scale_columns: int
    shared: bool
    device: torch.device

    def example(self, tokens: int) -> tuple[Quantized, Tensor, Tensor]:
        """Make zero tokens [tokens, H], ids [tokens, K] that go round all experts, and weights [tokens, K]."""
        values = torch.zeros(tokens, self.hidden_size, dtype=torch.uint8, device=self.device)
        scales = torch.zeros(tokens, self.scale_columns, device=self.device)
        slots = torch.arange(tokens * self.top_k, device=self.device).view(tokens, self.top_k)
        weights = torch.ones(tokens, self.top_k, device=self.device)
        return Quantized(values.view(torch.float8_e4m3fn), scales), slots % self.num_experts, weights


class StepCounts:
    """What a rank counts of a step on its device: one tensor, so that it is one copy to the host.

    values: [E + 3] int64: payload bytes from and back to other ranks, then where each local expert's rows end, from 0.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def zeros(cls, shape: TokenShape) -> StepCounts:
        """Nothing counted yet; there is room for every expert, since a rank may hold them all."""
        return cls(torch.zeros(shape.num_experts + 3, dtype=torch.int64, device=shape.device))

    @classmethod
    def empty(cls, shape: TokenShape) -> StepCounts:
        """Room for a forward to count into."""
        return cls(torch.empty(shape.num_experts + 3, dtype=torch.int64, device=shape.device))

    @property
    def moved_bytes(self) -> Tensor:
        """[2] int64: bytes that came in dispatch, and that went back in combine."""
        return self.values[:2]

    @property
    def offsets(self) -> Tensor:
        """[E + 1] int64, of which a rank uses the first E_local + 1; see `Dispatched.offsets`."""
        return self.values[2:]


class LayerForward:
    """The layer as it is, for any number of tokens that the exchange takes. shape: of the tokens."""

    def __init__(self, exchange: Exchange, experts: Experts, shape: TokenShape) -> None:
        self._exchange = exchange
        self._experts = experts
        self.shape = shape

    def forward(
        self,
        layer: int,
        tokens: Quantized,
        topk_ids: Tensor,
        topk_weights: Tensor,
        shared_tokens: Tensor | None,
        clock: PhaseClock,
        *,
        most_tokens: int | None = None,
        counts: StepCounts | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Forward this rank's tokens; collective: every rank of the group makes the same call.

        layer: id of a served layer. tokens: [T, H] e4m3 with scales.
        topk_ids: [T, K] int64 or int32, -1 for a slot of no expert. topk_weights: [T, K] float32.
        shared_tokens: [T] bool, tokens that get the shared experts' output too; None for no token.
        clock: times the phases.
        most_tokens: the largest T of all ranks, for a forward that pads; not needed here.
        counts: written over with what is counted of this forward.
        out: [T, H] float32 to write into.
        Returns: `out`, else [T, H] float32, or bfloat16 where the exchange combines in it and nothing was added.
        """
        with clock("dispatch"):
            received = self._exchange.dispatch(tokens, topk_ids.long(), topk_weights)
        rows = self._experts.forward(
            layer, received.rows, received.offsets, received.weights, received.expected_rows, clock
        )
        with clock("combine"):
            output = self._exchange.combine(rows, received.handle)
        if counts is not None:
            counts.offsets[: len(received.offsets)].copy_(received.offsets)
            self._exchange.count_bytes(rows, received.handle, counts.moved_bytes)
        if shared_tokens is not None:
            with clock("shared_experts"):
                # For every token, since which of them want it is known on the device only; a NaN of one that does not
                # must not reach it, so it is chosen, not multiplied.
                routed = output.float()
                both = routed + self._experts.shared(layer, tokens)
                return torch.where(shared_tokens.unsqueeze(1), both, routed, out=out)
        return output if out is None else out.copy_(output)

    def warm_up(self, layers: Sequence[int]) -> None:
        """Forward a few tokens through every layer, so that the first request pays for no first call; collective."""
        for layer in layers:
            wanted = torch.ones(2, dtype=torch.bool, device=self.shape.device) if self.shape.shared else None
            self.forward(layer, *self.shape.example(2), wanted, Untimed())

    def close(self) -> None:
        """Leave the group, with every other rank."""
        self._exchange.close()
