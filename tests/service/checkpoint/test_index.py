"""safetensors headers and the index: what is read, and every kind of damage by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_forward.checkpoint import open_index, read_header
from moe_forward.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def shard_of(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def entry(dtype: Any = "I8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_header_tells_where_the_bytes_of_a_tensor_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {"x": torch.arange(6, dtype=torch.int8).view(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)}, path, {"k": "v"}
    )
    header = read_header(path)
    found = {tensor.name: tensor for tensor in header.tensors}
    assert (found["x"].dtype, found["x"].shape, found["y"].dtype) == ("I8", (2, 3), "BF16")
    assert path.read_bytes()[found["x"].offset :][: found["x"].size_bytes] == bytes(range(6))
    assert header.metadata == {"k": "v"}


def test_an_index_maps_every_tensor_to_its_shard(served: Path) -> None:
    index = open_index(served)
    assert len(index.files) > 3
    places = json.loads((served / INDEX).read_text())["weight_map"]
    assert {name: tensor.file.name for name, tensor in index.tensors.items()} == places


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(open_index(tmp_path).tensors) == ["x"]


def test_a_tensor_that_the_index_places_elsewhere_is_taken_from_there(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2), "y": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}))
    assert open_index(tmp_path).tensors["x"].file.name == "b.safetensors"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors\.index\.json nor"):
        open_index(tmp_path)


def test_a_missing_shard_is_named(served: Path) -> None:
    shard = shard_of(served, 1)
    shard.rename(served / "away")
    with pytest.raises(CheckpointError, match=rf"names {shard.name}, which is missing \(1 missing\)"):
        open_index(served)


def test_a_tensor_that_its_shard_lacks_is_named(served: Path, edit_json: Callable[..., None]) -> None:
    name = shard_of(served, 0).name
    edit_json(served / INDEX, weight_map=json.loads((served / INDEX).read_text())["weight_map"] | {"ghost": name})
    with pytest.raises(CheckpointError, match=f"places ghost in {name}, which does not hold it"):
        open_index(served)


@pytest.mark.parametrize("name", ["../a.safetensors", "sub/a.safetensors", "a.bin", ""])
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match=r"x is in .*expected a \.safetensors file of this folder"):
        open_index(tmp_path)


@pytest.mark.parametrize("document", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"x": 3}}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, document: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="weight_map must map tensor names to file names"):
        open_index(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 20, -1])
def test_a_truncated_file_is_refused_by_name(served: Path, keep: int) -> None:
    path = shard_of(served, 2)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
        open_index(served)


def test_a_file_with_bytes_behind_its_data_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry()}, b"12345")
    with pytest.raises(CheckpointError, match=r"its header tells of .* bytes, it has"):
        read_header(path)


def test_a_header_longer_than_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)
    with pytest.raises(CheckpointError, match="header of 100000001 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        ({"__metadata__": {"a": 1}}, "__metadata__ .* must map names to strings"),
        ({"a": 3}, "entry of a is not an object"),
        ({"a": entry(dtype="F4")}, "a has dtype 'F4'"),
        ({"a": entry(dtype=["I8"])}, r"a has dtype \['I8'\]"),
        ({"a": entry(shape=[-4])}, r"a has shape \[-4\]"),
        ({"a": entry(shape=[True])}, r"a has shape \[True\]"),
        ({"a": entry(shape="4")}, "a has shape '4'"),
        ({"a": entry(offsets=[0])}, r"a has data_offsets \[0\]"),
        ({"a": entry(offsets=[4, 0])}, "takes 4 bytes"),
        ({"a": entry(shape=[5])}, "takes 5 bytes, but its data_offsets are"),
        ({"a": entry(), "b": entry()}, "the data of b starts at"),
        ({"a": entry(), "b": entry(offsets=[6, 10])}, "the data of b starts at"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, b"1234")
    with pytest.raises(CheckpointError, match=message):
        read_header(path)
