"""Quantizing a folder: numbers, names, refusals before any work, interruption and resumption."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_forward.checkpoint import convert, load_shard, open_index, quantize, read_spec
from moe_forward.checkpoint.device import Cpu
from moe_forward.errors import CheckpointError
from w4afp8 import (
    Fp8BlockWeight,
    Int4Weight,
    dequantize_fp8_block,
    dequantize_int4,
    quantize_fp8_block,
    quantize_int4,
)

Tensors = dict[str, torch.Tensor]
Read = Callable[[Path], Tensors]
Change = Callable[[Path, Callable[[Tensors], object]], Path]
MLP = "model.layers.1.mlp"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "destination"


def run(source: Path, destination: Path) -> None:
    quantize(source, destination, workers=2, progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the int4 quantization of the `call`-th matrix fail, as a kill would end it."""
    calls = iter(range(1, 1000))

    def failing(weight: torch.Tensor, group_size: int) -> Int4Weight:
        if next(calls) >= call:
            raise KeyboardInterrupt
        return quantize_int4(weight, group_size)

    monkeypatch.setattr(convert, "quantize_int4", failing)


def test_each_kind_of_tensor_becomes_what_the_layout_says(source: Path, destination: Path, read_all: Read) -> None:
    run(source, destination)
    before, after = read_all(source), read_all(destination)
    routed = [name for name in before if ".experts." in name]
    fp8 = [name for name in before if "_proj" in name and name not in routed]
    assert len(routed) == 12
    assert len(fp8) == 6
    for name in routed:
        expected = quantize_int4(before[name])
        assert torch.equal(after.pop(name), expected.codes)
        assert torch.equal(after.pop(name + "_scale_inv"), expected.scales)
    for name in fp8:
        block = quantize_fp8_block(before[name])
        assert torch.equal(after.pop(name).view(torch.uint8), block.values.view(torch.uint8))
        assert torch.equal(after.pop(name + "_scale_inv"), block.scales)
    assert sorted(after) == sorted(set(before) - set(routed) - set(fp8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_the_result_is_loaded_and_close_to_the_source(source: Path, destination: Path, read_all: Read) -> None:
    run(source, destination)
    weights = read_all(source)
    held = load_shard(destination, read_spec(destination), [1], range(4))[1]
    for number, expert in enumerate(held.experts):
        for projection, matrix in expert._asdict().items():
            original = weights[f"{MLP}.experts.{number}.{projection}_proj.weight"].float()
            error = (dequantize_int4(matrix) - original).abs().view(original.shape[0], -1, 128).amax(2)
            bound = original.abs().view(original.shape[0], -1, 128).amax(2) / 14  # half a step of amax / 7
            assert bool((error <= bound * (1 + 1e-5)).all())
    assert held.shared is not None
    original = weights[f"{MLP}.shared_experts.up_proj.weight"].float()
    assert torch.allclose(
        dequantize_fp8_block(held.shared.up), original, rtol=2**-4, atol=float(original.abs().max()) / 448
    )


def test_shards_mirror_the_source_and_other_files_come_along(source: Path, destination: Path) -> None:
    (source / "pytorch_model.bin").write_text("old weights")
    (source / ".hidden").write_text("")
    (source / "figures").mkdir()
    run(source, destination)
    names = {path.name for path in source.iterdir()} - {"pytorch_model.bin", ".hidden", "figures"}
    assert {path.name for path in destination.iterdir()} == names
    assert (destination / "tokenizer.json").read_text() == "{}"
    index = json.loads((destination / "model.safetensors.index.json").read_text())
    tensors = open_index(destination).tensors
    assert index["metadata"]["total_size"] == sum(tensor.size_bytes for tensor in tensors.values())


def test_the_config_says_the_layout_and_keeps_the_rest(source: Path, destination: Path) -> None:
    run(source, destination)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, destination))
    settings = after.pop("quantization_config")
    assert after == before
    assert (settings["quant_method"], settings["group_size"], settings["weight_block_size"]) == (
        "w4afp8",
        128,
        [128, 128],
    )


def test_a_single_file_stays_a_single_file(source: Path, destination: Path, changed: Change) -> None:
    run(changed(source, lambda tensors: None), destination)
    assert sorted(path.name for path in destination.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    load_shard(destination, read_spec(destination), [1], range(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types_are_quantized_from_their_own_values(
    source: Path, destination: Path, changed: Change, read_all: Read, dtype: torch.dtype
) -> None:
    name = f"{MLP}.experts.0.up_proj.weight"
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    run(changed(source, lambda tensors: tensors.update({name: weight})), destination)
    assert torch.equal(read_all(destination)[name], quantize_int4(weight).codes)


def test_deepseeks_fp8_blocks_are_a_source(
    source: Path,
    destination: Path,
    changed: Change,
    read_all: Read,
    edit_json: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cpu, "strip_elements", 128)  # more than one strip of each expert's down_proj

    def to_fp8(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_block(tensors[name])

    changed(source, to_fp8)
    edit_json(source / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    run(source, destination)
    before, after = read_all(source), read_all(destination)
    assert before.keys() == after.keys()
    for name in [name for name in before if name.endswith("_proj.weight") and ".experts." in name]:
        block = Fp8BlockWeight(before[name], before[name + "_scale_inv"])
        expected = quantize_int4(dequantize_fp8_block(block, torch.bfloat16))
        assert torch.equal(after[name], expected.codes)
        assert torch.equal(after[name + "_scale_inv"], expected.scales)
    name = f"{MLP}.shared_experts.up_proj.weight"
    assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    load_shard(destination, read_spec(destination), [1], range(4))


def test_a_matrix_taller_than_a_strip_gives_the_same_bits(
    source: Path, destination: Path, read_all: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cpu, "strip_elements", 128)
    run(source, destination)
    name, dense = f"{MLP}.experts.2.down_proj.weight", "model.layers.0.self_attn.q_a_proj.weight"
    before, after = read_all(source), read_all(destination)
    assert torch.equal(after[name], quantize_int4(before[name]).codes)
    block = quantize_fp8_block(before[dense])
    assert torch.equal(after[dense].view(torch.uint8), block.values.view(torch.uint8))
    assert torch.equal(after[dense + "_scale_inv"], block.scales)


def test_an_interrupted_run_goes_on_where_it_stopped(
    source: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            run(source, destination)
    assert [path.name for path in destination.iterdir()] == ["model-00001-of-00003.safetensors"]
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(destination)
    (destination / ".model-00002-of-00003.safetensors.part").write_bytes(b"left over by a kill" * 100_000)
    stamp = (destination / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    run(source, destination)
    assert (destination / "model-00001-of-00003.safetensors").stat().st_mtime_ns == stamp
    run(source, tmp_path / "at once")
    assert files(destination) == files(tmp_path / "at once")


def test_a_finished_folder_is_left_alone(source: Path, destination: Path) -> None:
    run(source, destination)
    stamps = {path: path.stat().st_mtime_ns for path in destination.iterdir()}
    run(source, destination)
    assert {path: path.stat().st_mtime_ns for path in destination.iterdir()} == stamps


def test_config_json_is_written_last(source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(KeyboardInterrupt):
            run(source, destination)
    assert len(list(destination.glob("*.safetensors"))) == 3
    assert (destination / "model.safetensors.index.json").exists()
    assert not (destination / "config.json").exists()


def test_a_destination_of_another_source_is_refused(source: Path, destination: Path, changed: Change) -> None:
    run(source, destination)
    os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors was made from another source"):
        run(source, destination)
    changed(source, lambda tensors: None)
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-00003\.safetensors, which .* has not"):
        run(source, destination)


def test_a_folder_with_a_foreign_config_is_refused(source: Path, destination: Path) -> None:
    destination.mkdir()
    (destination / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a config\.json of something else"):
        run(source, destination)


def test_a_finished_folder_that_lost_a_shard_is_refused(source: Path, destination: Path) -> None:
    run(source, destination)
    (destination / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config\.json but misses model-00003-of-00003\.safetensors"):
        run(source, destination)


def test_the_source_itself_is_refused_as_destination(source: Path) -> None:
    with pytest.raises(CheckpointError, match="is the source itself"):
        run(source, source)


def test_no_workers_are_refused(source: Path, destination: Path) -> None:
    with pytest.raises(CheckpointError, match="workers: expected at least 1, got 0"):
        quantize(source, destination, workers=0, progress=False)


def test_two_writers_of_one_folder_are_refused(source: Path, destination: Path) -> None:
    destination.mkdir()
    handle = os.open(destination, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is being written by another process"):
            run(source, destination)
    finally:
        os.close(handle)


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


UP = f"{MLP}.experts.1.up_proj"
FP8 = torch.zeros(128, 256).to(torch.float8_e4m3fn)
INTEGERS = torch.zeros(128, 256, dtype=torch.int32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replaced(f"{UP}.weight", torch.zeros(128, 320)), r"up_proj\.weight .*promises \[128, 256\]"),
        (lambda tensors: tensors.pop(f"{UP}.weight"), r"misses model\.layers\.1\.mlp\.experts\.1\.up_proj\.weight"),
        (replaced(f"{UP}.weight", INTEGERS.to(torch.int8)), r"up_proj\.weight .*already quantized"),
        (replaced(f"{UP}.weight_packed", torch.zeros(1)), r"weight_packed .*already quantized"),
        (replaced(f"{UP}.qweight", torch.zeros(1, dtype=torch.int32)), r"qweight .*already quantized"),
        (replaced(f"{UP}.weight", FP8), r"up_proj\.weight .*already quantized"),
        (replaced(f"{UP}.weight_scale_inv", torch.zeros(1, 2)), r"weight_scale_inv .*scales without an F8_E4M3 matrix"),
        (replaced(f"{UP}.weight", INTEGERS), r"up_proj\.weight .*expected BF16, F16, F32"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_quantized_is_refused_before_anything_is_written(
    source: Path, destination: Path, changed: Change, edit: Callable[[Tensors], object], message: str
) -> None:
    changed(source, edit)
    with pytest.raises(CheckpointError, match=message):
        run(source, destination)
    assert not destination.exists()


def test_sizes_that_are_no_multiple_of_128_are_refused_by_name(
    source: Path, destination: Path, changed: Change, edit_json: Callable[..., None]
) -> None:
    def narrow(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name][:, :96] if "down" in name else tensors[name][:96]
            tensors[name] = tensors[name].contiguous()

    edit_json(changed(source, narrow) / "config.json", moe_intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"experts\.\d\.\w+_proj\.weight .*must be multiples of 128"):
        run(source, destination)
    assert not destination.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "w4afp8", "group_size": 128},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "activation_scheme": "static"},
    ],
)
def test_an_already_quantized_source_is_refused_by_method(
    source: Path, destination: Path, edit_json: Callable[..., None], settings: dict[str, Any]
) -> None:
    edit_json(source / "config.json", quantization_config=settings)
    with pytest.raises(CheckpointError, match=f"already quantized, with quant_method '{settings['quant_method']}'"):
        run(source, destination)


def test_a_tensorrt_llm_checkpoint_is_refused(source: Path, destination: Path) -> None:
    (source / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"already quantized: it holds hf_quant_config\.json"):
        run(source, destination)


def test_a_weight_that_is_not_finite_is_refused_by_name(source: Path, destination: Path) -> None:
    path = source / "model-00002-of-00003.safetensors"
    tensors = load_file(path)
    tensors[f"{UP}.weight"][3, 4] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight .*got NaN or Inf"):
        run(source, destination)
    assert not (destination / "config.json").exists()
