"""The modules that stand in a model where its experts stood, and send their tokens to the service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_forward.client import Client


@dataclass(frozen=True, slots=True)
class RemoteLayer:
    """One MoE layer at the service. max_request_tokens: rows of one request at most."""

    client: Client
    layer: int
    max_request_tokens: int

    def forward(self, hidden_states: Tensor, routing: tuple[Tensor, Tensor] | None) -> Tensor:
        """Routed and shared experts' output for some tokens, in as many requests as their number needs.

        A token's output does not depend on its request, so the parts put together are what one request would give.

        hidden_states: [..., H] bfloat16, float16 or float32, any device.
        routing: ids [T, K] int64 and weights [T, K] any float type, of all tokens in order; None: the layer's gate.
        Returns: [..., H], type and device of hidden_states; backward through it raises NotImplementedError.
        Raises: MoEForwardClientError with the server's message.
        """
        ids, weights = routing if routing is not None else (None, None)
        output: Tensor = _WithoutBackward.apply(self, hidden_states, ids, weights)  # type: ignore[no-untyped-call]
        return output

    def _send(self, hidden_states: Tensor, ids: Tensor | None, weights: Tensor | None) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        parts = []
        for start in range(0, len(rows), self.max_request_tokens):
            part = slice(start, start + self.max_request_tokens)
            parts.append(
                self.client.forward(
                    rows[part],
                    layer=self.layer,
                    topk_ids=None if ids is None else ids[part],
                    topk_weights=None if weights is None else weights[part].float(),
                )
            )
        return torch.cat(parts).view(hidden_states.shape) if parts else torch.empty_like(hidden_states)


class _WithoutBackward(torch.autograd.Function):
    """Marks where gradients end: without it they would be lost in silence."""

    @staticmethod
    def forward(
        ctx: Any, remote: RemoteLayer, hidden_states: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        ctx.layer = remote.layer
        return remote._send(hidden_states, ids, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"layer {ctx.layer} is computed by a moe-forward service, which has no backward: detach to train"
        )


class RemoteBlock(nn.Module):
    """An MoE block that is the service's as a whole, its gate included."""

    def __init__(self, remote: RemoteLayer) -> None:
        super().__init__()
        self.remote = remote

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [B, S, H]. Returns: the same shape, type and device."""
        return self.remote.forward(hidden_states, None)


class RemoteExperts(nn.Module):
    """The experts inside a block whose gate stays local; their output has the shared experts' in it."""

    def __init__(self, remote: RemoteLayer) -> None:
        super().__init__()
        self.remote = remote

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [T, H]. top_k_index, top_k_weights: [T, K]. Returns: [T, H]."""
        return self.remote.forward(hidden_states, (top_k_index, top_k_weights))


class AddedByService(nn.Module):
    """Stands where a block adds its shared experts, whose output has come with that of the routed ones."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns: a zero that leaves what it is added to as it is."""
        return hidden_states.new_zeros(())


REPLACEMENTS: tuple[type[nn.Module], ...] = (RemoteBlock, RemoteExperts, AddedByService)
