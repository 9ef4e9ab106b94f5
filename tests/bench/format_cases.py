"""Checkpoints in every format that is served, written and read back by the libraries they belong to.

DeepSeek-V3, Qwen3-MoE and Mixtral are transformers' own models with random weights; compressed-tensors is that package.
The DeepSeek-R1-W4AFP8 layout belongs to TensorRT-LLM and SGLang, which need a GPU: its definition is restated here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moe_forward.checkpoint import quantize
from w4afp8 import quantize_fp8_block

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Of one layer's experts."""

    hidden: int = 1024
    intermediate: int = 512
    experts: int = 64


class Matrix(NamedTuple):
    """Where a matrix stands. projection: one of `PROJECTIONS`."""

    layer: int
    expert: int
    projection: str


Weights = Mapping[Matrix, torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A format: how a folder is written, and what its library makes of it.

    kept: served with the codes of the file, rather than quantized while loading.
    library: whose reading ours is compared with. read: folder -> every routed expert's matrix, as float.
    """

    kept: bool
    library: str
    write: Callable[[Path, Shape], None]
    read: Callable[[Path], Weights]


def _transformers_model(family: str, shape: Shape) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": min(8, shape.experts),
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    own: dict[str, dict[str, Any]] = {
        "DeepseekV3": {
            "n_routed_experts": shape.experts, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 0, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32, "v_head_dim": 64,
        },
        "Qwen3Moe": {"num_experts": shape.experts, "head_dim": 64},
        "Mixtral": {"num_local_experts": shape.experts, "head_dim": 64},
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**common, **own[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)


def write_by_transformers(family: str, folder: Path, shape: Shape) -> None:
    """Write a model as `save_pretrained` does."""
    _transformers_model(family, shape).save_pretrained(folder, max_shard_size="64MB")


def read_by_transformers(folder: Path, **options: Any) -> Weights:
    """Read what `from_pretrained` reads, in bfloat16."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    weights = {}
    for layer, decoder in enumerate(model.model.layers):
        experts = decoder.mlp.experts
        for expert, (gate_up, down) in enumerate(zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True)):
            for projection, weight in zip(PROJECTIONS, (*gate_up.chunk(2), down), strict=True):
                weights[Matrix(layer, expert, projection)] = weight
    return weights


def write_fp8_blocks(folder: Path, shape: Shape) -> None:
    """Write a DeepSeek-V3 in fp8 blocks of 128 x 128, as it is published."""
    write_by_transformers("DeepseekV3", folder, shape)
    _rewrite(folder, lambda name: name.endswith("_proj.weight") and "mlp" in name, _to_fp8)
    _set_quantization(folder, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})


def read_fp8_blocks(folder: Path) -> Weights:
    """Read them as transformers does where there is no GPU: dequantized to bfloat16."""
    import transformers

    return read_by_transformers(folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))


def _to_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scales = quantize_fp8_block(weight)
    return {name: values, name + "_scale_inv": scales}


def write_w4afp8(folder: Path, shape: Shape) -> None:
    """Write the DeepSeek-R1-W4AFP8 layout: `moe-forward quantize` of a bf16 DeepSeek-V3."""
    source = folder.with_name(folder.name + ".bf16")
    write_by_transformers("DeepseekV3", source, shape)
    quantize(source, folder, progress=False, device="cpu")


def read_w4afp8(folder: Path) -> Weights:
    """Read the layout by its definition, in numpy: the low nibble first, two's complement, times the group's scale."""
    weights = {}
    for name, codes, tensors in _experts(folder, ".weight"):
        packed = codes.numpy().view(np.uint8)
        nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1).astype(np.int16)
        signed = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)
        scales = np.repeat(tensors[name + ".weight_scale_inv"].numpy(), 128, axis=1)
        weights[_place(name)] = torch.from_numpy(signed * scales)
    return weights


def write_compressed_tensors(group_size: int, folder: Path, shape: Shape) -> None:
    """Write a DeepSeek-V3 whose routed experts compressed-tensors has packed, as Kimi-K2-Thinking's are."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme(group_size)

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.view(len(weight), -1, group_size)
        scales, zero_points = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zero_points}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        return {f"{name.removesuffix('weight')}{key}": tensor for key, tensor in packed.items()}

    write_by_transformers("DeepseekV3", folder, shape)
    _rewrite(folder, lambda name: ".experts." in name, pack)
    group = {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json())}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    _set_quantization(folder, settings)


def read_compressed_tensors(group_size: int, folder: Path) -> Weights:
    """Unpack with compressed-tensors, the scales as float32: with bfloat16 it rounds the product too."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    weights = {}
    for name, _, tensors in _experts(folder, ".weight_packed"):
        state = {key: tensors[f"{name}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
        state["weight_scale"] = state["weight_scale"].float()
        weights[_place(name)] = PackedQuantizationCompressor.decompress(state, _scheme(group_size))["weight"]
    return weights


def _scheme(group_size: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _place(name: str) -> Matrix:
    parts = name.split(".")
    return Matrix(int(parts[2]), int(parts[5]), parts[6])


def _experts(folder: Path, suffix: str) -> list[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]:
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = [name for name in tensors if ".experts." in name and name.endswith(suffix)]
    return [(name.removesuffix(suffix), tensors[name], tensors) for name in found]


def _rewrite(
    folder: Path, chosen: Callable[[str], bool], change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    """Replace some tensors of a folder by others, file by file."""
    places: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        made: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            made |= change(name, tensor) if chosen(name) else {name: tensor}
        save_file(made, file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file.name)
    if (folder / "model.safetensors.index.json").exists():
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _set_quantization(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
