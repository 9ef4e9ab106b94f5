"""Memory that connections read into while nobody has said where the bytes belong."""

from __future__ import annotations

BUFFER_BYTES = 64 * 1024
SPARE_BUFFERS = 32
"""Kept for later; more are given back to the system."""


class Buffers:
    """Read buffers of one server: one for whoever reads now, since what is read is parsed at once, and others for
    connections whose bytes have to wait."""

    def __init__(self) -> None:
        self.current = bytearray(BUFFER_BYTES)
        self._spare: list[bytearray] = []

    def keep(self) -> bytearray:
        """Take the current buffer with what is in it; the next read has another."""
        kept = self.current
        self.current = self._spare.pop() if self._spare else bytearray(BUFFER_BYTES)
        return kept

    def give_back(self, buffer: bytearray) -> None:
        """Return a buffer that was kept."""
        if len(self._spare) < SPARE_BUFFERS:
            self._spare.append(buffer)
