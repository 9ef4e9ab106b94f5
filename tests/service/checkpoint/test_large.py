"""Checkpoints larger than the machine: a rank maps its files, and reads nothing of the experts of others."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward.checkpoint import inspect, load_shard, read_spec
from moe_forward.checkpoint.index import TensorInfo
from moe_forward.checkpoint.mapped import MappedFiles
from moe_forward.types import expert_range

from .written import write_kimi, write_mixtral

HIDDEN = 16384
ITEM_BYTES = {"I32": 4, "BF16": 2, "F32": 4}


@pytest.mark.parametrize("kind", ["w4afp8", "compressed-tensors", "mixtral"])
@pytest.mark.parametrize("read", [True, False], ids=["read", "mapped"])
def test_a_rank_opens_its_own_experts_and_what_all_ranks_hold(
    kind: str, read: bool, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served if kind == "w4afp8" else tmp_path / kind
    if kind == "compressed-tensors":
        write_kimi(folder)
    elif kind == "mixtral":
        write_mixtral(folder)
    opened: set[str] = set()
    plain = MappedFiles.tensor

    def noted(files: MappedFiles, info: TensorInfo) -> torch.Tensor:
        opened.add(info.name)
        return plain(files, info)

    monkeypatch.setattr(MappedFiles, "tensor", noted)
    spec = read_spec(folder)
    mine = expert_range(1, 3, spec.num_experts)
    load_shard(folder, spec, spec.layers[-1:], mine, read=read)
    block = f"model.layers.{spec.layers[-1]}."
    assert {int(name.split(".experts.")[1].split(".")[0]) for name in opened if ".experts." in name} == set(mine)
    assert all(name.startswith(block) and (".mlp." in name or ".block_sparse_moe." in name) for name in opened)
    tensors = 3 if kind == "mixtral" else 6
    assert sum(".experts." in name for name in opened) == tensors * len(mine)


def test_a_checkpoint_twice_the_hosts_memory_is_mapped_and_described(
    tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    """Sparse files: bytes that were never written take no disk, and would take memory if they were read."""
    folder = write_kimi(tmp_path / "kimi").folder
    for path in folder.glob("model*"):
        path.unlink()
    expert_bytes = 3 * HIDDEN * HIDDEN * (16 + 2) // 32
    experts = -(-2 * memory_bytes("MemTotal") // expert_bytes)
    edit_json(
        folder / "config.json",
        hidden_size=HIDDEN, moe_intermediate_size=HIDDEN, n_routed_experts=experts, n_shared_experts=0,
        num_hidden_layers=2,
    )  # fmt: skip
    write_sparse(folder, experts)
    spec = read_spec(folder)
    before, faults = resident_bytes(), pages_read()
    held = load_shard(folder, spec, [1], range(experts), read=False)[1]
    table = inspect(folder, ranks=8)
    assert sum(weight.codes.nbytes + weight.scales.nbytes for expert in held.experts for weight in expert) > 2 * (
        memory_bytes("MemTotal")
    ) * (1 - 1e-6)
    # One page of a tensor is enough to have megabytes of it read: the router's are, those of experts must not be.
    assert pages_read() - faults < experts
    assert table.splitlines()[-1].startswith("7")
    assert resident_bytes() - before < expert_bytes  # of hundreds


def write_sparse(folder: Path, experts: int) -> None:
    places: dict[str, str] = {}

    def write(file: str, entries: dict[str, tuple[str, list[int]]]) -> None:
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + int(torch.Size(shape).numel()) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            places[name] = file
        raw = json.dumps(header).encode()
        raw += b" " * (-(len(raw) + 8) % 64)
        with (folder / file).open("wb") as shard:
            shard.write(len(raw).to_bytes(8, "little") + raw)
            shard.truncate(8 + len(raw) + end)

    for expert in range(experts):
        stem = f"model.layers.1.mlp.experts.{expert}"
        entries: dict[str, tuple[str, list[int]]] = {}
        for projection in ("gate_proj", "up_proj", "down_proj"):
            entries[f"{stem}.{projection}.weight_packed"] = ("I32", [HIDDEN, HIDDEN // 8])
            entries[f"{stem}.{projection}.weight_scale"] = ("BF16", [HIDDEN, HIDDEN // 32])
        write(f"expert-{expert:05d}.safetensors", entries)
    gate = "model.layers.1.mlp.gate"
    write(
        "gate.safetensors",
        {f"{gate}.weight": ("BF16", [experts, HIDDEN]), f"{gate}.e_score_correction_bias": ("F32", [experts])},
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def memory_bytes(name: str) -> int:
    return fields(Path("/proc/meminfo"))[name]


def resident_bytes() -> int:
    return fields(Path("/proc/self/status"))["VmRSS"]


def pages_read() -> int:
    """Page faults of this process that had to wait for a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def fields(path: Path) -> dict[str, int]:
    """Read what the kernel tells in kB, in bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].removesuffix(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
