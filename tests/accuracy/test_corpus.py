"""Which text is read, and that held-out text is nowhere else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from corpus import Corpus, evenly, find_texts, is_held_out, read_corpus
from recipe import SEPARATOR, Recipe
from torch import Tensor

RECIPE = replace(Recipe(), held_out_share=4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    for number in range(40):
        path = folder / f"package{number % 5}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"number = {number}\n" * 9)
    return folder


def texts(stream: Tensor) -> set[bytes]:
    """Cut a stream into the texts it was made of."""
    bounds = [*torch.nonzero(stream == SEPARATOR).flatten().tolist(), len(stream)]
    return {bytes(stream[first + 1 : last].tolist()) for first, last in pairwise(bounds)}


def read(root: Path, recipe: Recipe = RECIPE) -> Corpus:
    return read_corpus(recipe, {"packages": root})


def test_the_split_is_disjoint_and_whole(root: Path) -> None:
    corpus = read(root)
    train, held_out = texts(corpus.train), texts(corpus.held_out)
    assert train.isdisjoint(held_out)
    assert train | held_out == {f"number = {number}\n".encode() * 9 for number in range(40)}
    assert corpus.about["files_to_train_on"] == len(train)
    assert 0 < corpus.about["files_held_out"] == len(held_out)


def test_the_same_files_give_the_same_streams_wherever_they_lie(root: Path) -> None:
    before = read(root)
    after = read(root.rename(root.with_name("elsewhere")))
    assert torch.equal(before.train, after.train)
    assert torch.equal(before.held_out, after.held_out)
    assert before.about == after.about


def test_a_changed_byte_changes_the_digest(root: Path) -> None:
    before = read(root).about
    (root / "package0/module0.py").write_text("number = 1000\n" * 9)
    assert read(root).about["sha256"] != before["sha256"]


def test_another_package_moves_no_text_to_the_other_side(root: Path) -> None:
    before = read(root)
    for number in range(20):
        (root / f"new{number}.md").write_text(f"new {number}")
    after = read(root)
    assert texts(before.train) < texts(after.train)
    assert texts(before.held_out) < texts(after.held_out)


def test_a_text_that_is_there_twice_is_read_once(root: Path) -> None:
    before = read(root)
    copied = (root / "package0/module0.py").read_bytes()
    for number in range(20):  # some of these names would be held out
        (root / f"copy{number}.py").write_bytes(copied)
    after = read(root)
    assert len(texts(after.train)) + len(texts(after.held_out)) == 40
    assert after.about["files_to_train_on"] + after.about["files_held_out"] == 40
    assert before.about["files_found"] + 20 == after.about["files_found"]


def test_a_root_within_a_root_is_not_read_twice(root: Path) -> None:
    inner = root / "site-packages"
    inner.mkdir()
    (inner / "one.py").write_text("one")
    names = [text.name for text in find_texts({"stdlib": root, "purelib": inner}, 1 << 20)]
    assert names.count("purelib/one.py") == 1
    assert len(names) == 41


def test_only_texts_of_a_size_are_read(root: Path) -> None:
    (root / "large.txt").write_text("x" * 2000)
    (root / "empty.py").write_text("")
    (root / "library.so").write_bytes(b"\x7fELF")
    names = {text.name for text in find_texts({"packages": root}, 1999)}
    assert len(names) == 40


def test_a_limit_takes_texts_by_their_hash(root: Path) -> None:
    whole, part = read(root), read(root, replace(RECIPE, corpus_bytes=2000))
    assert texts(part.train) < texts(whole.train)
    assert texts(part.held_out) < texts(whole.held_out)
    assert len(part.train) + len(part.held_out) <= 2000 + 40
    found = find_texts({"packages": root}, 1 << 20)
    assert any(is_held_out(text, RECIPE) for text in found)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 0 and 0"):
        read(tmp_path)


def test_windows_lie_at_equal_distances_and_do_not_overlap() -> None:
    windows = evenly(torch.arange(100), 4, 20)
    assert windows[:, 0].tolist() == [0, 24, 48, 72]
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)
    with pytest.raises(ValueError, match="5 windows of 20 tokens, got 100"):
        evenly(torch.arange(100), 5, 20)
