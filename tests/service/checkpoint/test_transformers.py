"""Folders that the installed transformers writes: quantized, loaded, and compared with the model's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward.checkpoint import load_shard, quantize, read_spec
from moe_forward.types import ModelSpec
from w4afp8 import Int4Weight, dequantize_int4

transformers = pytest.importorskip("transformers")

# warnings of transformers about itself are not about this package
pytestmark = pytest.mark.filterwarnings("ignore")

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
DEEPSEEK = COMMON | {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
}
CONFIGS = {
    "DeepseekV3": DEEPSEEK,
    "Qwen3Moe": COMMON | {"num_experts": 8, "head_dim": 64},
    "Mixtral": COMMON | {"num_local_experts": 8, "intermediate_size": 128},
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**CONFIGS[request.param])
    return getattr(transformers, f"{request.param}ForCausalLM")(config).to(torch.bfloat16)


def quantized(model: Any, folder: Path, **options: Any) -> tuple[Path, ModelSpec]:
    model.save_pretrained(folder / "source", **options)
    quantize(folder / "source", folder / "served", workers=2, progress=False)
    return folder / "served", read_spec(folder / "served")


def assert_near(matrix: Int4Weight, original: torch.Tensor) -> None:
    """Every group of 128 within half a step, amax / 14, of what it was made from."""
    groups = original.float().view(original.shape[0], -1, 128)
    error = (dequantize_int4(matrix).view_as(groups) - groups).abs().amax(2)
    assert bool((error <= groups.abs().amax(2) / 14 * (1 + 1e-5)).all())
    assert bool((error > 0).any())


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_weights_of_a_saved_model_are_served_within_half_a_step(model: Any, tmp_path: Path, fused: bool) -> None:
    folder, spec = quantized(model, tmp_path, save_original_format=not fused, max_shard_size="1MB")
    for layer, held in load_shard(folder, spec, spec.layers, range(8)).items():
        mlp = model.model.layers[layer].mlp
        gate_up, down = mlp.experts.gate_up_proj.detach(), mlp.experts.down_proj.detach()
        for number, expert in enumerate(held.experts):
            assert_near(expert.gate, gate_up[number, :128])
            assert_near(expert.up, gate_up[number, 128:])
            assert_near(expert.down, down[number])
        assert torch.equal(held.gate_weight, mlp.gate.weight.detach().float())


def test_both_forms_give_the_same_experts(model: Any, tmp_path: Path) -> None:
    loaded = []
    for original in (True, False):
        folder, spec = quantized(model, tmp_path / str(original), save_original_format=original)
        loaded.append(experts(folder, spec))
    assert len(loaded[0]) == len(spec.layers) * 8 * 3 * 2
    assert all(torch.equal(tensor, same) for tensor, same in zip(*loaded, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_a_saved_model_is_served_without_quantizing_it_ahead(model: Any, tmp_path: Path, fused: bool) -> None:
    folder, spec = quantized(model, tmp_path, save_original_format=not fused)
    direct = read_spec(tmp_path / "source", spec.name)
    assert direct == spec
    on_load = experts(tmp_path / "source", direct)
    assert all(torch.equal(tensor, same) for tensor, same in zip(on_load, experts(folder, spec), strict=True))


def experts(folder: Path, spec: ModelSpec) -> list[torch.Tensor]:
    """Codes and scales of all experts of all layers."""
    layers = load_shard(folder, spec, spec.layers, range(8)).values()
    return [tensor for held in layers for expert in held.experts for matrix in expert for tensor in matrix]


def test_the_spec_is_that_of_the_model(model: Any, tmp_path: Path) -> None:
    _, spec = quantized(model, tmp_path)
    deepseek = model.config.model_type == "deepseek_v3"
    assert spec.layers == ((1,) if deepseek else (0, 1))
    assert (spec.num_experts, spec.top_k, spec.hidden_size, spec.intermediate_size) == (8, 2, 256, 128)
    assert spec.shared_intermediate_size == (128 if deepseek else 0)
    assert spec.gate.kind == ("deepseek_v3" if deepseek else "softmax")
