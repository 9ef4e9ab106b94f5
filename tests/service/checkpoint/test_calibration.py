"""Calibration files: what is refused, and folders quantized with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_forward.checkpoint import open_index, quantize, read_spec
from moe_forward.checkpoint.calibration import read_calibration
from moe_forward.checkpoint.plan import ExpertMatrix
from moe_forward.checkpoint.scale_search import REPORT_FILE
from moe_forward.errors import CheckpointError
from moe_forward.main import main
from w4afp8 import Int4Weight, dequantize_int4, quantize_int4
from w4afp8.search import search_int4

from .written import EXPERTS, HIDDEN, INTERMEDIATE, Tensors, write_mixtral

Read = Callable[[Path], Tensors]
Change = Callable[[Path, Callable[[Tensors], object]], Path]
MLP = "model.layers.1.mlp"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "destination"


def write_calibration(path: Path, layers: tuple[int, ...], experts: int, seed: int = 5) -> Tensors:
    """Write channels of very different size; the last expert of every layer saw no token."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        tensors[f"layers.{layer}.gate_up"] = (2 * torch.randn(HIDDEN, generator=generator)).exp()
        tensors[f"layers.{layer}.down"] = (2 * torch.randn(experts, INTERMEDIATE, generator=generator)).exp()
        tensors[f"layers.{layer}.down"][-1] = 0
    save_file(tensors, path)
    return tensors


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    write_calibration(tmp_path / "calibration.safetensors", (1,), experts=4)
    return tmp_path / "calibration.safetensors"


def run(source: Path, destination: Path, calibration: Path | None, device: str = "cpu") -> None:
    quantize(
        source, destination, workers=2, progress=False, scales="search", calibration=calibration,
        device=device,  # type: ignore[arg-type]
    )  # fmt: skip


def importance(tensors: Tensors, layer: int, expert: int, projection: str) -> torch.Tensor | None:
    """What the files say of a matrix, by their definition."""
    down = tensors[f"layers.{layer}.down"][expert]
    if not down.any():
        return None
    return down if projection == "down_proj" else tensors[f"layers.{layer}.gate_up"]


def test_every_matrix_is_searched_by_the_importance_of_its_inputs(
    source: Path, destination: Path, calibration: Path, read_all: Read
) -> None:
    run(source, destination, calibration)
    before, after, tensors = read_all(source), read_all(destination), load_file(calibration)
    for name in (name for name in before if ".experts." in name):
        expert, projection = name.split(".")[5:7]
        expected = search_int4(before[name], importance=importance(tensors, 1, int(expert), projection)).weight
        assert torch.equal(after[name], expected.codes)
        assert torch.equal(after[name + "_scale_inv"], expected.scales)


def test_the_report_tells_the_errors_of_weights_and_outputs_for_all_three_scales(
    source: Path, destination: Path, calibration: Path, read_all: Read
) -> None:
    run(source, destination, calibration)
    before, after, tensors = read_all(source), read_all(destination), load_file(calibration)
    sums = {kind: dict.fromkeys(("rtn", "search", "calibrated"), 0.0) for kind in ("error", "output_error")}
    for name in (name for name in before if ".experts." in name):
        expert, projection = name.split(".")[5:7]
        channels = importance(tensors, 1, int(expert), projection)
        made = {
            "rtn": quantize_int4(before[name]),
            "search": search_int4(before[name]).weight,
            "calibrated": Int4Weight(after[name], after[name + "_scale_inv"]),
        }
        for way, quantized in made.items():
            weight = before[name].double()
            wrong = dequantize_int4(quantized, torch.float64) - weight
            sums["error"][way] += float(wrong.norm() / weight.norm()) / 12
            if channels is not None:
                root = channels.double().sqrt()
                sums["output_error"][way] += float((wrong * root).norm() / (weight * root).norm()) / 9
    report = json.loads((destination / REPORT_FILE).read_text())
    assert report["mean_relative_error"] == pytest.approx(sums["error"], rel=1e-5)
    assert report["mean_relative_output_error"] == pytest.approx(sums["output_error"], rel=1e-5)
    assert (report["int4_matrices"], report["calibrated_matrices"]) == (12, 9)
    assert report["largest_relative_output_error"]["calibrated"] < report["largest_relative_output_error"]["rtn"]
    told = report["mean_relative_output_error"]
    assert told["calibrated"] < 0.97 * told["search"]


def test_a_fused_and_a_split_source_give_the_same_experts(
    source: Path, destination: Path, tmp_path: Path, calibration: Path, changed: Change, read_all: Read
) -> None:
    run(source, tmp_path / "split", calibration)
    weights = {name: weight for name, weight in read_all(source).items() if ".experts." in name}

    def fuse(tensors: Tensors) -> None:
        for name in weights:
            del tensors[name]

        def of(projection: str) -> list[torch.Tensor]:
            return [weights[f"{MLP}.experts.{expert}.{projection}_proj.weight"] for expert in range(4)]

        gate_up = [torch.cat(pair) for pair in zip(of("gate"), of("up"), strict=True)]
        tensors[f"{MLP}.experts.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{MLP}.experts.down_proj"] = torch.stack(of("down"))

    run(changed(source, fuse), destination, calibration)
    after, split = read_all(destination), read_all(tmp_path / "split")
    assert all(torch.equal(after[name], split[name]) for name in weights)


def test_mixtral_s_names_are_understood(tmp_path: Path, destination: Path, read_all: Read) -> None:
    before = write_mixtral(tmp_path / "mixtral")
    tensors = write_calibration(tmp_path / "c.safetensors", (0, 1), EXPERTS)
    run(tmp_path / "mixtral", destination, tmp_path / "c.safetensors")
    after = read_all(destination)
    for number, projection in (("w1", "gate_proj"), ("w2", "down_proj")):
        name = f"model.layers.1.block_sparse_moe.experts.2.{number}.weight"
        expected = search_int4(before[name], importance=importance(tensors, 1, 2, projection)).weight
        assert torch.equal(after[name], expected.codes)


def test_a_layer_for_predicting_several_tokens_is_searched_by_its_weights(
    source: Path, destination: Path, calibration: Path, changed: Change, read_all: Read
) -> None:
    extra = "model.layers.2.mlp.experts.0.up_proj.weight"
    changed(source, lambda tensors: tensors.update({extra: tensors[f"{MLP}.experts.0.up_proj.weight"].clone()}))
    run(source, destination, calibration)
    assert torch.equal(read_all(destination)[extra], search_int4(read_all(source)[extra]).weight.codes)
    report = json.loads((destination / REPORT_FILE).read_text())
    assert (report["int4_matrices"], report["calibrated_matrices"]) == (13, 9)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("second", ["none", "another"])
def test_a_folder_made_with_another_calibration_is_refused(
    source: Path, destination: Path, tmp_path: Path, calibration: Path, second: str, finished: bool
) -> None:
    run(source, destination, calibration)
    if not finished:
        (destination / "config.json").unlink()
    write_calibration(tmp_path / "another", (1,), experts=4, seed=6)
    with pytest.raises(CheckpointError, match="by other settings"):
        run(source, destination, None if second == "none" else tmp_path / second)
    (header, *_) = open_index(destination).headers.values()
    assert read_calibration(calibration, read_spec(source)).digest in header.metadata["moe_forward.settings"]


def test_the_command_line_takes_a_calibration_and_a_device(
    source: Path, destination: Path, tmp_path: Path, calibration: Path
) -> None:
    options = ["--scales", "search", "--calibration", str(calibration), "--device", "cpu", "--workers", "1"]
    assert main(["quantize", str(source), str(destination), *options]) == 0
    run(source, tmp_path / "called", calibration)
    for path in destination.iterdir():
        assert path.read_bytes() == (tmp_path / "called" / path.name).read_bytes()


def test_the_progress_tells_rate_time_left_and_device(
    source: Path, destination: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), str(destination), "--device", "cpu"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert "quantize on cpu: 100%" in last
    assert "<00:00" in last
    assert "B/s]" in last


def test_a_calibration_without_a_search_is_refused(source: Path, destination: Path, calibration: Path) -> None:
    with pytest.raises(CheckpointError, match="calibration: expected scales 'search' with it, got 'rtn'"):
        quantize(source, destination, progress=False, calibration=calibration)
    assert not destination.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("layers.1.down"), r"misses layers\.1\.down \(F32 \[4, 128\]\)"),
        (lambda t: t.update({"layers.1.up": torch.ones(2)}), r"holds layers\.1\.up, which is not of an MoE layer"),
        (lambda t: t.update({"layers.0.gate_up": torch.ones(256)}), r"holds layers\.0\.gate_up, which is not of"),
        (lambda t: t.update({"layers.1.gate_up": torch.ones(128)}), r"layers\.1\.gate_up \(F32 \[128\].*\[256\]"),
        (lambda t: t.update({"layers.1.gate_up": torch.ones(256).bfloat16()}), r"gate_up \(BF16 .*expected F32 \[256"),
        (lambda t: t["layers.1.down"].__setitem__((2, 5), torch.nan), r"layers\.1\.down .*finite values that are not"),
        (lambda t: t["layers.1.down"].__setitem__((2, 5), torch.inf), r"layers\.1\.down .*finite values that are not"),
        (lambda t: t["layers.1.gate_up"].__setitem__(7, -1.0), r"layers\.1\.gate_up .*finite values that are not neg"),
        (lambda t: t["layers.1.down"].zero_(), r"layers\.1\.down .*holds zeros only: no token reached the layer"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused_by_tensor(
    source: Path, destination: Path, calibration: Path, edit: Callable[[Tensors], object], message: str
) -> None:
    tensors = load_file(calibration)
    edit(tensors)
    save_file(tensors, calibration)
    with pytest.raises(CheckpointError, match=message):
        run(source, destination, calibration)
    assert not destination.exists()


def test_a_file_that_is_no_safetensors_file_is_refused(source: Path, destination: Path, calibration: Path) -> None:
    calibration.write_text("not a tensor in sight")
    with pytest.raises(CheckpointError, match=r"calibration\.safetensors is truncated or no safetensors file"):
        run(source, destination, calibration)
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere"):
        run(source, destination, calibration.with_name("nowhere"))


def test_an_expert_without_tokens_has_no_importance(source: Path, calibration: Path) -> None:
    read = read_calibration(calibration, read_spec(source))
    assert read.importance(ExpertMatrix(1, 3, "up_proj")) is None
    assert read.importance(ExpertMatrix(9, 0, "up_proj")) is None
    down = read.importance(ExpertMatrix(1, 2, "down_proj"))
    assert down is not None
    assert torch.equal(down, load_file(calibration)["layers.1.down"][2])
