"""One layer over all ranks: tokens to the ranks of their experts, through them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class StepNotes:
    """What a rank notes of a step on its device: one piece of memory, so that it is one copy to the host.

    memory: [8 * (E + 3) + T] uint8. num_experts: E, room for every expert, since a rank may hold them all.
    """

    def __init__(self, memory: Tensor, num_experts: int) -> None:
        self.memory = memory
        self._num_experts = num_experts
        self._counts_bytes = 8 * (num_experts + 3)

    @classmethod
    def zeros(cls, shape: TokenShape, tokens: int) -> StepNotes:
        """Nothing noted yet, of a step with so many tokens."""
        memory = torch.zeros(8 * (shape.num_experts + 3) + tokens, dtype=torch.uint8, device=shape.device)
        return cls(memory, shape.num_experts)

    def first(self, tokens: int) -> StepNotes:
        """Return the part of a step with fewer tokens."""
        return StepNotes(self.memory[: self._counts_bytes + tokens], self._num_experts)

    def over(self, memory: Tensor) -> StepNotes:
        """Return the same view of a copy of the memory."""
        return StepNotes(memory, self._num_experts)

    @property
    def values(self) -> Tensor:
        """[E + 3] int64: payload bytes from and to other ranks, then where each local expert's rows end, from 0."""
        return self.memory[: self._counts_bytes].view(torch.int64)

    @property
    def moved_bytes(self) -> Tensor:
        """[2] int64: bytes that came in dispatch, and that went back in combine."""
        return self.values[:2]

    @property
    def offsets(self) -> Tensor:
        """[E + 1] int64, of which a rank uses the first E_local + 1; see `Dispatched.offsets`."""
        return self.values[2:]

    @property
    def non_finite(self) -> Tensor:
        """[T] bool: rows with NaN or Inf."""
        return self.memory[self._counts_bytes :].view(torch.bool)


class Room(NamedTuple):
    """Where the tokens of a step are laid before they are forwarded, and what is noted of them.

    tokens: [T, H] e4m3 with scales. ids: [P, K] int64, P at least T; who lays down tokens also fills the rows behind
    them with -1. weights: [P, K] float32. shared: [T] bool, tokens that get the shared experts' output too; not read
    where none does. notes: of T tokens.
    """

    tokens: Quantized
    ids: Tensor
    weights: Tensor
    shared: Tensor
    notes: StepNotes

    @classmethod
    def new(cls, shape: TokenShape, tokens: int) -> Room:
        """Make room for so many tokens."""
        values = torch.empty(tokens, shape.hidden_size, dtype=torch.float8_e4m3fn, device=shape.device)
        scales = torch.empty(tokens, shape.scale_columns, device=shape.device)
        ids = torch.empty(tokens, shape.top_k, dtype=torch.int64, device=shape.device)
        weights = torch.empty(tokens, shape.top_k, device=shape.device)
        wanted = torch.empty(tokens, dtype=torch.bool, device=shape.device)
        return cls(Quantized(values, scales), ids, weights, wanted, StepNotes.zeros(shape, tokens))


class LayerForward:
    """The layer as it is, for any number of tokens that the exchange takes. shape: of the tokens."""

    def __init__(self, exchange: Exchange, experts: Experts, shape: TokenShape) -> None:
        self._exchange = exchange
        self._experts = experts
        self.shape = shape

    def room(self, tokens: int, most_tokens: int) -> Room:
        """Make room for a step in which this rank has `tokens`; most_tokens is for a forward that pads."""
        return Room.new(self.shape, tokens)

    def forward(self, layer: int, room: Room, with_shared: bool, clock: PhaseClock, *, most_tokens: int) -> Tensor:
        """Forward the tokens that were laid into `room`; collective. See `compute`.

        with_shared: some token gets the shared experts' output. most_tokens: as `room` was asked with.
        """
        shared = room.shared if with_shared else None
        return self.compute(layer, room.tokens, room.ids, room.weights, shared, clock, notes=room.notes)

    def compute(
        self,
        layer: int,
        tokens: Quantized,
        topk_ids: Tensor,
        topk_weights: Tensor,
        shared_tokens: Tensor | None,
        clock: PhaseClock,
        *,
        notes: StepNotes | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Forward this rank's tokens; collective: every rank of the group makes the same call.

        layer: id of a served layer. tokens: [T, H] e4m3 with scales.
        topk_ids: [T, K] int64 or int32, -1 for a slot of no expert. topk_weights: [T, K] float32.
        shared_tokens: [T] bool, tokens that get the shared experts' output too; None for no token.
        clock: times the phases.
        notes: what is counted of this forward is written there.
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
        if notes is not None:
            notes.offsets[: len(received.offsets)].copy_(received.offsets)
            self._exchange.count_bytes(rows, received.handle, notes.moved_bytes)
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
            self.compute(layer, *self.shape.example(2), wanted, Untimed())

    def close(self) -> None:
        """Leave the group, with every other rank."""
        self._exchange.close()
