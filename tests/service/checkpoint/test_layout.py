"""config.json: families, their defaults, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_forward.checkpoint import read_spec
from moe_forward.checkpoint.layout import block_scale_shape, int4_shapes, matrix_shape
from moe_forward.errors import CheckpointError
from moe_forward.types import GateSpec

QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}


def write(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_deepseek_v3_config_becomes_a_spec(served: Path) -> None:
    spec = read_spec(served)
    assert (spec.name, spec.hidden_size, spec.intermediate_size) == ("served", 256, 128)
    assert (spec.num_experts, spec.top_k, spec.shared_intermediate_size) == (8, 2, 128)
    assert (spec.layers, spec.group_size) == ((1, 2), 128)
    assert spec.gate == GateSpec("deepseek_v3", num_groups=4, top_groups=2, normalize=True, scaling_factor=2.5)


def test_the_name_can_be_given(served: Path) -> None:
    assert read_spec(served, "r1").name == "r1"


def test_moe_layer_freq_counts_from_layer_zero(served: Path, edit_json: Callable[..., None]) -> None:
    edit_json(served / "config.json", num_hidden_layers=9, first_k_dense_replace=3, moe_layer_freq=2)
    assert read_spec(served).layers == (4, 6, 8)


def test_deepseek_v2_lite_is_softmax(served: Path, edit_json: Callable[..., None]) -> None:
    edit_json(
        served / "config.json",
        model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
        n_shared_experts=2, routed_scaling_factor=1.0,
    )  # fmt: skip
    spec = read_spec(served)
    assert spec.gate == GateSpec("softmax", normalize=False)
    assert spec.shared_intermediate_size == 256


def test_qwen3_moe_config_becomes_a_spec(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, QWEN | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}))
    assert spec.layers == (1, 5)
    assert spec.gate == GateSpec("softmax", normalize=True)
    assert spec.shared_intermediate_size == 0


def test_qwen3_moe_expert_count_under_the_key_of_transformers_5(tmp_path: Path) -> None:
    config = QWEN | {"num_local_experts": 16}
    del config["num_experts"]
    assert read_spec(write(tmp_path, config)).num_experts == 16


def test_kimi_k2_is_deepseek_v3_without_groups(served: Path, edit_json: Callable[..., None]) -> None:
    edit_json(served / "config.json", model_type="kimi_k2", n_group=1, topk_group=1, routed_scaling_factor=2.827)
    assert read_spec(served).gate == GateSpec("deepseek_v3", num_groups=1, top_groups=1, scaling_factor=2.827)


def test_mixtral_has_experts_in_every_layer_and_normalises_the_chosen(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    spec = read_spec(write(tmp_path, config))
    assert (spec.hidden_size, spec.intermediate_size, spec.shared_intermediate_size) == (256, 128, 0)
    assert (spec.num_experts, spec.top_k, spec.layers) == (8, 2, (0, 1, 2))
    assert spec.gate == GateSpec("softmax", normalize=True)


def test_a_tensorrt_llm_folder_without_quantization_config_is_read(
    served: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(served / "config.json", quantization_config=None)
    assert read_spec(served).group_size == 128


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"model_type": "qwen2_moe"},
            "model_type 'qwen2_moe' is not .*deepseek_v2, deepseek_v3, kimi_k2, kimi_k25, mixtral, qwen3_moe",
        ),
        ({"model_type": None}, "model_type must be a string, got nothing"),
        ({"hidden_size": "big"}, "hidden_size must be an integer >= 1, got 'big'"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_experts": 0}, "num_experts must be an integer >= 1, got 0"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok 17 exceeds the number of experts 16"),
        ({"mlp_only_layers": "1"}, "mlp_only_layers must be a list of integers"),
        ({"mlp_only_layers": list(range(6))}, "no layer of the model has experts"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not served; expected 'silu'"),
        ({"quantization_config": 3}, "quantization_config must be an object"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
            r"quant_method 'gptq' cannot be served exactly \(\{'bits': 4, 'group_size': 128\}\); served are w4afp8, ",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, r"quant_method 'awq' cannot .*groups of 128 or 32"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}},
            r"fp8 with weight_block_size \[128, 64\] cannot be served; served is \[128, 128\]",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8 with weight_block_size None cannot be served"),
        ({"quantization_config": {"quant_method": "w4afp8", "group_size": 64}}, "group_size 64 cannot be served"),
    ],
)
def test_a_bad_config_is_refused_by_key(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_spec(write(tmp_path, QWEN | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not served; expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not served"),
        ({"n_group": 3}, "n_group 3 and topk_group 2 do not divide 8 experts"),
        ({"topk_group": 5}, "topk_group 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds the experts of topk_group 2"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor must be a positive number, got -1"),
        ({"n_routed_experts": None}, "n_routed_experts must be an integer >= 1, got nothing"),
    ],
)
def test_a_bad_deepseek_config_is_refused_by_key(
    served: Path, edit_json: Callable[..., None], keys: dict[str, Any], message: str
) -> None:
    edit_json(served / "config.json", **keys)
    with pytest.raises(CheckpointError, match=message):
        read_spec(served)


def test_deepseek_v2_with_a_group_limit_is_refused(served: Path, edit_json: Callable[..., None]) -> None:
    edit_json(
        served / "config.json", model_type="deepseek_v2", scoring_func="softmax", topk_method="group_limited_greedy"
    )
    with pytest.raises(CheckpointError, match="topk_method 'group_limited_greedy' is not served; expected 'greedy'"):
        read_spec(served)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, not list")])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_spec(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: No such file"):
        read_spec(tmp_path)


def test_shapes_of_the_layout() -> None:
    assert matrix_shape("up_proj", 7168, 2048) == (2048, 7168)
    assert matrix_shape("down_proj", 7168, 2048) == (7168, 2048)
    assert int4_shapes((2048, 7168)) == ((2048, 3584), (2048, 56))
    assert block_scale_shape((576, 7168)) == (5, 56)
