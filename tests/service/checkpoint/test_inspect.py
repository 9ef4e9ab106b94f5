"""The text table of `moe-forward inspect`."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_forward.checkpoint import inspect, open_index
from moe_forward.errors import CheckpointError


def test_the_table_shows_model_layers_and_ranks(served: Path) -> None:
    lines = inspect(served, ranks=3).splitlines()
    words = [line.split() for line in lines]
    total = sum(tensor.size_bytes for tensor in open_index(served).tensors.values())
    assert ["model", "served"] in words
    assert any(line.startswith("MoE layers") and line.endswith("2: 1-2") for line in lines)
    assert any("top 2 in 2 of 4 groups, normalised, times 2.5" in line for line in lines)
    assert ["group", "size", "128"] in words
    assert ["bytes", f"{total:,}", "(0.001", "GB)"] in words
    assert [row[:2] for row in words[-3:]] == [["0", "0-1"], ["1", "2-4"], ["2", "5-7"]]


def test_bytes_of_a_rank_are_its_experts_with_router_and_shared_expert(served: Path) -> None:
    names = open_index(served).tensors
    held = sum(
        tensor.size_bytes
        for name, tensor in names.items()
        if name.startswith("model.layers.2.") and (".experts." not in name or ".experts.0." in name)
    )
    last = inspect(served, ranks=8, layers=[2]).splitlines()[-8].split()
    assert last[:3] == ["0", "0-0", f"{held:,}"]


def test_more_ranks_than_experts_is_shown_as_such(served: Path) -> None:
    assert sum("none" in line for line in inspect(served, ranks=9).splitlines()[-9:]) == 1


def test_weights_are_not_read(served: Path) -> None:
    table = inspect(served, ranks=2)
    for path in served.glob("*.safetensors"):
        size, header = path.stat().st_size, path.read_bytes()[:8]
        data_start = 8 + int.from_bytes(header, "little")
        with path.open("r+b") as file:
            file.seek(data_start)
            file.write(b"\xff" * (size - data_start))  # NaN everywhere
    assert inspect(served, ranks=2) == table


@pytest.mark.parametrize(
    ("ranks", "layers", "message"), [(0, None, "ranks: expected at least 1, got 0"), (1, [7], "layer 7 is not an MoE")]
)
def test_bad_arguments_are_refused(served: Path, ranks: int, layers: list[int] | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        inspect(served, ranks, layers)
