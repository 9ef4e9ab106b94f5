"""Rows between the slabs and where a rank computes, many requests' at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from w4afp8.copies import copy_cuda


class Scattered(NamedTuple):
    """A contiguous tensor, and the places in slabs where its bytes lie one after the other.

    places: (slab as [bytes] uint8, first byte, bytes) each; together as many bytes as the tensor has.
    """

    tensor: Tensor
    places: list[tuple[Tensor, int, int]]


class Mover(Protocol):
    """Starts moves; those that a GPU takes part in are under way on return, on its current stream."""

    def gather(self, rows: Sequence[Scattered]) -> None:
        """Bring tensors from their places. Raises: ValueError for bytes beyond a slab or a tensor."""
        ...

    def scatter(self, rows: Sequence[Scattered]) -> None:
        """Take tensors to their places. Raises: ValueError for bytes beyond a slab or a tensor."""
        ...


class TorchMover:
    """Copies place by place, on any device."""

    def gather(self, rows: Sequence[Scattered]) -> None:
        """See `Mover.gather`."""
        for part, place in _pieces(rows):
            part.copy_(place, non_blocking=True)

    def scatter(self, rows: Sequence[Scattered]) -> None:
        """See `Mover.scatter`."""
        for part, place in _pieces(rows):
            place.copy_(part, non_blocking=True)


class KernelMover:
    """Copies between a GPU and slabs that are registered with it, all at once. device: with its index."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def gather(self, rows: Sequence[Scattered]) -> None:
        """See `Mover.gather`."""
        copy_cuda([(mine, slab, nbytes) for mine, slab, nbytes in _addresses(rows)], self._device)

    def scatter(self, rows: Sequence[Scattered]) -> None:
        """See `Mover.scatter`."""
        copy_cuda([(slab, mine, nbytes) for mine, slab, nbytes in _addresses(rows)], self._device)


def _pieces(rows: Sequence[Scattered]) -> list[tuple[Tensor, Tensor]]:
    """Return the bytes of each place, first the tensor's, then the slab's."""
    pieces = []
    for tensor, places in rows:
        data = tensor.view(-1).view(torch.uint8)
        sizes = [nbytes for _, _, nbytes in places]
        _check_total(sum(sizes), len(data))
        for part, (slab, first, nbytes) in zip(torch.split(data, sizes), places, strict=True):
            _check_place(first, nbytes, len(slab))
            pieces.append((part, slab[first : first + nbytes]))
    return pieces


def _addresses(rows: Sequence[Scattered]) -> list[tuple[int, int, int]]:
    """Return for each place the addresses of its bytes in the tensor and in the slab, and how many they are.

    Whoever moves by addresses checks nothing, so all of it is checked here.
    """
    pieces = []
    for tensor, places in rows:
        at = first_address = tensor.data_ptr()
        known: Tensor | None = None
        for slab, first, nbytes in places:
            if slab is not known:
                known, slab_address, slab_bytes = slab, slab.data_ptr(), len(slab)
            if first < 0 or nbytes < 0 or first + nbytes > slab_bytes:
                _check_place(first, nbytes, slab_bytes)
            pieces.append((at, slab_address + first, nbytes))
            at += nbytes
        _check_total(at - first_address, tensor.nbytes)
    return pieces


def _check_place(first: int, nbytes: int, slab_bytes: int) -> None:
    if first < 0 or nbytes < 0 or first + nbytes > slab_bytes:
        raise ValueError(f"{nbytes} bytes from byte {first} of a slab of {slab_bytes}")


def _check_total(places_bytes: int, tensor_bytes: int) -> None:
    if places_bytes != tensor_bytes:
        raise ValueError(f"places of {places_bytes} bytes for a tensor of {tensor_bytes}")
