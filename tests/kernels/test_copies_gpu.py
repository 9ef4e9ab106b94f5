"""Copies between pinned memory and the GPU, many at a time, of any size from any address."""

from __future__ import annotations

import random

import pytest
import torch

from w4afp8.copies import copy_cuda

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
SIZES = (0, 1, 2, 3, 15, 16, 17, 100, 4096, 14336, 16384, 16385, 100_003, 131_071, 131_072, 1_000_001)


def pinned(nbytes: int, seed: int) -> torch.Tensor:
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.pin_memory()


def places(sizes: list[int], seed: int, aligned: int) -> tuple[list[int], int]:
    """Offsets that do not overlap, in random order. Returns: them, and the bytes they need."""
    generator, offsets, at = random.Random(seed), [0] * len(sizes), 0
    order = list(range(len(sizes)))
    generator.shuffle(order)
    for index in order:
        at += aligned * generator.randrange(1, 5)
        offsets[index] = at
        at += -(-sizes[index] // aligned) * aligned
    return offsets, at + 64


@pytest.mark.parametrize("aligned", [16, 8, 4, 1])
@pytest.mark.parametrize("count", [1, 2, 159, 160, 161, 400])
def test_every_byte_arrives_and_no_other_changes_in_both_directions(count: int, aligned: int) -> None:
    sizes = [SIZES[(index * 7 + count) % len(SIZES)] for index in range(count)]
    sources, source_bytes = places(sizes, seed=count, aligned=aligned)
    targets, target_bytes = places(sizes, seed=count + 1, aligned=aligned)
    host = pinned(source_bytes, seed=count)
    device = torch.full((target_bytes,), 0xA5, dtype=torch.uint8, device=GPU)
    moves = list(zip(targets, sources, sizes, strict=True))
    copy_cuda([(device.data_ptr() + to, host.data_ptr() + at, nbytes) for to, at, nbytes in moves], GPU)
    expected = torch.full((target_bytes,), 0xA5, dtype=torch.uint8)
    for to, at, nbytes in moves:
        expected[to : to + nbytes] = host[at : at + nbytes]
    assert torch.equal(device.cpu(), expected)

    back = torch.zeros(source_bytes, dtype=torch.uint8).pin_memory()
    copy_cuda([(back.data_ptr() + at, device.data_ptr() + to, nbytes) for to, at, nbytes in moves], GPU)
    torch.cuda.synchronize()
    expected = torch.zeros(source_bytes, dtype=torch.uint8)
    for _, at, nbytes in moves:
        expected[at : at + nbytes] = host[at : at + nbytes]
    assert torch.equal(back, expected)


def test_copies_keep_the_order_of_their_stream() -> None:
    """What the host wrote before a launch arrives, though an earlier launch had read the same bytes."""
    stream = torch.cuda.Stream()
    host, device = torch.zeros(14336, dtype=torch.uint8).pin_memory(), torch.zeros(3, 14336, dtype=torch.uint8).cuda()
    with torch.cuda.stream(stream):
        for turn in range(50):
            host.fill_(turn)
            copy_cuda([(device[row].data_ptr(), host.data_ptr(), 14336) for row in range(3)], GPU)
            stream.synchronize()
            assert bool((device == turn).all())


def test_no_copies_are_none() -> None:
    copy_cuda([], GPU)
