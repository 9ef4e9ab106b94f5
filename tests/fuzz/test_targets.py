"""The fuzz targets hold on their seeds, on what was found before, and on a few mutations, so that they cannot rot."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .targets import TARGETS, seeds

FOUND = Path(__file__).parent / "found"


@pytest.mark.parametrize("name", list(TARGETS))
def test_seeds_finds_and_mutations_of_them_are_read_or_refused(name: str) -> None:
    generator = random.Random(0)
    for start in (*seeds(name), *(path.read_bytes() for path in sorted(FOUND.glob(f"{name}/*")))):
        TARGETS[name](start)
        for _ in range(50):
            mutated = bytearray(start)
            for _ in range(generator.randint(1, 4)):
                mutated[generator.randrange(len(mutated))] = generator.randrange(256)
            TARGETS[name](bytes(mutated[: generator.randint(0, len(mutated))]))
