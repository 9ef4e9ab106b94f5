"""Rows move between tensors and slabs, from any byte; those beyond either are refused before anything is moved."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from moe_forward import moves
from moe_forward.moves import KernelMover, Mover, Scattered, TorchMover

GPU = torch.device("cuda:1")
Copies = list[tuple[int, int, int]]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """What the kernel library was asked to copy."""
    asked: Copies = []

    def copy_cuda(copies: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        assert device == GPU
        asked.extend(copies)

    monkeypatch.setattr(moves, "copy_cuda", copy_cuda)
    return asked


def test_rows_of_any_type_come_from_and_go_to_any_byte_of_several_slabs() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    slabs = torch.zeros(150, dtype=torch.uint8), torch.zeros(90, dtype=torch.uint8)
    places = [(slabs[0], 3, 28), (slabs[1], 5, 84), (slabs[0], 101, 28)]
    TorchMover().scatter([Scattered(rows, places)])
    assert torch.equal(slabs[1][5:89], rows[1:4].flatten().view(torch.uint8))
    assert [int((slab != 0).nonzero().max()) for slab in slabs] == [128, 88]
    back = torch.zeros(5, 7)
    TorchMover().gather([Scattered(back, places)])
    assert torch.equal(back, rows)


@pytest.mark.parametrize("mover", [TorchMover(), KernelMover(GPU)])
@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([(0, 4), (7, 4)], "4 bytes from byte 7 of a slab of 10"),
        ([(-1, 8)], "8 bytes from byte -1"),
        ([(0, 4)], "places of 4 bytes for a tensor of 8"),
        ([(0, 4), (0, 4), (0, 4)], "places of 12 bytes for a tensor of 8"),
    ],
)
def test_bytes_beyond_a_slab_or_a_tensor_are_refused(
    mover: Mover, places: list[tuple[int, int]], said: str, copies: Copies
) -> None:
    rows, slab = torch.ones(2), torch.zeros(10, dtype=torch.uint8)
    scattered = [Scattered(rows, [(slab, first, nbytes) for first, nbytes in places])]
    for move in (mover.gather, mover.scatter):
        with pytest.raises(ValueError, match=said):
            move(scattered)
    assert not slab.any()
    assert rows.tolist() == [1.0, 1.0]
    assert copies == []


def test_the_kernel_library_is_given_addresses_target_first(copies: Copies) -> None:
    slab, rows = torch.zeros(100, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.bfloat16)
    scattered = [Scattered(rows, [(slab, 7, 10), (slab, 60, 30)])]
    at, mine = slab.data_ptr(), rows.data_ptr()
    KernelMover(GPU).gather(scattered)
    assert copies == [(mine, at + 7, 10), (mine + 10, at + 60, 30)]
    copies.clear()
    KernelMover(GPU).scatter(scattered)
    assert copies == [(at + 7, mine, 10), (at + 60, mine + 10, 30)]
