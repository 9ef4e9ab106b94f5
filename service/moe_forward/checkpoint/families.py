"""How the config.json of each model family says what its MoE layers look like: one function and one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moe_forward.checkpoint.documents import Keys
from moe_forward.errors import CheckpointError
from moe_forward.types import GateSpec, ModelSpec


def _deepseek_v3(config: Keys, name: str, group_size: int) -> ModelSpec:
    """Sigmoid scores, a correction bias and a group limit (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    gate = GateSpec(
        kind="deepseek_v3",
        num_groups=config.integer("n_group"),
        top_groups=config.integer("topk_group"),
        normalize=config.flag("norm_topk_prob", True),
        scaling_factor=config.number("routed_scaling_factor", 1.0),
    )
    return _deepseek(config, name, group_size, gate)


def _deepseek_v2(config: Keys, name: str, group_size: int) -> ModelSpec:
    """Softmax scores without a group limit (DeepSeek-V2-Lite, arXiv 2405.04434)."""
    config.expect("scoring_func", "softmax")
    config.expect("topk_method", "greedy")
    gate = GateSpec(
        kind="softmax",
        normalize=config.flag("norm_topk_prob", False),
        scaling_factor=config.number("routed_scaling_factor", 1.0),
    )
    return _deepseek(config, name, group_size, gate)


def _deepseek(config: Keys, name: str, group_size: int, gate: GateSpec) -> ModelSpec:
    intermediate = config.integer("moe_intermediate_size")
    first = config.integer("first_k_dense_replace", minimum=0, default=0)
    every = config.integer("moe_layer_freq", default=1)
    layers = (layer for layer in range(first, config.integer("num_hidden_layers")) if layer % every == 0)
    spec = ModelSpec(
        name=name,
        hidden_size=config.integer("hidden_size"),
        intermediate_size=intermediate,
        num_experts=config.integer("n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        shared_intermediate_size=config.integer("n_shared_experts", minimum=0, default=0) * intermediate,
        layers=tuple(layers),
        group_size=group_size,
        gate=gate,
    )
    return _checked(config, spec)


def _qwen3_moe(config: Keys, name: str, group_size: int) -> ModelSpec:
    """Softmax scores, no shared expert (Qwen3-MoE, arXiv 2505.09388)."""
    every = config.integer("decoder_sparse_step", default=1)
    dense = config.integers("mlp_only_layers")
    layers = config.integer("num_hidden_layers")
    # transformers 5 writes num_local_experts, older versions and the published checkpoints num_experts
    experts = "num_experts" if config.document.get("num_experts") is not None else "num_local_experts"
    spec = ModelSpec(
        name=name,
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("moe_intermediate_size"),
        num_experts=config.integer(experts),
        top_k=config.integer("num_experts_per_tok"),
        shared_intermediate_size=0,
        layers=tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0),
        group_size=group_size,
        gate=GateSpec(kind="softmax", normalize=config.flag("norm_topk_prob", False)),
    )
    return _checked(config, spec)


def _mixtral(config: Keys, name: str, group_size: int) -> ModelSpec:
    """Softmax over the chosen experts, experts in every layer (Mixtral, arXiv 2401.04088, section 2.1)."""
    spec = ModelSpec(
        name=name,
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        shared_intermediate_size=0,
        layers=tuple(range(config.integer("num_hidden_layers"))),
        group_size=group_size,
        gate=GateSpec(kind="softmax", normalize=True),  # the same as a softmax over the chosen logits
    )
    return _checked(config, spec)


def _checked(config: Keys, spec: ModelSpec) -> ModelSpec:
    config.expect("hidden_act", "silu")
    gate = spec.gate
    if spec.top_k > spec.num_experts:
        raise CheckpointError(
            f"{config.where}: num_experts_per_tok {spec.top_k} exceeds the number of experts {spec.num_experts}"
        )
    if spec.num_experts % gate.num_groups or gate.top_groups > gate.num_groups:
        raise CheckpointError(
            f"{config.where}: n_group {gate.num_groups} and topk_group {gate.top_groups} do not divide "
            f"{spec.num_experts} experts"
        )
    if spec.top_k > spec.num_experts // gate.num_groups * gate.top_groups:
        raise CheckpointError(
            f"{config.where}: num_experts_per_tok {spec.top_k} exceeds the experts of topk_group {gate.top_groups}"
        )
    if not spec.layers:
        raise CheckpointError(f"{config.where}: no layer of the model has experts")
    return spec


FAMILIES: Mapping[str, Callable[[Keys, str, int], ModelSpec]] = MappingProxyType(
    {
        "deepseek_v2": _deepseek_v2,
        "deepseek_v3": _deepseek_v3,
        "kimi_k2": _deepseek_v3,  # the same architecture under a name of its own
        "mixtral": _mixtral,
        "qwen3_moe": _qwen3_moe,
    }
)
"""model_type of config.json -> (config, name, group size) -> spec."""

NESTED: Mapping[str, tuple[str, ...]] = MappingProxyType({"kimi_k25": ("deepseek_v3", "kimi_k2")})
"""model_type of models that also see -> model_types of the language model in their `text_config`.

Its tensors are those of the language model alone with `language_model.` before the name. Source: transformers' and
vLLM's kimi_k25, which hand the text_config to their DeepSeek-V3.
"""
