"""Synthetic models: same bytes for the same seed, weights that look quantized, folders safe to share."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

from moe_forward.checkpoint import PRESETS, load_shard, make_model, open_index, read_spec, resolve_model, synthetic
from moe_forward.checkpoint.shards import Shard
from moe_forward.checkpoint.synthetic import write_model
from moe_forward.errors import CheckpointError
from moe_forward.types import GateSpec
from w4afp8 import dequantize_fp8_block, dequantize_int4, unpack_int4


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model("tiny", tmp_path / name, layers=1, seed=seed, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_weights_do_not_depend_on_the_division_into_shards(tmp_path: Path) -> None:
    write_model(PRESETS["tiny"], tmp_path / "one", layers=1, progress=False)
    write_model(PRESETS["tiny"], tmp_path / "many", layers=1, progress=False, max_shard_bytes=200_000)
    assert len(open_index(tmp_path / "one").files) == 1
    assert len(open_index(tmp_path / "many").files) > 5
    assert max(path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")) < 250_000
    one, many = (load_shard(tmp_path / name, read_spec(tmp_path / name), [1], range(32)) for name in ("one", "many"))
    assert all(torch.equal(a.up.codes, b.up.codes) for a, b in zip(one[1].experts, many[1].experts, strict=True))


@pytest.mark.parametrize("max_shard_bytes", [None, 200_000])
def test_the_number_of_threads_does_not_change_bytes(tmp_path: Path, max_shard_bytes: int | None) -> None:
    for workers in (1, 8):
        folder = tmp_path / str(workers)
        write_model(PRESETS["tiny"], folder, 1, progress=False, max_shard_bytes=max_shard_bytes, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "8")


def test_a_large_layer_has_many_shards_for_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards: list[Shard] = []
    monkeypatch.setattr(synthetic, "_write_at_once", lambda planned, workers, on_done: shards.extend(planned))
    monkeypatch.setattr(synthetic, "require_space", lambda folder, needed_bytes: None)
    for layers, most in ((1, 48), (4, 68)):
        shards.clear()
        write_model(PRESETS["deepseek-r1-layer"], tmp_path / str(layers), layers, progress=False)
        assert 40 <= len(shards) <= most
        sizes = [sum(job.work_bytes for job in shard.jobs) for shard in shards]
        assert min(sizes[:-1]) > 0.8 * max(sizes)


def test_a_failing_shard_ends_the_making_and_leaves_nothing_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(mean: float, generator: object, entry: object) -> torch.Tensor:
        raise MemoryError("no more")

    monkeypatch.setattr(synthetic, "_scales", fail)
    with pytest.raises(MemoryError, match="no more"):
        write_model(PRESETS["tiny"], tmp_path / "m", 1, progress=False, max_shard_bytes=200_000)
    assert not list((tmp_path / "m").glob(".*.part"))
    assert not (tmp_path / "m" / "config.json").exists()


def test_tiny_is_a_deepseek_v3_of_three_moe_layers(tmp_path: Path) -> None:
    make_model("tiny", tmp_path / "tiny", progress=False)
    spec = read_spec(tmp_path / "tiny")
    assert (spec.hidden_size, spec.intermediate_size, spec.num_experts, spec.top_k) == (256, 128, 32, 4)
    assert (spec.layers, spec.shared_intermediate_size) == ((1, 2, 3), 128)
    assert spec.gate == GateSpec("deepseek_v3", num_groups=8, top_groups=4, normalize=True, scaling_factor=2.5)
    load_shard(tmp_path / "tiny", spec, spec.layers, range(32))


def test_the_r1_layer_has_the_shapes_of_deepseek_r1(tmp_path: Path) -> None:
    config = PRESETS["deepseek-r1-layer"].config(1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    assert (spec.hidden_size, spec.intermediate_size, spec.num_experts, spec.top_k) == (7168, 2048, 256, 8)
    assert (spec.layers, spec.shared_intermediate_size) == ((3,), 2048)


def test_weights_look_like_quantized_normal_numbers(tmp_path: Path) -> None:
    preset = replace(PRESETS["tiny"], hidden_size=1024, intermediate_size=512, num_experts=8)
    write_model(preset, tmp_path / "m", layers=1, progress=False)
    held = load_shard(tmp_path / "m", read_spec(tmp_path / "m"), [1], range(8))[1]
    matrix = held.experts[0].up
    codes = unpack_int4(matrix.codes).double()
    assert (int(codes.min()), int(codes.max())) == (-7, 7)
    assert abs(codes.mean()) < 0.02
    assert 2.4 < codes.std() < 2.6  # 7 / 2.8
    # neighbours share a byte and 16 random bits, and must not know of each other
    assert abs(torch.corrcoef(torch.stack((codes[:, 0::2].flatten(), codes[:, 1::2].flatten())))[0, 1]) < 0.01
    assert 0.9 < dequantize_int4(matrix).std() * 1024**0.5 < 1.1
    assert 0.1 < matrix.scales.log().std() < 0.2
    assert held.shared is not None
    assert 0.85 < dequantize_fp8_block(held.shared.up).std() * 1024**0.5 < 1.15
    assert held.gate_bias is not None
    assert held.gate_bias.min() < 0 < held.gate_bias.max() < 0.2
    assert not torch.equal(held.experts[0].up.codes, held.experts[1].up.codes)


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is not empty"):
        make_model("tiny", tmp_path, progress=False)


@pytest.mark.parametrize(
    ("preset", "layers", "message"),
    [("huge", None, "unknown preset 'huge'; there are deepseek-r1-layer, tiny"), ("tiny", 0, "at least one MoE layer")],
)
def test_bad_arguments_are_refused(tmp_path: Path, preset: str, layers: int | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_model(preset, tmp_path, layers=layers, progress=False)


def test_a_preset_is_made_once(tmp_path: Path) -> None:
    first = resolve_model("synthetic:tiny", tmp_path)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert resolve_model("synthetic:tiny", tmp_path) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert read_spec(first).name == "tiny"


def test_two_threads_making_the_same_preset_agree(tmp_path: Path) -> None:
    barrier = Barrier(2)

    def resolve() -> Path:
        barrier.wait()
        return resolve_model("synthetic:tiny", tmp_path)

    with ThreadPoolExecutor(2) as pool:
        folders = [future.result() for future in [pool.submit(resolve) for _ in range(2)]]
    assert folders[0] == folders[1]
    assert list(folders[0].parent.iterdir()) == [folders[0]]
    load_shard(folders[0], read_spec(folders[0]), [1, 2, 3], range(32))


def test_the_cache_is_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_model("synthetic:tiny").is_relative_to(tmp_path / "xdg" / "moe-forward")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert resolve_model("synthetic:tiny").is_relative_to(tmp_path / "home" / ".cache" / "moe-forward")


def test_a_folder_is_taken_as_it_is(served: Path) -> None:
    assert resolve_model(str(served)) == served


@pytest.mark.parametrize(
    ("model", "message"),
    [("synthetic:huge", "unknown preset"), ("/nowhere", r"expected a folder with config\.json, or synthetic:NAME")],
)
def test_a_model_that_is_not_there_is_refused(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_model(model, tmp_path)


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "moe-forward").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"cannot make the synthetic model in .*moe-forward"):
        resolve_model("synthetic:tiny", tmp_path)
