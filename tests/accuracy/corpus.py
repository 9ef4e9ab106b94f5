"""Text that ships with the machine: Python's sources and documents, of the standard library and installed packages.

Nothing is kept in the repository; the same image gives the same text, and a digest says so. One text in some is held
out, chosen by a hash of its path, which does not depend on what else is installed.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe import SEPARATOR, Recipe
from torch import Tensor

SUFFIXES = (".md", ".py", ".rst", ".txt")
READERS = 16


@dataclass(frozen=True)
class Text:
    """A file. name: its path from the root it was found under, behind the root's name. size_bytes: of the file."""

    name: str
    path: Path
    size_bytes: int

    @property
    def rank(self) -> int:
        """Where its name's hash puts it, from 0 up to 2^64."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Corpus:
    """Two streams of tokens: bytes, with `SEPARATOR` before each text.

    train, held_out: [N] int16 on the CPU. about: counts, sources and digest, for the results.
    """

    train: Tensor
    held_out: Tensor
    about: dict[str, Any]


def machine_roots() -> dict[str, Path]:
    """Where this interpreter's standard library and packages lie: name -> folder."""
    return {name: Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}


def read_corpus(recipe: Recipe, roots: dict[str, Path] | None = None) -> Corpus:
    """Find, read and split the texts of this machine.

    Texts that are the same are taken once. Where there are more than `corpus_bytes`, those of the lowest hashes are
    taken, so that every package has its share.

    roots: name -> folder to search; default: this interpreter's.
    Raises: ValueError where there is no text to train on, or none held out.
    """
    roots = roots or machine_roots()
    found = sorted(find_texts(roots, recipe.largest_text_bytes), key=lambda text: (text.rank, text.name))
    chosen: list[Text] = []
    total_bytes = 0
    for text in found:
        if total_bytes + text.size_bytes > recipe.corpus_bytes:
            break
        chosen.append(text)
        total_bytes += text.size_bytes
    chosen.sort(key=lambda text: text.name)
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(lambda text: text.path.read_bytes(), chosen))
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for text, content in zip(chosen, contents, strict=True):
        identity = hashlib.sha256(content).digest()
        if content and identity not in seen:
            seen.add(identity)
            digest.update(text.name.encode() + b"\0" + identity)
            parts[is_held_out(text, recipe)].append(content)
    if not parts[False] or not parts[True]:
        raise ValueError(
            f"texts: expected some to train on and some held out under {', '.join(map(str, roots.values()))}, "
            f"found {len(parts[False])} and {len(parts[True])}"
        )
    train, held_out = (_stream(parts[held]) for held in (False, True))
    about = {
        "roots": sorted(roots),
        "suffixes": list(SUFFIXES),
        "files_found": len(found),
        "files_to_train_on": len(parts[False]),
        "files_held_out": len(parts[True]),
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
        "sha256": digest.hexdigest(),
    }
    return Corpus(train, held_out, about)


def is_held_out(text: Text, recipe: Recipe) -> bool:
    """Whether a text is for evaluation only; decided by its name alone."""
    return text.rank % recipe.held_out_share == 0


def find_texts(roots: dict[str, Path], largest_bytes: int) -> Iterator[Text]:
    """Find every text under the roots, none of them twice where one root lies in another."""
    for name, root in roots.items():
        others = {other.resolve() for other in roots.values() if other.resolve() != root.resolve()}
        for path in _files(root, others):
            size_bytes = path.stat().st_size
            if 0 < size_bytes <= largest_bytes:
                yield Text(f"{name}/{path.relative_to(root).as_posix()}", path, size_bytes)


def evenly(stream: Tensor, windows: int, window_tokens: int) -> Tensor:
    """Take windows at equal distances from a stream.

    Returns: [windows, window_tokens + 1] int64, inputs and, one further, what follows them.
    Raises: ValueError where the stream has too few tokens for windows that do not overlap.
    """
    distance = (len(stream) - 1) // windows
    if distance < window_tokens:
        raise ValueError(
            f"held-out text: expected {windows} windows of {window_tokens} tokens, got {len(stream)} tokens in all"
        )
    return torch.stack([stream[start * distance :][: window_tokens + 1] for start in range(windows)]).long()


def _files(folder: Path, closed: Iterable[Path]) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        # site-packages may be a folder of the standard library, and dist-packages one of Debian's
        folders[:] = sorted(
            name
            for name in folders
            if name not in ("__pycache__", "site-packages", "dist-packages") and (Path(where) / name) not in closed
        )
        for name in sorted(names):
            path = Path(where) / name
            if name.endswith(SUFFIXES) and path.is_file():
                yield path


def _stream(contents: list[bytes]) -> Tensor:
    tokens = np.empty(sum(map(len, contents)) + len(contents), dtype=np.int16)
    first = 0
    for content in contents:
        tokens[first] = SEPARATOR
        tokens[first + 1 : first + 1 + len(content)] = np.frombuffer(content, dtype=np.uint8)
        first += 1 + len(content)
    return torch.from_numpy(tokens)
