"""Quantizing a folder with searched scales: numbers, report, interruption and resumption, settings that differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_forward.checkpoint import load_shard, open_index, quantize, read_spec, scale_search
from moe_forward.checkpoint.device import Cpu
from moe_forward.checkpoint.scale_search import REPORT_FILE, errors_path
from moe_forward.errors import CheckpointError
from moe_forward.main import main
from w4afp8 import Fp8BlockWeight, Int4Weight, dequantize_fp8_block, dequantize_int4, quantize_fp8_block, quantize_int4
from w4afp8.search import SearchedWeight, search_int4

Tensors = dict[str, torch.Tensor]
Read = Callable[[Path], Tensors]
Change = Callable[[Path, Callable[[Tensors], object]], Path]
MLP = "model.layers.1.mlp"
EXPERTS_SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "destination"


def search(source: Path, destination: Path, workers: int = 2) -> None:
    quantize(source, destination, workers=workers, progress=False, scales="search")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the search of the `call`-th matrix fail, as a kill would end it."""
    calls = iter(range(1, 1000))

    def failing(weight: torch.Tensor, group_size: int, importance: torch.Tensor | None) -> SearchedWeight:
        if next(calls) >= call:
            raise KeyboardInterrupt
        return search_int4(weight, group_size, importance)

    monkeypatch.setattr(scale_search, "search_int4", failing)


def in_two_shards_of_experts(source: Path) -> None:
    """Move a part of the second shard into the third, so that both hold int4 matrices."""
    second, third = (source / f"model-{number:05d}-of-00003.safetensors" for number in (2, 3))
    kept, rest = load_file(second), load_file(third)
    for name in [name for name in kept if ".experts.3." in name]:
        rest[name] = kept.pop(name)
    places = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for file, tensors in ((second, kept), (third, rest)):
        save_file(tensors, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def relative_error(weight: torch.Tensor, quantized: Int4Weight) -> float:
    return float((dequantize_int4(quantized, torch.float64) - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("strip_elements", [Cpu.strip_elements, 128], ids=["whole", "strips"])
def test_experts_get_searched_scales_and_all_else_is_as_without(
    source: Path,
    destination: Path,
    tmp_path: Path,
    read_all: Read,
    monkeypatch: pytest.MonkeyPatch,
    strip_elements: int,
) -> None:
    monkeypatch.setattr(Cpu, "strip_elements", strip_elements)
    search(source, destination)
    quantize(source, tmp_path / "plain", workers=2, progress=False)
    before, after, plain = read_all(source), read_all(destination), read_all(tmp_path / "plain")
    routed = [name for name in before if ".experts." in name]
    assert len(routed) == 12
    for name in routed:
        expected = search_int4(before[name]).weight
        assert torch.equal(after.pop(name), expected.codes)
        assert torch.equal(after.pop(name + "_scale_inv"), expected.scales)
        assert not torch.equal(plain.pop(name), expected.codes)
        del plain[name + "_scale_inv"]
    assert after.keys() == plain.keys()
    assert all(torch.equal(after[name].view(torch.uint8), plain[name].view(torch.uint8)) for name in plain)
    assert files(destination)["config.json"] == files(tmp_path / "plain")["config.json"]
    load_shard(destination, read_spec(destination), [1], range(4))


def test_the_report_tells_the_errors_of_both_ways(source: Path, destination: Path, read_all: Read) -> None:
    search(source, destination)
    weights = {name: weight for name, weight in read_all(source).items() if ".experts." in name}
    plain = [relative_error(weight, quantize_int4(weight)) for weight in weights.values()]
    after = read_all(destination)
    found = [
        relative_error(weight, Int4Weight(after[name], after[name + "_scale_inv"])) for name, weight in weights.items()
    ]
    report = json.loads((destination / REPORT_FILE).read_text())
    assert report["int4_matrices"] == 12
    assert report["group_size"] == 128
    assert report["mean_relative_error"] == pytest.approx({"rtn": sum(plain) / 12, "search": sum(found) / 12}, rel=1e-5)
    assert report["largest_relative_error"] == pytest.approx({"rtn": max(plain), "search": max(found)}, rel=1e-5)
    assert report["mean_relative_error"]["search"] < 0.9 * report["mean_relative_error"]["rtn"]


def test_without_a_search_nothing_is_reported_and_the_settings_are_what_they_were(
    source: Path, destination: Path, tmp_path: Path
) -> None:
    quantize(source, destination, workers=2, progress=False)
    quantize(source, tmp_path / "named", workers=2, progress=False, scales="rtn")
    assert files(destination) == files(tmp_path / "named")
    assert not (destination / REPORT_FILE).exists()
    headers = open_index(destination).headers.values()
    assert {dict(header.metadata)["moe_forward.settings"] for header in headers} == {"w4afp8 group_size=128 layout=1"}


def test_only_the_report_is_left_beside_the_usual_files(source: Path, destination: Path) -> None:
    search(source, destination)
    assert {path.name for path in destination.iterdir()} == {path.name for path in source.iterdir()} | {REPORT_FILE}


def test_the_bits_do_not_depend_on_the_number_of_workers(source: Path, destination: Path, tmp_path: Path) -> None:
    search(source, destination, workers=1)
    search(source, tmp_path / "four", workers=4)
    assert files(destination) == files(tmp_path / "four")


def test_an_interrupted_search_goes_on_where_it_stopped_and_reports_all_of_it(
    source: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_two_shards_of_experts(source)
    with monkeypatch.context() as patch:
        fail_at(11, patch)
        with pytest.raises(KeyboardInterrupt):
            search(source, destination, workers=1)  # matrices in their order
    stamp = (destination / EXPERTS_SHARD).stat().st_mtime_ns
    assert not (destination / REPORT_FILE).exists()
    search(source, destination)
    assert (destination / EXPERTS_SHARD).stat().st_mtime_ns == stamp
    search(source, tmp_path / "at once")
    assert files(destination) == files(tmp_path / "at once")


def test_a_finished_shard_whose_errors_are_lost_is_refused_before_any_work(
    source: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_two_shards_of_experts(source)
    with monkeypatch.context() as patch:
        fail_at(11, patch)
        with pytest.raises(KeyboardInterrupt):
            search(source, destination, workers=1)  # matrices in their order
    errors_path(destination / EXPERTS_SHARD).unlink()
    with monkeypatch.context() as patch:
        fail_at(1, patch)
        with pytest.raises(
            CheckpointError, match=rf"{EXPERTS_SHARD}\.errors\.json is missing.* remove .*{EXPERTS_SHARD}"
        ):
            search(source, destination)
    (destination / EXPERTS_SHARD).unlink()
    search(source, destination)
    search(source, tmp_path / "at once")
    assert files(destination) == files(tmp_path / "at once")


def test_a_finished_folder_is_left_alone_but_for_leftovers(source: Path, destination: Path) -> None:
    search(source, destination)
    stamps = {path: path.stat().st_mtime_ns for path in destination.iterdir()}
    errors_path(destination / EXPERTS_SHARD).write_text("{}")  # ended between config.json and the removal of these
    search(source, destination)
    assert {path: path.stat().st_mtime_ns for path in destination.iterdir()} == stamps


@pytest.mark.parametrize(("first", "second"), [("rtn", "search"), ("search", "rtn")])
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_made_with_other_scales_is_refused(
    source: Path, destination: Path, first: scale_search.Scales, second: scale_search.Scales, finished: bool
) -> None:
    quantize(source, destination, workers=2, progress=False, scales=first)
    if not finished:
        (destination / "config.json").unlink()
    before = files(destination)
    with pytest.raises(CheckpointError, match="by other settings"):
        quantize(source, destination, workers=2, progress=False, scales=second)
    assert files(destination) == before


def test_deepseeks_fp8_blocks_are_searched_as_bf16(
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
    search(source, destination)
    before, after = read_all(source), read_all(destination)
    for name in [name for name in before if name.endswith("_proj.weight") and ".experts." in name]:
        block = Fp8BlockWeight(before[name], before[name + "_scale_inv"])
        expected = search_int4(dequantize_fp8_block(block, torch.bfloat16)).weight
        assert torch.equal(after[name], expected.codes)
        assert torch.equal(after[name + "_scale_inv"], expected.scales)


def test_fused_experts_are_searched_one_by_one(
    source: Path, destination: Path, changed: Change, read_all: Read
) -> None:
    weights = {name: weight for name, weight in read_all(source).items() if ".experts." in name}

    def fuse(tensors: Tensors) -> None:
        for name in weights:
            del tensors[name]

        def of(expert: int, projection: str) -> torch.Tensor:
            return weights[f"{MLP}.experts.{expert}.{projection}_proj.weight"]

        gate_up = [torch.cat((of(expert, "gate"), of(expert, "up"))) for expert in range(4)]
        tensors[f"{MLP}.experts.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{MLP}.experts.down_proj"] = torch.stack([of(expert, "down") for expert in range(4)])

    search(changed(source, fuse), destination)
    after = read_all(destination)
    for name, weight in weights.items():
        assert torch.equal(after[name], search_int4(weight).weight.codes)
    assert json.loads((destination / REPORT_FILE).read_text())["int4_matrices"] == 12


def test_experts_of_zeros_have_no_error(source: Path, destination: Path, changed: Change) -> None:
    def clear(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name].zero_()

    search(changed(source, clear), destination)
    report = json.loads((destination / REPORT_FILE).read_text())
    assert report["mean_relative_error"] == {"rtn": 0.0, "search": 0.0}


def test_a_weight_that_is_not_finite_is_refused_by_name(source: Path, destination: Path) -> None:
    tensors = load_file(source / EXPERTS_SHARD)
    tensors[f"{MLP}.experts.1.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, source / EXPERTS_SHARD)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight .*got NaN or Inf"):
        search(source, destination)
    assert not (destination / "config.json").exists()


def test_scales_of_another_name_are_refused(source: Path, destination: Path) -> None:
    with pytest.raises(CheckpointError, match="scales: expected one of rtn, search, got 'best'"):
        quantize(source, destination, progress=False, scales="best")  # type: ignore[arg-type]
    assert not destination.exists()


def test_the_command_line_chooses_the_scales(source: Path, destination: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(source), str(destination), "--scales", "search", "--workers", "2"]) == 0
    search(source, tmp_path / "called")
    assert files(destination) == files(tmp_path / "called")
