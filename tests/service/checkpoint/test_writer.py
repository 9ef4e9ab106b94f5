"""Shards written tensor by tensor: what the safetensors library reads back, and atomicity."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_forward.checkpoint import read_header
from moe_forward.checkpoint.shards import Job, Shard, write_shards
from moe_forward.checkpoint.writer import ShardWriter, TensorEntry, require_space, write_document
from moe_forward.errors import CheckpointError

ENTRIES = (TensorEntry("a", "I8", (3, 5)), TensorEntry("b", "F32", ()), TensorEntry("c", "BF16", (2, 0)))


def test_a_shard_filled_in_any_order_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "c": torch.empty(2, 0).bfloat16(),
        "b": torch.tensor(1.5),
        "a": torch.arange(15, dtype=torch.int8).view(5, 3).t(),
    }
    writer = ShardWriter(path, ENTRIES, {"format": "pt"})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    assert not path.exists()
    writer.commit()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert read_header(path).metadata == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    entries = (TensorEntry("bytes", "I8", (3,)), TensorEntry("floats", "F32", (3,)), TensorEntry("halves", "F16", (3,)))
    writer = ShardWriter(tmp_path / "x.safetensors", entries, {})
    for entry, dtype in zip(entries, (torch.int8, torch.float32, torch.float16), strict=True):
        writer.write(entry.name, torch.ones(3, dtype=dtype))
    writer.commit()
    offsets = {tensor.name: tensor.offset for tensor in read_header(tmp_path / "x.safetensors").tensors}
    assert offsets["floats"] % 64 == 0
    assert offsets["halves"] % 2 == 0


def test_an_unfinished_shard_cannot_be_committed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.safetensors", ENTRIES, {})
    with pytest.raises(ValueError, match="a was not written"):
        writer.commit()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.safetensors", ENTRIES, {})
    with pytest.raises(ValueError, match=r"a was to be I8 \(3, 5\), got torch.int8 \(5, 3\)"):
        writer.write("a", torch.zeros(5, 3, dtype=torch.int8))
    writer.discard()


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two tensors named a"):
        ShardWriter(tmp_path / "x.safetensors", (*ENTRIES, ENTRIES[0]), {})


def test_a_failing_job_leaves_the_shards_before_it_and_no_part_of_its_own(tmp_path: Path) -> None:
    entry = TensorEntry("a", "F32", (2,))

    def fail() -> tuple[torch.Tensor]:
        raise RuntimeError("disk on fire")

    good = (Job((entry,), 8, lambda: (torch.ones(2),)),)
    first, third = (Shard(tmp_path / f"{number}.safetensors", {}, good) for number in (1, 3))
    bad = Shard(tmp_path / "2.safetensors", {}, (Job((entry,), 8, fail),))
    done: list[int] = []
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_shards([first, bad, third], 2, done.append)
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]
    assert done == [8]


def test_a_shard_begins_while_the_last_job_of_the_one_before_still_runs(tmp_path: Path) -> None:
    entry, begun = TensorEntry("a", "F32", (2,)), threading.Event()

    def wait_for_the_second() -> tuple[torch.Tensor]:
        assert begun.wait(60)
        return (torch.ones(2),)

    def begin() -> tuple[torch.Tensor]:
        begun.set()
        return (torch.zeros(2),)

    makers = (wait_for_the_second, begin)
    shards = [Shard(tmp_path / f"{n}.safetensors", {}, (Job((entry,), 8, make),)) for n, make in enumerate(makers)]
    write_shards(shards, 2, lambda _: None)
    assert [load_file(shard.path)["a"].tolist() for shard in shards] == [[1, 1], [0, 0]]


def test_a_shard_without_tensors_is_written(tmp_path: Path) -> None:
    write_shards([Shard(tmp_path / "1.safetensors", {"format": "pt"}, ())], 2, lambda _: None)
    assert load_file(tmp_path / "1.safetensors") == {}


def test_torch_keeps_its_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    job = Job((TensorEntry("a", "I64", ()),), 8, lambda: (torch.tensor(torch.get_num_threads()),))
    write_shards([Shard(tmp_path / "1.safetensors", {}, (job,))], 2, lambda _: None)
    assert load_file(tmp_path / "1.safetensors")["a"].item() == 1
    assert torch.get_num_threads() == before


def test_a_document_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")
    (tmp_path / ".config.json.part").write_text("left over by a crash, and longer than the new text")
    write_document(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_disk_that_is_too_small_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"bytes free, but {1 << 62} are needed"):
        require_space(tmp_path, 1 << 62)
