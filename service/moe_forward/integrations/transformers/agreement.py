"""Whether a service serves the model that is to use it, as far as its description tells."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moe_forward.integrations.transformers.families import Sizes


def check_agreement(
    sizes: Sizes, layers: Sequence[int], placement: Mapping[str, Any], metadata: Mapping[str, Any], routes: bool
) -> None:
    """Refuse a service of another model.

    layers: ids that the model wants to have computed.
    placement: answer of `/v1/placement`. metadata: answer of `/v2/models/{model}`.
    routes: whether the service's gate is to choose experts, which must then be of the model's kind.
    Raises: ValueError naming each size that differs, or the layers that are not served.
    """
    columns = {tensor["name"]: tensor["shape"][-1] for tensor in metadata.get("inputs", ())}
    compared: list[tuple[str, object, object]] = [
        ("hidden_size", sizes.hidden_size, placement.get("hidden_size")),
        ("num_experts", sizes.num_experts, placement.get("num_experts")),
        ("top_k", sizes.top_k, placement.get("top_k")),
        ("shared_experts", sizes.shared_experts, placement.get("shared_experts")),
        *([("gate", sizes.gate, placement.get("gate"))] if routes else []),
        ("columns of hidden_states", sizes.hidden_size, columns.get("hidden_states")),
        ("columns of router_logits", sizes.num_experts, columns.get("router_logits")),
        ("columns of topk_ids", sizes.top_k, columns.get("topk_ids")),
    ]
    differing = [f"{what} {ours} in the model, {theirs} served" for what, ours, theirs in compared if ours != theirs]
    if differing:
        raise ValueError(f"the service's model {placement.get('model')!r} is another one: {'; '.join(differing)}")
    served: Collection[int] = placement.get("layers", ())
    missing = [layer for layer in layers if layer not in served]
    if missing:
        raise ValueError(
            f"layers {shown(missing)} of the model are not served; the service's model {placement.get('model')!r} has "
            f"{shown(served)}: name the layers to attach"
        )


def shown(layers: Collection[int]) -> str:
    """Layer ids for a message, runs of them as ranges: [3, 4, 5, 8] -> "3-5, 8"; "none" for no layer."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
