"""Small random models of every family that can be attached."""

from __future__ import annotations

from typing import Any

import torch
import transformers

HIDDEN = 256
EXPERTS = 8
TOP_K = 2
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "DeepseekV3": COMMON
    | {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
    },
    "Qwen3Moe": COMMON | {"num_experts": EXPERTS, "head_dim": 64},
    "Mixtral": COMMON | {"num_local_experts": EXPERTS, "head_dim": 64},
}
LAYERS = {"DeepseekV3": [1, 2], "Qwen3Moe": [0, 1, 2], "Mixtral": [0, 1, 2]}


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Make a float32 model whose gates tell tokens apart; a dense one for other names. changes: keys of its config."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(CONFIGS.get(family, COMMON) | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            torch.nn.init.normal_(gate.weight, std=0.08)
            if hasattr(gate, "e_score_correction_bias"):
                torch.nn.init.normal_(gate.e_score_correction_bias, std=0.05)
    return model


def prompts(model: Any, rows: int = 2, tokens: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids [rows, tokens], none of them the padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (rows, tokens), generator=generator)
