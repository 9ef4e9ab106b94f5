"""Which models can be attached, and where each family keeps its MoE blocks: one entry a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular to the models of one `model_type`.

    block: class of an MoE block, which calls its child `experts` with (hidden states, ids, weights).
    num_experts: key of the config that counts the routed experts.
    gate: kind of the block's own gate, as `/v1/placement` names it.
    shared_experts: child of the block whose output it adds, or None.
    """

    block: str
    num_experts: str
    gate: str
    shared_experts: str | None = None


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v3": Family("DeepseekV3MoE", "n_routed_experts", "deepseek_v3", shared_experts="shared_experts"),
        "mixtral": Family("MixtralSparseMoeBlock", "num_local_experts", "softmax"),
        "qwen3_moe": Family("Qwen3MoeSparseMoeBlock", "num_experts", "softmax"),
    }
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the model and the service must agree in. gate: needs not where the model's own gate routes."""

    hidden_size: int
    num_experts: int
    top_k: int
    shared_experts: bool
    gate: str


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a module that a child stands in."""

    parent: nn.Module
    name: str
    child: nn.Module


def find_family(model: nn.Module) -> Family:
    """Family of a model by its config's `model_type`. Raises: ValueError for one that is not in the table."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ValueError(f"model: expected a model_type of {', '.join(FAMILIES)}, got {model_type!r}")
    return family


def read_sizes(model: nn.Module, family: Family) -> Sizes:
    """Sizes by the model's config."""
    config: Any = model.config
    return Sizes(
        hidden_size=config.hidden_size,
        num_experts=getattr(config, family.num_experts),
        top_k=config.num_experts_per_tok,
        shared_experts=family.shared_experts is not None and config.n_shared_experts > 0,
        gate=family.gate,
    )


def find_blocks(model: nn.Module, classes: tuple[str, ...]) -> dict[int, Slot]:
    """Children of the decoder layers that are of one of `classes`, by name: layer id -> where it stands.

    By name, because a class of the installed transformers cannot be named without importing its models.
    """
    decoder: Any = getattr(model, "base_model", model)
    found = {}
    for layer, decoder_layer in enumerate(getattr(decoder, "layers", ())):
        for name, child in decoder_layer.named_children():
            if any(kind.__name__ in classes for kind in type(child).__mro__):
                found[layer] = Slot(decoder_layer, name, child)
    return found
