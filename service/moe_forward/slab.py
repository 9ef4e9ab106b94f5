"""A front end's shared memory: request bodies and replies lie here, and ranks read and write them in place.

A slab is an anonymous file (memfd): it has no name to leak, is not limited by the size of /dev/shm, and its memory
goes back when the last process that holds the descriptor ends. Only the front end that made it allocates in it, so
no lock is shared between processes; engine and ranks get the descriptor over their channels.
"""

from __future__ import annotations

import bisect
import mmap
import os
from typing import NamedTuple

ALIGNMENT_BYTES = 256
"""Extents start on this boundary, so that no cache line (or DMA burst) belongs to two requests."""

READY_PART = 1 / 8
"""Of a slab may lie in extents that wait for a request of the same size."""


class Extent(NamedTuple):
    """A piece of a slab.

    offset, nbytes: bytes, from the start of the slab; `nbytes` as asked for, what is taken is rounded up.
    """

    offset: int
    nbytes: int


class Slab:
    """Shared memory with a first-fit allocator over byte extents.

    What was freed last is taken first by who needs as much: its bytes are still in the caches, and nothing is searched.

    nbytes: size of the memory file; pages are taken from the system when first touched.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        self.fd = os.memfd_create("moe-forward-slab", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.nbytes)
        self._memory = memoryview(map_slab(self.fd, self.nbytes))
        self._free: list[tuple[int, int]] = [(0, self.nbytes)]  # (offset, bytes), ascending, never adjacent
        self._ready: dict[int, list[int]] = {}  # bytes -> offsets of freed extents that are not in `_free` yet
        self._ready_bytes = 0
        self._most_ready_bytes = int(self.nbytes * READY_PART)
        self._taken: dict[int, int] = {}

    @property
    def taken_bytes(self) -> int:
        """Bytes that belong to extents not yet freed."""
        return sum(self._taken.values())

    def allocate(self, nbytes: int) -> Extent | None:
        """Take an extent of `nbytes` bytes (0 is one unit), or None when no hole is large enough."""
        need = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES or ALIGNMENT_BYTES
        ready = self._ready.get(need)
        if ready:
            offset = ready.pop()
            self._ready_bytes -= need
        else:
            found = self._first_fit(need)
            if found is None and self._ready_bytes:
                self._join_ready()
                found = self._first_fit(need)
            if found is None:
                return None
            offset = found
        self._taken[offset] = need
        return Extent(offset, nbytes)

    def free(self, extent: Extent) -> None:
        """Give an extent back; freeing one that is not taken is a bug and raises ValueError."""
        size = self._taken.pop(extent.offset, None)
        if size is None:
            raise ValueError(f"the extent at {extent.offset} is not taken")
        ready = self._ready.get(size)
        if ready is None:
            self._ready[size] = [extent.offset]
        else:
            ready.append(extent.offset)
        self._ready_bytes += size
        if self._ready_bytes > self._most_ready_bytes:
            self._join_ready()

    def _first_fit(self, need: int) -> int | None:
        for index, (offset, size) in enumerate(self._free):
            if size >= need:
                if size == need:
                    del self._free[index]
                else:
                    self._free[index] = (offset + need, size - need)
                return offset
        return None

    def _join_ready(self) -> None:
        """Let every freed extent grow together with the holes beside it."""
        for size, offsets in self._ready.items():
            for offset in offsets:
                self._join(offset, size)
        self._ready.clear()
        self._ready_bytes = 0

    def _join(self, offset: int, size: int) -> None:
        index = bisect.bisect_left(self._free, (offset, 0))
        if index < len(self._free) and offset + size == self._free[index][0]:
            size += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == offset:
            index -= 1
            offset, size = self._free[index][0], self._free[index][1] + size
            self._free[index] = (offset, size)
        else:
            self._free.insert(index, (offset, size))

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return the writable bytes [offset, offset + nbytes)."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"[{offset}, {offset + nbytes}) is outside a slab of {self.nbytes} bytes")
        return self._memory[offset : offset + nbytes]

    def close(self) -> None:
        """Close the descriptor; the mapping goes when its last view does."""
        os.close(self.fd)


def map_slab(fd: int, nbytes: int) -> mmap.mmap:
    """Map the memory file `fd` of `nbytes` bytes, shared and writable.

    Raises: ValueError when the file is shorter, since touching the missing pages would kill the process.
    """
    size = os.fstat(fd).st_size
    if size < nbytes:
        raise ValueError(f"the slab's file has {size} bytes, {nbytes} were announced")
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
