"""Small checkpoint folders for the tests to read, change and break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_forward.checkpoint import open_index
from moe_forward.checkpoint.presets import Preset
from moe_forward.checkpoint.synthetic import write_model

SMALL = Preset(256, 128, 8, 4, 2, top_k=2, dense_layers=1, moe_layers=2)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def served_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "served"
    write_model(SMALL, folder, progress=False, max_shard_bytes=100_000)
    return folder


@pytest.fixture
def served(served_template: Path, tmp_path: Path) -> Path:
    """A folder in the served layout: 2 MoE layers (1 and 2) of 8 experts, in several shards."""
    return shutil.copytree(served_template, tmp_path / "served")


@pytest.fixture
def read_all() -> Callable[[Path], Tensors]:
    """Every tensor of a folder, read by the safetensors library."""

    def read(folder: Path) -> Tensors:
        return {name: tensor for file in open_index(folder).files for name, tensor in load_file(file).items()}

    return read


@pytest.fixture
def changed(read_all: Callable[[Path], Tensors]) -> Callable[[Path, Callable[[Tensors], object]], Path]:
    """Rewrite a folder as one file after a function has changed its tensors in place."""

    def change(folder: Path, edit: Callable[[Tensors], object]) -> Path:
        tensors = read_all(folder)
        edit(tensors)
        for path in folder.glob("model*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Set keys of a JSON file; a value of None removes the key."""

    def edit(path: Path, **keys: Any) -> None:
        document = json.loads(path.read_text()) | keys
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))

    return edit


@pytest.fixture
def source(source_template: Path, tmp_path: Path) -> Path:
    """A bf16 DeepSeek-V3-shaped source: 1 dense and 1 MoE layer of 4 experts, 3 shards, tokenizer files."""
    return shutil.copytree(source_template, tmp_path / "source")


@pytest.fixture(scope="session")
def source_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        scale: float = shape[-1] ** -0.5
        return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)

    mlp = "model.layers.1.mlp"
    shards: list[Tensors] = [
        {
            "model.embed_tokens.weight": random(64, 256),
            "model.layers.0.self_attn.q_a_proj.weight": random(192, 256),
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": random(160, 256),
            "model.layers.0.self_attn.q_a_layernorm.weight": random(192),
            "model.layers.0.mlp.down_proj.weight": random(256, 384),
        },
        {
            f"{mlp}.experts.{expert}.{projection}.weight": random(*shape)
            for expert in range(4)
            for projection, shape in (("gate_proj", (128, 256)), ("up_proj", (128, 256)), ("down_proj", (256, 128)))
        },
        {
            f"{mlp}.gate.weight": random(4, 256),
            f"{mlp}.gate.e_score_correction_bias": random(4).float(),
            f"{mlp}.shared_experts.gate_proj.weight": random(128, 256),
            f"{mlp}.shared_experts.up_proj.weight": random(128, 256),
            f"{mlp}.shared_experts.down_proj.weight": random(256, 128),
            "lm_head.weight": random(64, 256),
        },
    ]
    folder = tmp_path_factory.mktemp("source")
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-00003.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = Preset(256, 128, 4, 2, 1, top_k=2, dense_layers=1, moe_layers=1).config(1)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder
