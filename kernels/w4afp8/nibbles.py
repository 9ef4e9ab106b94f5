"""Bit work of the weight packer: eight or sixteen 4-bit codes of an integer at once, in place. See `packed`."""

from __future__ import annotations

import torch

# Signs of the eight nibbles of a 32-bit word, as a signed integer.
_SIGNS = 0x88888888 - (1 << 32)
_MAGNITUDES = 0x77777777
_LOWEST_BITS = 0x1111111111111111


def to_sign_magnitude(nibbles: torch.Tensor, full_range: bool) -> None:
    """Turn two's complement codes into sign and magnitude.

    nibbles: [...] int64, 16 codes each, none of them -8 unless full_range.
    full_range: the magnitude of a negative code q becomes |q| - 1 instead of |q|.
    """
    signs = (nibbles >> 3).bitwise_and_(_LOWEST_BITS)
    nibbles.bitwise_xor_(signs * 7)  # negative codes have the magnitude |q| - 1 now
    if not full_range:
        nibbles.add_(signs)  # |q| - 1 is at most 6, so no carry leaves its nibble


def from_sign_magnitude(nibbles: torch.Tensor, full_range: bool) -> None:
    """Undo `to_sign_magnitude`. nibbles: [...] int64 without negative zeros. full_range: as there."""
    signs = (nibbles >> 3).bitwise_and_(_LOWEST_BITS)
    if not full_range:
        nibbles.sub_(signs)
    nibbles.bitwise_xor_(signs * 7)


def join_rows(words: torch.Tensor) -> None:
    """Interleave the four sign-magnitude codes of two rows as the kernel's conversion takes them.

    words: [...] int32. Before: codes of row hi = 0 in the lower half, of hi = 1 in the upper half. After: byte i has
        the magnitude of code i of row hi = 0 in its bits 0 to 2, of row hi = 1 in bits 4 to 6, and all signs are four
        bits above their place, around the end.
    """
    _swap(words, 0x0000FF00, 8)
    _swap(words, 0x00F000F0, 4)
    signs = words & _SIGNS
    words.bitwise_and_(_MAGNITUDES)
    words.bitwise_or_(signs << 4).bitwise_or_((signs >> 28).bitwise_and_(8))


def split_rows(words: torch.Tensor) -> None:
    """Undo `join_rows`. words: [...] int32."""
    signs = words & _SIGNS
    words.bitwise_and_(_MAGNITUDES)
    words.bitwise_or_((signs >> 4).bitwise_and_(0x08888888)).bitwise_or_(signs << 28)
    _swap(words, 0x00F000F0, 4)
    _swap(words, 0x0000FF00, 8)


def _swap(words: torch.Tensor, mask: int, distance: int) -> None:
    """Exchange the bits of `mask` with those `distance` above them."""
    difference = (words >> distance).bitwise_xor_(words).bitwise_and_(mask)
    words.bitwise_xor_(difference).bitwise_xor_(difference.bitwise_left_shift_(distance))
