"""The slab: extents never overlap, holes grow together again, and another process sees the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_forward.slab import ALIGNMENT_BYTES, Extent, Slab, map_slab

UNITS = 64
SLAB_BYTES = UNITS * ALIGNMENT_BYTES


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(SLAB_BYTES)
    yield made
    made.close()


def units(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT_BYTES))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("allocate"), st.integers(0, 20 * ALIGNMENT_BYTES)),
            st.tuples(st.just("free"), st.integers(0, 1000)),
        ),
        max_size=120,
    )
)
def test_any_sequence_keeps_extents_apart_and_gives_everything_back(actions: list[tuple[str, int]]) -> None:
    slab = Slab(SLAB_BYTES)
    owner: list[Extent | None] = [None] * UNITS  # who holds each unit, kept independently of the allocator
    live: list[Extent] = []
    for action, number in actions:
        if action == "free":
            if live:
                extent = live.pop(number % len(live))
                slab.free(extent)
                owner = [None if holder == extent else holder for holder in owner]
            continue
        extent_or_none = slab.allocate(number)
        holes = "".join("#" if holder else "." for holder in owner).split("#")
        if extent_or_none is None:
            assert max(map(len, holes)) < units(number), "refused although a hole was large enough"
            continue
        assert extent_or_none.nbytes == number
        assert extent_or_none.offset % ALIGNMENT_BYTES == 0
        first = extent_or_none.offset // ALIGNMENT_BYTES
        taken = slice(first, first + units(number))
        assert owner[taken] == [None] * units(number), "overlaps a live extent or leaves the slab"
        owner[taken] = [extent_or_none] * units(number)
        live.append(extent_or_none)
        assert slab.taken_bytes == ALIGNMENT_BYTES * sum(holder is not None for holder in owner)
    for extent in live:
        slab.free(extent)
    assert slab.taken_bytes == 0
    assert slab.allocate(SLAB_BYTES) == Extent(0, SLAB_BYTES)
    slab.close()


def test_full_slab_gives_none_until_something_is_freed(slab: Slab) -> None:
    extents = [slab.allocate(ALIGNMENT_BYTES) for _ in range(UNITS)]
    assert None not in extents
    assert slab.allocate(0) is None
    assert extents[7] is not None
    slab.free(extents[7])
    assert slab.allocate(1) == Extent(7 * ALIGNMENT_BYTES, 1)


def test_hole_that_is_too_small_is_passed_over(slab: Slab) -> None:
    first = slab.allocate(ALIGNMENT_BYTES)
    slab.allocate(ALIGNMENT_BYTES)
    assert first is not None
    slab.free(first)
    assert slab.allocate(ALIGNMENT_BYTES + 1) == Extent(2 * ALIGNMENT_BYTES, ALIGNMENT_BYTES + 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_grow_together_in_any_order_of_freeing(slab: Slab, order: tuple[int, ...]) -> None:
    extents = [slab.allocate(SLAB_BYTES // 4) for _ in range(4)]
    for index in order:
        extent = extents[index]
        assert extent is not None
        slab.free(extent)
    assert slab.allocate(3 * SLAB_BYTES // 4) == Extent(0, 3 * SLAB_BYTES // 4)


def test_double_free_raises(slab: Slab) -> None:
    extent = slab.allocate(100)
    assert extent is not None
    slab.free(extent)
    with pytest.raises(ValueError, match="extent at 0 is not taken"):
        slab.free(extent)


def test_freeing_the_middle_of_an_extent_raises(slab: Slab) -> None:
    slab.allocate(3 * ALIGNMENT_BYTES)
    with pytest.raises(ValueError, match="not taken"):
        slab.free(Extent(ALIGNMENT_BYTES, 1))


def test_size_is_rounded_down_to_whole_units() -> None:
    slab = Slab(SLAB_BYTES + ALIGNMENT_BYTES - 1)
    assert slab.nbytes == SLAB_BYTES
    slab.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, SLAB_BYTES + 1), (SLAB_BYTES, 1), (8, -1)])
def test_view_outside_the_slab_raises(slab: Slab, offset: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="outside a slab of"):
        slab.view(offset, nbytes)


def test_view_writes_only_its_own_bytes(slab: Slab) -> None:
    slab.view(10, 3)[:] = b"abc"
    assert bytes(slab.view(9, 5)) == b"\0abc\0"
    assert len(slab.view(SLAB_BYTES, 0)) == 0


def test_view_survives_the_closing_of_the_descriptor() -> None:
    slab = Slab(SLAB_BYTES)
    view = slab.view(0, 4)
    slab.close()
    view[:] = b"stay"
    assert bytes(view) == b"stay"


def test_another_process_sees_writes_and_answers_in_place(slab: Slab) -> None:
    slab.view(300, 5)[:] = b"hello"
    program = (
        "import sys; from moe_forward.slab import map_slab\n"
        "memory = map_slab(int(sys.argv[1]), int(sys.argv[2]))\n"
        "memory[1000:1005] = bytes(memory[300:305]).upper()"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(slab.fd), str(slab.nbytes)],
        check=True,
        timeout=60,
        pass_fds=[slab.fd],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert bytes(slab.view(1000, 5)) == b"HELLO"


def test_mapping_more_than_the_file_has_is_refused(slab: Slab) -> None:
    with pytest.raises(ValueError, match=f"has {SLAB_BYTES} bytes, {SLAB_BYTES + 1} were announced"):
        map_slab(slab.fd, SLAB_BYTES + 1)


def test_what_was_freed_last_is_taken_first_by_who_needs_as_much(slab: Slab) -> None:
    extents = [slab.allocate(3 * ALIGNMENT_BYTES) for _ in range(4)]
    for index in (0, 2):
        extent = extents[index]
        assert extent is not None
        slab.free(extent)
    assert slab.allocate(3 * ALIGNMENT_BYTES - 1) == Extent(6 * ALIGNMENT_BYTES, 3 * ALIGNMENT_BYTES - 1)
