"""Recording the activations of small models, and quantizing those models with what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from moe_forward.checkpoint import load_shard, quantize, read_spec
from moe_forward.checkpoint.calibration import read_calibration
from moe_forward.integrations.transformers import attach, record_calibration
from moe_forward.types import ModelSpec
from w4afp8 import dequantize_int4

from .fake_service import FakeService
from .tiny_models import CONFIGS, EXPERTS, HIDDEN, LAYERS, make_model, prompts

# warnings of transformers about itself are not about this package
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    model = make_model(family)
    # channels of very different size, as real models have
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data *= (1.5 * torch.randn(HIDDEN, generator=generator)).exp()
    return model


def run(model: Any, seed: int = 1, rows: int = 4, tokens: int = 30) -> None:
    with torch.no_grad():
        model(prompts(model, rows, tokens, seed))


@pytest.fixture(scope="module")
def recorded(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "calibration.safetensors"
    with record_calibration(model, path):
        run(model, seed=1)
        run(model, seed=2)
    return path


def inputs_of(model: Any, layer: int, seeds: tuple[int, ...]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Inputs of a layer's experts [T, H], and of each expert's down matrix [rows, I], float64."""
    experts = model.model.layers[layer].mlp.experts
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    for seed in seeds:
        run(model, seed)
    hook.remove()
    hidden = torch.cat([tokens.reshape(-1, HIDDEN) for tokens, _ in seen]).double()
    ids = torch.cat([chosen for _, chosen in seen])
    down = {}
    for expert in range(EXPERTS):
        rows = hidden[(ids == expert).any(1)]
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        down[expert] = (torch.nn.functional.silu(gate) * up).detach()
    return hidden, down


def test_the_file_holds_the_mean_squares_of_what_every_matrix_is_given(model: Any, family: str, recorded: Path) -> None:
    tensors = load_file(recorded)
    assert sorted(tensors) == sorted(f"layers.{n}.{name}" for n in LAYERS[family] for name in ("down", "gate_up"))
    for layer in LAYERS[family]:
        hidden, down = inputs_of(model, layer, (1, 2))
        assert len(hidden) == 240
        torch.testing.assert_close(
            tensors[f"layers.{layer}.gate_up"].double(), hidden.square().mean(0), rtol=1e-5, atol=0
        )
        for expert, rows in down.items():
            expected = rows.square().mean(0) if len(rows) else torch.zeros(rows.shape[1], dtype=torch.float64)
            torch.testing.assert_close(tensors[f"layers.{layer}.down"][expert].double(), expected, rtol=1e-4, atol=0)


def test_recording_changes_neither_the_outputs_nor_the_model(model: Any, tmp_path: Path) -> None:
    before = dict(model.named_modules())
    hooks = [len(module._forward_pre_hooks) for module in before.values()]
    with torch.no_grad():
        plain = model(prompts(model)).logits
        with record_calibration(model, tmp_path / "c.safetensors"):
            during = model(prompts(model)).logits
    assert torch.equal(plain, during)
    assert dict(model.named_modules()) == before
    assert [len(module._forward_pre_hooks) for module in before.values()] == hooks


def test_outputs_for_other_tokens_are_nearer_with_what_was_recorded(
    model: Any, family: str, recorded: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "source")
    errors = {}
    for name, calibration in (("search", None), ("calibrated", recorded)):
        folder = tmp_path / name
        quantize(tmp_path / "source", folder, workers=1, progress=False, scales="search", calibration=calibration)
        errors[name] = output_errors(model, folder, read_spec(folder))
    report = json.loads((tmp_path / "calibrated" / "quantization_report.json").read_text())
    matrices = len(LAYERS[family]) * EXPERTS * 3
    assert report["int4_matrices"] == matrices
    assert matrices * 0.8 < report["calibrated_matrices"] <= matrices
    told = report["mean_relative_output_error"]
    assert told["calibrated"] < told["search"] < told["rtn"]
    assert errors["calibrated"] < 0.99 * errors["search"]


def output_errors(model: Any, folder: Path, spec: ModelSpec) -> float:
    """Relative error of all gate and up outputs for tokens that were not recorded."""
    wrong = size = 0.0
    for layer, held in load_shard(folder, spec, spec.layers, range(EXPERTS)).items():
        hidden, _ = inputs_of(model, layer, (9,))
        experts = model.model.layers[layer].mlp.experts
        for number, expert in enumerate(held.experts):
            made = torch.cat((dequantize_int4(expert.gate), dequantize_int4(expert.up))).double()
            exact = experts.gate_up_proj[number].detach().double()
            wrong += float((hidden @ (made - exact).T).square().sum())
            size += float((hidden @ exact.T).square().sum())
    return (wrong / size) ** 0.5


def test_the_command_reads_what_was_recorded(model: Any, recorded: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    calibration = read_calibration(recorded, spec)
    assert list(calibration.gate_up) == list(spec.layers)


def test_nothing_is_written_when_the_run_fails(model: Any, tmp_path: Path) -> None:
    prompt = prompts(model)
    with pytest.raises(IndexError), record_calibration(model, tmp_path / "c.safetensors"), torch.no_grad():
        model(torch.full_like(prompt, model.config.vocab_size))
    assert list(tmp_path.iterdir()) == []
    assert not model.model.layers[2].mlp.experts._forward_pre_hooks


def test_a_context_without_a_run_is_refused(model: Any, family: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=f"layer {LAYERS[family][0]} saw no token"),
        record_calibration(model, tmp_path / "c.safetensors"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_attached_model_and_others_are_refused(tmp_path: Path) -> None:
    model = make_model("DeepseekV3")
    with (
        attach(model, "http://moe.test", gate="local", transport=FakeService()),
        pytest.raises(ValueError, match=r"layer 1: expected experts with gate_up_proj .*got RemoteExperts"),
        record_calibration(model, tmp_path / "c.safetensors"),
    ):
        pass
    with pytest.raises(ValueError, match="got 'llama'"), record_calibration(make_model("Llama"), tmp_path / "c"):
        pass


def test_activations_with_nan_are_refused_by_layer(tmp_path: Path) -> None:
    model = make_model("Qwen3Moe")
    model.model.layers[1].post_attention_layernorm.weight.data[5] = torch.nan
    with (
        pytest.raises(ValueError, match="layer 1: its activations held NaN or Inf"),
        record_calibration(model, tmp_path / "c.safetensors"),
    ):
        run(model)
