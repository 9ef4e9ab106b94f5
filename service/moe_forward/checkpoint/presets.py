"""Shapes of the synthetic models, and the config.json that goes with each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moe_forward.checkpoint.layout import quantization_config


@dataclass(frozen=True, slots=True)
class Preset:
    """A DeepSeek-V3-shaped model. dense_layers: before the first MoE layer. moe_layers: unless asked otherwise."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_groups: int
    top_groups: int
    top_k: int
    dense_layers: int
    moe_layers: int

    def config(self, moe_layers: int) -> dict[str, Any]:
        """Build config.json of a model with so many MoE layers."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "moe_intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.dense_layers + moe_layers,
            "first_k_dense_replace": self.dense_layers,
            "moe_layer_freq": 1,
            "n_routed_experts": self.num_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.top_k,
            "n_group": self.num_groups,
            "topk_group": self.top_groups,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "quantization_config": quantization_config(),
        }


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "tiny": Preset(256, 128, 32, 8, 4, top_k=4, dense_layers=1, moe_layers=3),
        "deepseek-r1-layer": Preset(7168, 2048, 256, 8, 4, top_k=8, dense_layers=3, moe_layers=1),
    }
)
"""Name -> shape; deepseek-r1-layer is one layer of DeepSeek-R1, 5.7 GB."""
