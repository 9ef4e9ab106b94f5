"""Gates: which experts a token goes to, and with what weights. One file a gate, one entry in each table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from moe_forward.gates.deepseek_v3 import SUM_FLOOR, deepseek_v3
from moe_forward.gates.softmax import softmax
from moe_forward.types import GateSpec
from w4afp8.routing import GateRule, Scores

Gate = Callable[[GateSpec, int, torch.Tensor, "torch.Tensor | None"], tuple[torch.Tensor, torch.Tensor]]

GATES: Mapping[str, Gate] = MappingProxyType({"deepseek_v3": deepseek_v3, "softmax": softmax})

KERNELS: Mapping[str, tuple[Scores, float] | None] = MappingProxyType(
    {"deepseek_v3": ("sigmoid", SUM_FLOOR), "softmax": ("softmax", 0.0)}
)
"""What computes each gate on a GPU: scores and the floor of their sum in `w4afp8.routing`; None: the gate's own torch
code, which is some hundred launches a step."""


def choose(
    spec: GateSpec, top_k: int, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts for tokens by the gate that `spec` names; the bits of a token depend on its own logits alone.

    spec: the layer's gate. top_k: experts a token gets.
    logits: [T, E] float32, router outputs.
    bias: [E] float32, added to scores for choosing only, or None.
    Returns: ids [T, K] int64, best first and equals by ascending id, and weights [T, K] float32.
    Raises: ValueError for an unknown gate, or arguments that do not fit.
    """
    gate = GATES.get(spec.kind)
    if gate is None:
        raise ValueError(f"gate: expected one of {', '.join(GATES)}, got {spec.kind!r}")
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits: expected float32 [T, E], got {logits.dtype} {list(logits.shape)}")
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts}, the number of experts, got {top_k}")
    if bias is not None and (bias.dtype != torch.float32 or list(bias.shape) != [experts]):
        raise ValueError(f"bias: expected float32 [{experts}], got {bias.dtype} {list(bias.shape)}")
    return gate(spec, top_k, logits, bias)


def kernel_rule(spec: GateSpec, top_k: int) -> GateRule | None:
    """Say how the kernel computes a gate, with the bits of `choose`.

    spec: the layer's gate. top_k: experts a token gets.
    Returns: the kernel's rule, or None for a gate that has no kernel.
    """
    kernel = KERNELS[spec.kind]
    if kernel is None:
        return None
    scores, sum_floor = kernel
    return GateRule(scores, top_k, spec.num_groups, spec.top_groups, spec.normalize, sum_floor, spec.scaling_factor)
