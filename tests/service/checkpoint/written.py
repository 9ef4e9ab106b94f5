"""Tiny checkpoints in the formats of others, written by their definitions, beside what they were made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_forward.checkpoint.presets import Preset

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 128, 6, 2
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
LAYERS = (1, 2)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kimi:
    """A checkpoint as Kimi-K2-Thinking is published.

    codes: [N, K] int8 in [-8, 7] of each routed matrix. scales: [N, K/group] as in the file. tensors: of the file.
    """

    folder: Path
    codes: Tensors
    scales: Tensors
    tensors: Tensors


def kimi_settings(group_size: int) -> dict[str, Any]:
    """Build its quantization_config."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def write_kimi(folder: Path, group_size: int = 32, scale_dtype: torch.dtype = torch.bfloat16) -> Kimi:
    """Write a folder with a dense layer and two MoE layers in two shards."""
    generator = torch.Generator().manual_seed(group_size)
    codes, scales, tensors = {}, {}, {}
    for layer in LAYERS:
        mlp = f"model.layers.{layer}.mlp"
        for expert in range(EXPERTS):
            for projection, (rows, columns) in SHAPES.items():
                stem = f"{mlp}.experts.{expert}.{projection}"
                codes[stem] = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
                spread = torch.rand(rows, columns // group_size, generator=generator)
                scales[stem] = ((0.5 + spread) * 0.02).to(scale_dtype)
                tensors[f"{stem}.weight_packed"] = pack_words(codes[stem])
                tensors[f"{stem}.weight_scale"] = scales[stem]
                tensors[f"{stem}.weight_shape"] = torch.tensor([rows, columns], dtype=torch.int32)
        for projection, shape in SHAPES.items():
            tensors[f"{mlp}.shared_experts.{projection}.weight"] = random(generator, *shape)
        tensors[f"{mlp}.gate.weight"] = random(generator, EXPERTS, HIDDEN)
        tensors[f"{mlp}.gate.e_score_correction_bias"] = torch.rand(EXPERTS, generator=generator)
    config = Preset(HIDDEN, INTERMEDIATE, EXPERTS, 1, 1, TOP_K, dense_layers=1, moe_layers=2).config(2)
    config |= {"model_type": "kimi_k2", "quantization_config": kimi_settings(group_size)}
    write_folder(folder, config, tensors)
    return Kimi(folder, codes, scales, tensors)


def write_mixtral(folder: Path) -> Tensors:
    """Write a bf16 folder with two layers of experts; returns its tensors."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = random(generator, EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, projection in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                tensors[f"{block}.experts.{expert}.{name}.weight"] = random(generator, *SHAPES[projection])
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = random(generator, HIDDEN, HIDDEN)
    config = {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    write_folder(folder, config, tensors)
    return tensors


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """Write config.json, two shards, and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    places: dict[str, str] = {}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Pack [N, K] as the format is defined: input 8 * w + i in bits 4 * i to 4 * i + 3 of word w, as code + 8."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i in range(8):
        words |= (codes[:, i::8].to(torch.int64) + 8) << (4 * i)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal values over the square root of the inputs, in bf16."""
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)
