"""Checkpoints that are quantized as they are loaded: the bits that `quantize` writes, for every way to store them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_forward.checkpoint import LayerWeights, inspect, load, load_shard, quantize, read_spec
from moe_forward.checkpoint.convert import Scales
from moe_forward.errors import CheckpointError
from w4afp8 import quantize_fp8_block

from .written import EXPERTS, Tensors, write_kimi, write_mixtral

Change = Callable[[Path, Callable[[Tensors], object]], Path]
UP = "model.layers.1.mlp.experts.1.up_proj.weight"


@pytest.fixture(params=["bf16", "fp8 blocks", "fused", "mixtral"])
def unquantized(
    request: pytest.FixtureRequest, source: Path, tmp_path: Path, changed: Change, edit_json: Callable[..., None]
) -> Path:
    if request.param == "mixtral":
        write_mixtral(tmp_path / "mixtral")
        return tmp_path / "mixtral"
    if request.param == "fused":
        return changed(source, fuse)
    if request.param == "fp8 blocks":
        changed(source, to_fp8)
        edit_json(source / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return source


def to_fp8(tensors: Tensors) -> None:
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_block(tensors[name])


def fuse(tensors: Tensors) -> None:
    experts = "model.layers.1.mlp.experts"
    parts = {
        name: [tensors.pop(f"{experts}.{expert}.{name}.weight") for expert in range(4)]
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
    tensors[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
    tensors[f"{experts}.down_proj"] = torch.stack(parts["down_proj"])


def everything(folder: Path, read: bool = True, scales: Scales = "rtn") -> dict[int, LayerWeights]:
    spec = read_spec(folder)
    return load_shard(folder, spec, spec.layers, range(spec.num_experts), read=read, on_load_scales=scales)


def assert_same(one: LayerWeights, other: LayerWeights) -> None:
    assert (one.shared is None) == (other.shared is None)
    assert len(one.experts) == len(other.experts)
    for expert, same in zip((*one.experts, one.shared), (*other.experts, other.shared), strict=True):
        for weight, expected in zip(expert or (), same or (), strict=True):
            for tensor, bits in zip(weight, expected, strict=True):
                assert torch.equal(tensor.view(torch.uint8), bits.view(torch.uint8))
    assert torch.equal(one.gate_weight, other.gate_weight)


@pytest.mark.parametrize("read", [True, False], ids=["read", "mapped"])
def test_bits_are_those_that_quantize_writes(unquantized: Path, tmp_path: Path, read: bool) -> None:
    quantize(unquantized, tmp_path / "ahead", workers=2, progress=False)
    on_load, ahead = everything(unquantized, read), everything(tmp_path / "ahead")
    assert list(on_load) == list(ahead)
    for layer, held in on_load.items():
        assert_same(held, ahead[layer])


@pytest.mark.parametrize("read", [True, False], ids=["read", "mapped"])
def test_searched_scales_are_those_that_quantize_finds(source: Path, tmp_path: Path, read: bool) -> None:
    quantize(source, tmp_path / "ahead", workers=2, progress=False, scales="search")
    searched = everything(source, read, "search")[1]
    assert_same(searched, everything(tmp_path / "ahead")[1])
    assert not torch.equal(searched.experts[0].up.scales, everything(source)[1].experts[0].up.scales)


def test_the_log_says_what_is_quantized(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_shard(source, read_spec(source), [1], range(3))
    routed, shared = (record.getMessage() for record in caplog.records)
    assert routed.startswith(f"{source}: quantizing 3 routed experts from BF16 to int4, now and at every start; `moe-")
    assert shared == f"{source}: quantizing 1 shared experts from BF16 to fp8"


def test_nothing_is_said_of_a_checkpoint_that_is_served_as_it_is(
    served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        everything(served)
    assert not caplog.records


def test_progress_counts_what_is_quantized_for_a_gpu(source: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_shard(source, read_spec(source), [1], range(4), lambda done, total: calls.append((done, total)), read=False)
    expert_bytes = 3 * 128 * 256 * 2
    assert calls == [(number * expert_bytes, 4 * expert_bytes) for number in range(1, 5)]


def test_a_part_of_a_mixtral_model_is_its_own_experts(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "mixtral")
    whole = everything(tmp_path / "mixtral")[1]
    part = load_shard(tmp_path / "mixtral", read_spec(tmp_path / "mixtral"), [1], range(2, 4))[1]
    for expert, expected in zip(part.experts, whole.experts[2:4], strict=True):
        assert all(torch.equal(weight.codes, same.codes) for weight, same in zip(expert, expected, strict=True))
    assert part.gate_bias is None


@pytest.mark.parametrize("kind", ["w4afp8", "bf16", "fused", "mixtral", "compressed-tensors"])
def test_inspect_tells_the_bytes_that_a_rank_holds(
    kind: str, served: Path, source: Path, tmp_path: Path, changed: Change
) -> None:
    folder = {"w4afp8": served, "bf16": source, "fused": source}.get(kind, tmp_path / kind)
    if kind == "fused":
        changed(source, fuse)
    elif kind == "mixtral":
        write_mixtral(folder)
    elif kind == "compressed-tensors":
        write_kimi(folder)
    spec = read_spec(folder)
    last = inspect(folder, ranks=2).splitlines()[-1].split()
    held = load_shard(folder, spec, spec.layers, range(spec.num_experts // 2, spec.num_experts)).values()
    widened = sum(layer.gate_weight.nbytes // 2 for layer in held)  # routers are bf16 in the files, float32 in memory
    assert last[2] == f"{sum(layer.nbytes for layer in held) - widened:,}"


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("bf16", "BF16 routed experts, quantized to int4 as they are loaded; BF16 shared experts, quantized to fp8"),
        ("mixtral", "BF16 routed experts, quantized to int4 as they are loaded"),
        ("compressed-tensors", "compressed-tensors: int4 routed experts; BF16 shared experts, quantized to fp8"),
        ("w4afp8", "w4afp8: int4 routed experts; fp8 shared experts"),
    ],
)
def test_inspect_tells_the_format(kind: str, line: str, served: Path, source: Path, tmp_path: Path) -> None:
    folder = {"w4afp8": served, "bf16": source}.get(kind, tmp_path / kind)
    if kind == "mixtral":
        write_mixtral(folder)
    elif kind == "compressed-tensors":
        write_kimi(folder)
    assert f"{'format':<20}{line}" in inspect(folder, ranks=1).splitlines()


def test_what_does_not_fit_in_memory_is_refused_with_the_numbers(
    source: Path, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:     64 kB\n")
    monkeypatch.setattr(load, "MEMORY_FILE", tmp_path / "meminfo")
    int4_bytes, fp8_bytes = 128 * 256 * 2 // 4 + 4 * 256, 128 * 256 + 4 * 2
    needed = 4 * 3 * int4_bytes + 3 * fp8_bytes
    with pytest.raises(
        CheckpointError, match=rf"takes {needed} bytes, and {64 * 1024} are available; run `moe-forward q"
    ):
        everything(source)
    everything(served)  # is mapped


def test_a_weight_that_is_not_finite_is_refused_by_name(source: Path, changed: Change) -> None:
    changed(source, lambda tensors: tensors[UP].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight .*got NaN or Inf"):
        everything(source)


def test_sizes_that_are_no_multiple_of_128_are_refused_by_name(
    source: Path, changed: Change, edit_json: Callable[..., None]
) -> None:
    def narrow(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            part = tensors[name][:, :96] if "down" in name else tensors[name][:96]
            tensors[name] = part.contiguous()

    edit_json(changed(source, narrow) / "config.json", moe_intermediate_size=96, n_shared_experts=0)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight .*must be multiples of 128"):
        everything(source)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj"), r"misses .*experts\.0\.down_proj"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.down_proj": torch.zeros(4, 256, 256)}),
            r"experts\.down_proj \(F32 .*: expected BF16 or F16 or F32 \[4, 256, 128\]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 128, 256)}),
            r"experts\.gate_up_proj .*\[4, 256, 256\]",
        ),
    ],
)
def test_fused_experts_of_other_shapes_are_refused_by_name(
    source: Path, changed: Change, edit: Callable[[Tensors], object], message: str
) -> None:
    changed(source, fuse)
    with pytest.raises(CheckpointError, match=message):
        everything(changed(source, edit))


def test_quantize_keeps_the_names_of_mixtral(tmp_path: Path, read_all: Callable[[Path], Tensors]) -> None:
    before = write_mixtral(tmp_path / "mixtral")
    quantize(tmp_path / "mixtral", tmp_path / "out", workers=2, progress=False)
    after = read_all(tmp_path / "out")
    assert {name.removesuffix("_scale_inv") for name in after} == set(before)
    assert sum(tensor.dtype == torch.int8 for tensor in after.values()) == 2 * EXPERTS * 3


def test_quantize_refuses_a_mixtral_without_one_of_its_matrices(tmp_path: Path, changed: Change) -> None:
    write_mixtral(tmp_path / "mixtral")
    changed(tmp_path / "mixtral", lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.5.w3.weight"))
    with pytest.raises(CheckpointError, match=r"misses model\.layers\.1\..*experts\.5\.(up_proj|w3)\.weight"):
        quantize(tmp_path / "mixtral", tmp_path / "out", progress=False)
