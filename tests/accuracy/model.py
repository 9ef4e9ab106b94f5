"""The model: transformers' own DeepSeek-V3 in small, made, saved and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from recipe import PADDING, SEPARATOR, Recipe
from torch import nn


def make_model(recipe: Recipe) -> Any:
    """Make an untrained model in bf16, its gates' correction biases in float32."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(recipe.seed)
    config = DeepseekV3Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        moe_intermediate_size=recipe.moe_intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        n_routed_experts=recipe.experts,
        n_shared_experts=1,
        num_experts_per_tok=recipe.top_k,
        n_group=recipe.groups,
        topk_group=recipe.top_groups,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=recipe.routed_scaling_factor,
        q_lora_rank=recipe.q_lora_rank,
        kv_lora_rank=recipe.kv_lora_rank,
        qk_nope_head_dim=recipe.head_dim,
        qk_rope_head_dim=recipe.head_dim,
        v_head_dim=2 * recipe.head_dim,  # as wide as keys, which the fastest attention kernels ask for
        max_position_embeddings=2 * recipe.window_tokens,
        num_mtp_layers=0,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
        pad_token_id=PADDING,
    )
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    for block in moe_blocks(model).values():
        block.gate.e_score_correction_bias = block.gate.e_score_correction_bias.float()
    return model


def load_model(folder: Path, device: torch.device, experts: str) -> Any:
    """Read a model that was saved, in bf16, for evaluation. experts: how transformers computes them."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    model.set_experts_implementation(experts)
    for layer, block in moe_blocks(model).items():
        found = block.gate.e_score_correction_bias.dtype
        if found != torch.float32:
            raise ValueError(f"{folder}: layer {layer}: e_score_correction_bias: expected float32, got {found}")
    return model


def moe_blocks(model: nn.Module) -> dict[int, Any]:
    """Find the MoE blocks of a model: layer id -> block."""
    decoder: Any = model.get_submodule("model.layers")
    return {layer: found.mlp for layer, found in enumerate(decoder) if hasattr(found.mlp, "gate")}
