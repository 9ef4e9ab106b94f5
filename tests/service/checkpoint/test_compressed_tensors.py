"""compressed-tensors' int4: the same codes and scales, the same layer, and everything else refused by name."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from moe_forward.checkpoint import inspect, load_shard, quantize, read_spec
from moe_forward.checkpoint.compressed_tensors import decode, is_packed
from moe_forward.errors import CheckpointError
from w4afp8 import (
    ExpertWeights,
    Granularity,
    Int4Weight,
    dequantize_tokens,
    portable,
    quantize_fp8_block,
    quantize_tokens,
    unpack_int4,
)
from w4afp8.activations import quantize_intermediate

from .written import EXPERTS, HIDDEN, LAYERS, Kimi, Tensors, kimi_settings, pack_words, write_kimi

Change = Callable[[Path, Callable[[Tensors], object]], Path]
EXPERT = "model.layers.2.mlp.experts.3"
MAX_LAYER_ERROR = 6e-3


@pytest.fixture
def kimi(tmp_path: Path) -> Kimi:
    return write_kimi(tmp_path / "kimi")


def load(folder: Path, experts: range = range(EXPERTS)) -> None:
    load_shard(folder, read_spec(folder), LAYERS, experts)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_served_as_they_are(tmp_path: Path, group_size: int, scale_dtype: torch.dtype) -> None:
    kimi = write_kimi(tmp_path / "kimi", group_size, scale_dtype)
    spec = read_spec(kimi.folder)
    assert spec.group_size == group_size
    for layer, held in load_shard(kimi.folder, spec, LAYERS, range(1, 5)).items():
        for number, expert in enumerate(held.experts, start=1):
            for projection, matrix in expert._asdict().items():
                stem = f"model.layers.{layer}.mlp.experts.{number}.{projection}_proj"
                assert torch.equal(unpack_int4(matrix.codes), kimi.codes[stem])
                assert matrix.scales.dtype == torch.float32
                assert torch.equal(matrix.scales, kimi.scales[stem].float())


def test_codes_of_all_sixteen_values_come_back() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 4)
    decoded = decode(Int4Weight(pack_words(codes), torch.ones(2, 2)))
    assert torch.equal(unpack_int4(decoded.codes), codes)


def test_a_decoded_weight_stays_as_it_is() -> None:
    weight = decode(Int4Weight(pack_words(torch.ones(4, 32, dtype=torch.int8)), torch.ones(4, 1)))
    assert decode(weight) is weight


def test_codes_of_groups_without_scale_are_zero(kimi: Kimi, changed: Change) -> None:
    def silence(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.up_proj.weight_scale"][5, 1] = 0

    held = load_shard(changed(kimi.folder, silence), read_spec(kimi.folder), [2], range(EXPERTS))[2]
    codes = unpack_int4(held.experts[3].up.codes)
    expected = kimi.codes[f"{EXPERT}.up_proj"].clone()
    expected[5, 32:64] = 0
    assert torch.equal(codes, expected)


def test_shared_experts_are_quantized_to_fp8_and_the_log_says_so(kimi: Kimi, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        held = load_shard(kimi.folder, read_spec(kimi.folder), [1], range(2))[1]
    assert held.shared is not None
    for projection, matrix in held.shared._asdict().items():
        expected = quantize_fp8_block(kimi.tensors[f"model.layers.1.mlp.shared_experts.{projection}_proj.weight"])
        assert torch.equal(matrix.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(matrix.scales, expected.scales)
    assert [record.getMessage() for record in caplog.records] == [
        f"{kimi.folder}: quantizing 1 shared experts from BF16 to fp8"
    ]


@pytest.mark.parametrize("granularity", ["token", "token_group"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_an_experts_output_is_that_of_the_dequantized_original(
    tmp_path: Path, group_size: int, granularity: Granularity
) -> None:
    kimi = write_kimi(tmp_path / "kimi", group_size)
    expert = load_shard(kimi.folder, read_spec(kimi.folder), [2], range(3, 4))[2].experts[0]
    x, _ = quantize_tokens(torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1)), granularity)
    gate, up, down = (original(kimi, f"{EXPERT}.{name}_proj") for name in ExpertWeights._fields)
    tokens = dequantize_tokens(x).double()
    hidden = silu(tokens @ gate.T) * (tokens @ up.T)
    exact = dequantize_tokens(quantize_intermediate(hidden.float(), granularity)).double() @ down.T
    activated = portable.silu_mul(portable.gemm(x, expert.gate), portable.gemm(x, expert.up))
    y = portable.gemm(quantize_intermediate(activated, granularity), expert.down)
    assert float((y - exact).norm() / exact.norm()) < MAX_LAYER_ERROR


def original(kimi: Kimi, stem: str) -> torch.Tensor:
    """The weight [N, K] float64 that the checkpoint means."""
    codes, scales = kimi.codes[stem].double(), kimi.scales[stem].double()
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


def test_what_is_only_mapped_stays_as_the_file_has_it(kimi: Kimi) -> None:
    spec = read_spec(kimi.folder)
    mapped, loaded = (load_shard(kimi.folder, spec, [1], range(2, 4), read=read)[1] for read in (False, True))
    for raw, ready in zip(mapped.experts, loaded.experts, strict=True):
        for weight, expected in zip(raw, ready, strict=True):
            assert is_packed(weight)
            assert weight.scales.dtype == torch.bfloat16
            decoded = decode(weight)
            assert torch.equal(decoded.codes, expected.codes)
            assert torch.equal(decoded.scales, expected.scales)


def test_the_repeated_shape_may_be_absent(kimi: Kimi, changed: Change) -> None:
    load(changed(kimi.folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "weight_shape" in name]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"weights": {"num_bits": 8}}, "group_0: weights: num_bits 8 cannot be served; served is pack-quantized, int4"),
        ({"weights": {"type": "float"}}, "type 'float' cannot be served"),
        ({"weights": {"symmetric": False}}, "symmetric False cannot be served"),
        ({"weights": {"strategy": "channel"}}, "strategy 'channel' cannot be served"),
        ({"weights": {"group_size": 64}}, "group_size 64 cannot be served; .*groups of 128 or 32"),
        ({"weights": {"group_size": None}}, "group_size None cannot be served"),
        ({"weights": {"actorder": "group"}}, "actorder 'group' cannot be served"),
        ({"weights": {"actorder": True}}, "actorder True cannot be served"),
        ({"weights": {"dynamic": True}}, "dynamic True cannot be served"),
        ({"input_activations": {"num_bits": 8}}, "input_activations {'num_bits': 8} cannot be served"),
        ({"weights": None}, "config_groups: weights are not quantized"),
        ({"format": "nvfp4-pack-quantized"}, "group_0: format 'nvfp4-pack-quantized' cannot be served"),
    ],
)
def test_a_scheme_that_is_not_served_is_refused_by_key(
    kimi: Kimi, edit_json: Callable[..., None], edit: dict[str, Any], message: str
) -> None:
    settings = copy.deepcopy(kimi_settings(32))
    group = settings["config_groups"]["group_0"]
    for key, value in edit.items():
        group[key] = group[key] | value if key == "weights" and value is not None else value
    edit_json(kimi.folder / "config.json", quantization_config=settings)
    with pytest.raises(CheckpointError, match=message):
        read_spec(kimi.folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24' cannot be served; served is pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is set"),
        ({"config_groups": {}}, "expected one of config_groups, for the routed experts, got 0"),
        ({"config_groups": {"a": {}, "b": {}}}, "expected one of config_groups, for the routed experts, got 2"),
    ],
)
def test_settings_that_are_not_served_are_refused_by_key(
    kimi: Kimi, edit_json: Callable[..., None], edit: dict[str, Any], message: str
) -> None:
    edit_json(kimi.folder / "config.json", quantization_config=kimi_settings(32) | edit)
    with pytest.raises(CheckpointError, match=message):
        read_spec(kimi.folder)


@pytest.mark.parametrize("order", ["weight", "static", False])
def test_an_order_that_leaves_the_stored_order_as_it_was_is_served(
    kimi: Kimi, edit_json: Callable[..., None], order: str | bool
) -> None:
    settings = kimi_settings(32)
    settings["config_groups"]["group_0"]["weights"]["actorder"] = order
    edit_json(kimi.folder / "config.json", quantization_config=settings)
    load(kimi.folder)


def test_settings_under_the_older_key_are_read(kimi: Kimi, edit_json: Callable[..., None]) -> None:
    edit_json(kimi.folder / "config.json", quantization_config=None, compression_config=kimi_settings(32))
    assert read_spec(kimi.folder).group_size == 32


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            replaced(f"{EXPERT}.up_proj.weight_zero_point", torch.zeros(16, 8, dtype=torch.int32)),
            r"experts\.3\.up_proj\.weight_zero_point: zero points cannot be served",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_g_idx", torch.zeros(256, dtype=torch.int32)),
            r"experts\.3\.up_proj\.weight_g_idx: an activation order",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_scale", torch.ones(128, 2).bfloat16()),
            r"up_proj\.weight_scale \(BF16 \[128, 2\].*: group size 128, but config\.json tells of 32",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_scale", torch.ones(128, 7).bfloat16()),
            r"up_proj\.weight_scale .*: expected BF16 or F16 or F32 \[128, 8\]",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_packed", torch.zeros(128, 64, dtype=torch.int32)),
            r"up_proj\.weight_packed \(I32 \[128, 64\].*: expected I32 \[128, 32\]",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_shape", torch.zeros(3, dtype=torch.int32)),
            r"up_proj\.weight_shape .*: expected I32 or I64 \[2\]",
        ),
        (lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight_scale"), r"misses .*up_proj\.weight_scale"),
        (lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight_packed"), r"misses .*experts\.3\.up_proj\.weight"),
        (
            replaced(
                "model.layers.2.mlp.shared_experts.up_proj.weight_packed", torch.zeros(128, 32, dtype=torch.int32)
            ),
            r"shared_experts\.up_proj\.weight_packed .*: int4 shared experts cannot be served exactly",
        ),
        (
            lambda tensors: tensors[f"{EXPERT}.down_proj.weight_scale"].fill_(torch.nan),
            r"experts\.3\.down_proj\.weight_scale .*finite and not negative",
        ),
    ],
)
def test_tensors_that_are_not_served_are_refused_by_name(
    kimi: Kimi, changed: Change, edit: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(changed(kimi.folder, edit))


def test_plain_experts_are_refused_where_the_config_tells_of_groups_of_32(kimi: Kimi, changed: Change) -> None:
    def widen(tensors: Tensors) -> None:
        for suffix in ("packed", "scale", "shape"):
            del tensors[f"{EXPERT}.up_proj.weight_{suffix}"]
        tensors[f"{EXPERT}.up_proj.weight"] = torch.zeros(128, 256).bfloat16()

    with pytest.raises(CheckpointError, match=r"up_proj\.weight .*: config\.json tells of int4 in groups of 32"):
        load(changed(kimi.folder, widen))


def test_the_checkpoint_is_refused_as_a_source_of_quantize(kimi: Kimi, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantized, with quant_method 'compressed-tensors'"):
        quantize(kimi.folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def nested(kimi: Kimi, inner: str = "kimi_k2", **changes: Any) -> Path:
    """Rewrite a folder as Kimi-K2.5 is published: the language model in `text_config` and behind a prefix."""
    path = kimi.folder / "config.json"
    text = json.loads(path.read_text()) | {"model_type": inner} | changes
    vision = {"model_type": "kimi_k25_vision", "hidden_size": 64}
    path.write_text(json.dumps({"model_type": "kimi_k25", "text_config": text, "vision_config": vision}))
    tensors = {f"language_model.{name}": tensor for name, tensor in kimi.tensors.items()}
    tensors["vision_tower.patch_embed.proj.weight"] = torch.zeros(4, 4)
    for file in kimi.folder.glob("model*"):
        file.unlink()
    save_file(tensors, kimi.folder / "model.safetensors")
    return kimi.folder


@pytest.mark.parametrize("inner", ["kimi_k2", "deepseek_v3"])
def test_a_language_model_inside_another_is_served_as_it_is_alone(kimi: Kimi, tmp_path: Path, inner: str) -> None:
    alone = load_shard(kimi.folder, spec := read_spec(kimi.folder, "kimi"), LAYERS, range(EXPERTS))
    folder = nested(kimi, inner)
    assert read_spec(folder, "kimi") == spec
    held = load_shard(folder, spec, LAYERS, range(EXPERTS))
    for layer in LAYERS:
        for expert, expected in zip(held[layer].experts, alone[layer].experts, strict=True):
            for weight, same in zip(expert, expected, strict=True):
                assert torch.equal(weight.codes, same.codes)
                assert torch.equal(weight.scales, same.scales)
        assert torch.equal(held[layer].gate_weight, alone[layer].gate_weight)
    assert inspect(folder, ranks=2)


@pytest.mark.parametrize("inside", [None, kimi_settings(32)], ids=["once", "twice"])
def test_the_outer_config_may_hold_the_settings_alone(
    kimi: Kimi, edit_json: Callable[..., None], inside: dict[str, Any] | None
) -> None:
    folder = nested(kimi, quantization_config=inside)
    edit_json(folder / "config.json", quantization_config=kimi_settings(32))
    if inside is None:
        load(folder)
    else:
        with pytest.raises(CheckpointError, match="expected one quantization_config, got another in text_config"):
            read_spec(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config must be an object where model_type is 'kimi_k25'"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type 'llama' inside kimi_k25 is not served"),
        ({"model_type": "llava"}, "model_type 'llava' is not a model this version serves; it serves .*kimi_k25"),
    ],
)
def test_another_model_inside_is_refused_by_type(
    kimi: Kimi, edit_json: Callable[..., None], change: dict[str, Any], message: str
) -> None:
    edit_json(nested(kimi) / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        read_spec(kimi.folder)


def test_an_expert_missing_inside_is_named(kimi: Kimi) -> None:
    del kimi.tensors[f"{EXPERT}.up_proj.weight_packed"]
    with pytest.raises(CheckpointError, match=r"misses model\.layers\.2\.mlp\.experts\.3\.up_proj"):
        load(nested(kimi))


def test_a_name_with_and_without_the_prefix_is_refused(kimi: Kimi) -> None:
    folder, name = nested(kimi), "model.layers.1.mlp.gate.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[f"language_model.{name}"].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"holds both {name} and language_model\.{name}"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"), [(kimi_settings(32), "already quantized"), (None, "only a language model by itself")]
)
def test_a_language_model_inside_another_is_refused_as_a_source_of_quantize(
    kimi: Kimi, tmp_path: Path, settings: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantize(nested(kimi, quantization_config=settings), tmp_path / "out", progress=False)
