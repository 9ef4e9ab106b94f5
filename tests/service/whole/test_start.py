"""What keeps a service from starting is said in one line, before Ray starts."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .running import run_serve

pytestmark = pytest.mark.service

SHARD = "model-00001-of-00001.safetensors"
MATRIX = "model.layers.2.mlp.experts.5.down_proj.weight"


def missing_shard(model: Path) -> None:
    (model / SHARD).unlink()


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a model; one file holds all of them afterwards."""
    tensors = load_file(model / SHARD)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / "model.safetensors")
    (model / SHARD).unlink()
    (model / "model.safetensors.index.json").unlink()


def group_size_64(model: Path) -> None:
    scales = MATRIX + "_scale_inv"
    rewrite(model, lambda tensors: tensors.update({scales: tensors[scales].repeat_interleave(2, dim=1)}))


def zero_points(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.update({MATRIX + "_zero_point": torch.zeros(256, 1)}))


DAMAGES: dict[Callable[[Path], None], tuple[str, ...]] = {
    missing_shard: (SHARD, "missing"),
    group_size_64: (MATRIX, "group size 64"),
    zero_points: (MATRIX, "zero point"),
}


@pytest.fixture(scope="module")
def occupied() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def refused(
    tiny: Path, occupied: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """How each attempt ended, and the folder of its temporary files; two at a time, since each imports torch."""
    attempts: dict[str, list[str]] = {
        "port": ["--model", str(tiny), "--port", str(occupied)],
        "metrics port": ["--model", str(tiny), "--metrics-port", str(occupied)],
        "layers": ["--model", str(tiny), "--layers", "2-9"],
        "ranks": ["--model", str(tiny), "--ranks", "33"],
        "nothing there": ["--model", str(tiny / "nothing")],
    }
    for damage in DAMAGES:
        model = tmp_path_factory.mktemp("damaged") / "model"
        shutil.copytree(tiny, model)
        damage(model)
        attempts[damage.__name__] = ["--model", str(model)]
    folders = {name: tmp_path_factory.mktemp("temporary") for name in attempts}
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run_serve, folders.values(), attempts.values()))
    return {name: (process, folders[name]) for name, process in zip(attempts, ended, strict=True)}


def assert_one_line(
    refused: dict[str, tuple[subprocess.CompletedProcess[str], Path]], name: str, words: tuple[str, ...]
) -> None:
    process, folder = refused[name]
    assert process.returncode == 1, process.stderr
    assert process.stdout == ""
    said = [line for line in process.stderr.splitlines() if " INFO " not in line]
    assert len(said) == 1, process.stderr
    assert said[0].startswith("moe-forward: ")
    for word in words:
        assert word in said[0]
    assert list(folder.iterdir()) == [], "Ray was started, or something was left"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_ends_serve_with_one_line_that_names_the_part(
    refused: dict[str, tuple[subprocess.CompletedProcess[str], Path]], damage: Callable[[Path], None]
) -> None:
    assert_one_line(refused, damage.__name__, DAMAGES[damage])


def test_a_port_in_use_ends_serve_with_one_line(
    refused: dict[str, tuple[subprocess.CompletedProcess[str], Path]], occupied: int
) -> None:
    assert_one_line(refused, "port", (f"port {occupied} on 127.0.0.1", "in use"))


def test_a_metrics_port_in_use_ends_serve_with_one_line(
    refused: dict[str, tuple[subprocess.CompletedProcess[str], Path]], occupied: int
) -> None:
    assert_one_line(refused, "metrics port", (f"metrics_port {occupied} on 127.0.0.1", "in use"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers", ("layers", "[4, 5, 6, 7, 8]", "[1, 2, 3]")),
        ("ranks", ("ranks", "33", "32 experts")),
        ("nothing there", ("model", "config.json")),
    ],
)
def test_a_setting_that_cannot_be_met_ends_serve_with_one_line(
    refused: dict[str, tuple[subprocess.CompletedProcess[str], Path]], name: str, words: tuple[str, ...]
) -> None:
    assert_one_line(refused, name, words)
