"""Record how large the inputs of the experts' matrices are, for `moe-forward quantize --calibration`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_forward.integrations.transformers.families import find_blocks, find_family


@contextmanager
def record_calibration(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Write a calibration file of all that a model computes inside the context; nothing when it ends by an error.

        with record_calibration(model, "calibration.safetensors"), torch.no_grad():
            for batch in batches:
                model(**batch)

    Some hundred thousand tokens of the kind that will be served are plenty: a number for each channel is estimated.
    Leave padding out, it counts like any token. The first GEMM of every expert is computed twice meanwhile.

    model: of a family in `FAMILIES`, any float type and device, its experts in memory and not attached to a service.
    path: of the file, with `layers.{L}.gate_up` [H] and `layers.{L}.down` [E, I] float32, the mean squares of the
        input channels of the gate and up, and of each expert's down matrix, for every MoE layer L.
    Raises: ValueError for another model; at the end, for a layer that saw no token, or NaN or Inf.
    """
    family = find_family(model)
    blocks = find_blocks(model, (family.block,))
    if not blocks:
        raise ValueError(f"model: expected decoder layers with a {family.block}, found none")
    moments = {layer: _Moments(layer, slot.child.get_submodule("experts")) for layer, slot in blocks.items()}
    with ExitStack() as hooks:
        for layer, slot in blocks.items():
            handle = slot.child.get_submodule("experts").register_forward_pre_hook(partial(_observe, moments[layer]))
            hooks.callback(handle.remove)
        yield
    tensors: dict[str, Tensor] = {}
    for layer, found in moments.items():
        tensors[f"layers.{layer}.gate_up"], tensors[f"layers.{layer}.down"] = found.means()
    part = Path(path).with_name(f".{Path(path).name}.part")
    save_file(tensors, part, metadata={"format": "pt", "tokens": str(max(found.tokens for found in moments.values()))})
    os.replace(part, path)


class _Moments:
    """Sums of squares of one layer's activations, float64 on the CPU.

    tokens: that the layer saw. gate_up: [H]. routed: [E] int64, tokens of each expert. down: [E, I].
    """

    def __init__(self, layer: int, experts: Any) -> None:
        gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
        if not (
            isinstance(gate_up, Tensor)
            and isinstance(down, Tensor)
            and gate_up.is_floating_point()
            and gate_up.ndim == down.ndim == 3
            and gate_up.shape[1:] == (2 * down.shape[2], down.shape[1])
        ):
            raise ValueError(
                f"layer {layer}: expected experts with gate_up_proj [E, 2I, H] and down_proj [E, H, I] in floating "
                f"point, got {type(experts).__name__}"
            )
        self.layer, self.tokens = layer, 0
        self.gate_up = torch.zeros(gate_up.shape[2], dtype=torch.float64)
        self.down = torch.zeros(down.shape[0], down.shape[2], dtype=torch.float64)
        self.routed = torch.zeros(down.shape[0], dtype=torch.int64)

    def add(self, experts: Any, hidden_states: Tensor, ids: Tensor) -> None:
        """Add tokens [T, H] and the experts [T, K] they go to."""
        if experts.gate_up_proj.is_meta:
            raise ValueError(f"layer {self.layer}: the weights of its experts are on the meta device")
        self.tokens += len(hidden_states)
        self.gate_up += _squares(hidden_states)
        for expert in torch.unique(ids).tolist():
            if expert >= len(self.routed):
                continue  # how transformers marks a slot without an expert
            rows = hidden_states[(ids == expert).any(dim=1)]
            gate, up = nn.functional.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            self.down[expert] += _squares(experts.act_fn(gate) * up)
            self.routed[expert] += len(rows)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean squares [H] and [E, I] float32; zeros for an expert without tokens."""
        if not self.tokens:
            raise ValueError(f"layer {self.layer} saw no token: run the model inside the context")
        gate_up = (self.gate_up / self.tokens).float()
        down = (self.down / self.routed.clamp(min=1).unsqueeze(1)).float()
        if not bool(gate_up.isfinite().all() and down.isfinite().all()):
            raise ValueError(f"layer {self.layer}: its activations held NaN or Inf")
        return gate_up, down


def _observe(moments: _Moments, experts: nn.Module, inputs: tuple[Any, ...]) -> None:
    hidden_states, ids = inputs[0], inputs[1]
    with torch.no_grad():
        moments.add(experts, hidden_states.reshape(-1, hidden_states.shape[-1]), ids.reshape(-1, ids.shape[-1]))


def _squares(rows: Tensor) -> Tensor:
    """Sums over rows [T, C] of the squares of each column, [C] float64 on the CPU."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64)
    return norms.square().cpu()
