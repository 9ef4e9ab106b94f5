"""Int4 weights as the sm_90a kernel reads them: one contiguous block for each expert, 128 outputs and 128 inputs.

A block has 8192 bytes of codes and 256 bytes of scales (1024 where 32 inputs share a scale), so that one bulk copy
fetches both and the K loop of a tile reads consecutive memory. Inside, everything lies where the tensor core wants it:

Row r = 0..127 of a tile is wg = r / 64 (warpgroup), w = r % 64 / 16 (warp), hi = r / 8 % 2, l4 = r % 8. Input
k = 0..127 of a group is step = k / 32 (one wgmma), r1 = k % 32 / 16 (register pair), lm = k % 16 / 4, byte = k % 4.
Four inputs of the two rows hi = 0 and hi = 1 share a little-endian 32-bit word. Word 2 * step + r1 of thread
w * 32 + l4 * 4 + lm lies at byte wg * 4096 + word / 4 * 2048 + thread * 16 + word % 4 * 4.

In a word a code is a sign and a magnitude of 3 bits. Row hi = 0: magnitude in bits 8 * byte to + 2, sign in bit
8 * byte + 7. Row hi = 1: magnitude in bits 8 * byte + 4 to + 6, sign in bit 8 * ((byte + 1) % 4) + 3. So two ANDs and
one rotation make eight e4m3 bytes of value magnitude * 2^-9: e4m3 is linear from 0 to 15 * 2^-9. Where a code of a
weight is -8, and always in groups of 32, `full_range` is set, and negative codes are stored as |q| - 1.

Scales are ratios to a power of two c[n] of each row, with the largest of a row in [512, 1024): 16 bits, 4 of exponent
and 12 of mantissa, no sign: u is 2^(u / 4096 - 6) * (1 + u % 4096 / 4096), / rounding down. That is twice a float16's
precision and more where it counts: a ratio of at least 2^-6 is rounded by at most 2^-13 of itself. Smaller ones, below
2^-15 of the row's largest, are written as u = 1, or below 2^-7, 0 among them, as u = 0 with codes 0. They are ordered
wg, w, l4, hi, in groups of 32 those of step 0 first. `channel_scales` is c[n] * 512, which undoes the 2^-9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from w4afp8.checks import weight_group, weight_shape
from w4afp8.nibbles import from_sign_magnitude, join_rows, split_rows, to_sign_magnitude
from w4afp8.tensors import Int4Weight

TILE_ROWS = 128
"""Outputs of one block."""

TILE_INPUTS = 128
"""Inputs of one block."""

GROUPS = (128, 32)
"""Inputs that can share a scale."""

CODE_BYTES = TILE_ROWS * TILE_INPUTS // 2

# Rows packed at a time on a CPU: the temporaries of 512 x 7168 codes stay near its caches. A GPU takes all at once.
_CPU_ROWS = 512
_MAGNITUDE_UNIT = 2.0**-9


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The int4 weights of E experts in blocks; see above.

    blocks: [E, N_pad/128, K_pad/128, block_bytes] uint8, contiguous; N_pad and K_pad are N and K rounded up to
        multiples of 128 and 256, filled with codes 0 and scales 0.
    channel_scales: [E, N_pad] float32, powers of two, or 0 for rows whose scales are all 0.
    n, k: outputs and inputs of an expert. group: inputs that share a scale. full_range: codes may be -8.
    codes: what a block's codes are; `packed_fp8` makes the other kind.
    """

    blocks: torch.Tensor
    channel_scales: torch.Tensor
    n: int
    k: int
    group: int
    full_range: bool
    codes: Literal["int4", "fp8"] = "int4"

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.blocks.shape[0]


def blocks_shape(experts: int, n: int, k: int, group: int) -> tuple[int, int, int, int]:
    """Shape of `PackedWeight.blocks` of E int4 experts [N, K] with scales for `group` inputs each."""
    return experts, -(-n // TILE_ROWS), -(-k // (2 * TILE_INPUTS)) * 2, CODE_BYTES + scale_bytes(group)


def scale_bytes(group: int) -> int:
    """Bytes of the scales at the end of a block."""
    return 2 * TILE_ROWS * (TILE_INPUTS // group)


def pack(weights: Sequence[Int4Weight] | Int4Weight, device: torch.device | str | None = None) -> PackedWeight:
    """Pack the weights of E experts for the kernel, one expert at a time.

    weights: E weights of one shape, codes [N, K/2] and scales [N, K/group] with groups of 128 or 32; or one weight of
        codes [E, N, K/2] and scales [E, N, K/group]. Read twice where groups have 128 inputs and a code is -8.
    device: where to pack and keep them; by default where they are.
    Returns: the packed weights; codes are exact, scales rounded as said above.
    Raises: ValueError for no experts, differing shapes, a group other than 128 and 32, and NaN, Inf or
        negative numbers among the scales.
    """
    experts = _unstack(weights)
    if not experts:
        raise ValueError("weights: expected at least one expert, got none")
    n, k = weight_shape(experts[0])
    group = weight_group(experts[0])
    if group not in GROUPS:
        raise ValueError(f"weights: expected groups of {' or '.join(map(str, GROUPS))} inputs, got groups of {group}")
    where = experts[0].codes.device if device is None else torch.device(device)
    blocks = torch.empty(blocks_shape(len(experts), n, k, group), dtype=torch.uint8, device=where)
    channel_scales = torch.empty(len(experts), blocks.shape[1] * TILE_ROWS, dtype=torch.float32, device=where)
    full_range = group != TILE_INPUTS
    if not all(_pack_expert(experts, e, blocks[e], channel_scales[e], full_range) for e in range(len(experts))):
        full_range = True
        for e in range(len(experts)):
            _pack_expert(experts, e, blocks[e], channel_scales[e], full_range)
    return PackedWeight(blocks, channel_scales, n, k, group, full_range)


def unpack(packed: PackedWeight, expert: int) -> Int4Weight:
    """Undo `pack` for one expert.

    packed: made by `pack`. expert: 0 to E - 1.
    Returns: codes [N, K/2] as they were, scales [N, K/group] rounded as said above.
    Raises: IndexError for an expert that is not there.
    """
    blocks = packed.blocks[expert]
    tiles, groups = blocks.shape[:2]
    words = torch.unflatten(blocks.view(torch.int32)[..., : CODE_BYTES // 4], 2, (2, 2, 32, 4, 4))
    words = words.permute(0, 2, 4, 1, 3, 6, 5).reshape(tiles * 8, 8, groups * TILE_INPUTS // 4)
    split_rows(words)
    units = torch.unflatten(words.view(torch.int16), 2, (-1, 2)).permute(0, 3, 1, 2)
    codes = units.reshape(tiles * TILE_ROWS, -1)
    from_sign_magnitude(codes.view(torch.int64), packed.full_range)
    ratios = torch.unflatten(blocks.view(torch.int16)[..., CODE_BYTES // 2 :], 2, (-1, 2, 4, 8, 2))
    ratios = ratios.permute(0, 3, 4, 6, 5, 1, 2).reshape(tiles * TILE_ROWS, -1)
    units = packed.channel_scales[expert].to(torch.float64) * _MAGNITUDE_UNIT
    scales = widen_ratios(ratios).to(torch.float64) * units[:, None]
    columns = packed.k // packed.group
    return Int4Weight(
        codes.view(torch.int8)[: packed.n, : packed.k // 2].contiguous(),
        scales[: packed.n, :columns].to(torch.float32).contiguous(),
    )


def interleave(gate: Int4Weight, up: Int4Weight) -> Int4Weight:
    """Put gate and up together for the SwiGLU epilogue: 8 gate rows, 8 up rows, in turn.

    gate, up: [..., I, K], I a multiple of 8.
    Returns: [..., 2 * I, K]; row 16 * c + i is gate row 8 * c + i, row 16 * c + 8 + i is up row 8 * c + i (i < 8).
    Raises: ValueError for shapes that differ, and for rows in no multiple of 8.
    """
    if gate.codes.shape != up.codes.shape or gate.scales.shape != up.scales.shape:
        raise ValueError(
            f"gate, up: expected one shape, got codes {list(gate.codes.shape)} and {list(up.codes.shape)}, "
            f"scales {list(gate.scales.shape)} and {list(up.scales.shape)}"
        )
    if gate.codes.ndim < 2 or gate.codes.shape[-2] % 8:
        raise ValueError(f"gate, up: expected rows in multiples of 8, got codes {list(gate.codes.shape)}")
    codes, scales = (
        torch.stack([torch.unflatten(part, -2, (-1, 8)) for part in pair], dim=-3).flatten(-4, -2)
        for pair in zip(gate, up, strict=True)
    )
    return Int4Weight(codes, scales)


def _unstack(weights: Sequence[Int4Weight] | Int4Weight) -> Sequence[Int4Weight]:
    if not isinstance(weights, Int4Weight):
        return weights
    if weights.codes.ndim != 3 or weights.scales.ndim != 3 or weights.codes.shape[0] != weights.scales.shape[0]:
        raise ValueError(
            "weights: expected codes [E, N, K/2] and scales [E, N, K/group], "
            f"got {list(weights.codes.shape)} and {list(weights.scales.shape)}"
        )
    return [Int4Weight(*pair) for pair in zip(weights.codes.unbind(0), weights.scales.unbind(0), strict=True)]


def _pack_expert(
    experts: Sequence[Int4Weight], index: int, blocks: torch.Tensor, channel_scales: torch.Tensor, full_range: bool
) -> bool:
    """Fill blocks [N_pad/128, K_pad/128, bytes] and channel scales [N_pad] of an expert; False: needs full_range."""
    weight = experts[index]
    shape, group = weight_shape(experts[0]), weight_group(experts[0])
    if weight_shape(weight) != shape:
        raise ValueError(
            f"weights: expected {list(shape)} for all experts, got {list(weight_shape(weight))} at {index}"
        )
    if weight_group(weight) != group:
        raise ValueError(
            f"weights: expected groups of {group} inputs for all experts, got {weight_group(weight)} at {index}"
        )
    codes, scales = weight.codes.to(blocks.device), weight.scales.to(blocks.device)
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise ValueError(f"weights: expected finite scales, not negative, got others at expert {index}")
    ratios, unit = scale_ratios(scales, blocks.shape[0] * TILE_ROWS, blocks.shape[1] * TILE_INPUTS // group)
    empty = ratios[: shape[0], : scales.shape[1]] == 0
    if bool(empty.any()):
        codes = torch.unflatten(codes, 1, (-1, group // 2)).masked_fill(empty.unsqueeze(2), 0).flatten(1)
    rows = _CPU_ROWS if blocks.device.type == "cpu" else blocks.shape[0] * TILE_ROWS
    for first in range(0, shape[0], rows):
        part = codes[first : first + rows]
        if not full_range and _has_lowest(part):
            return False
        _pack_codes(part, blocks[first // TILE_ROWS : (first + rows) // TILE_ROWS], full_range)
    write_ratios(ratios, blocks[..., CODE_BYTES:])
    channel_scales.copy_(unit / _MAGNITUDE_UNIT)
    return True


def _has_lowest(codes: torch.Tensor) -> bool:
    """Whether a code is -8: the high nibble of a byte up to -113, the low one where 16 * byte is -128."""
    return int(codes.amin()) <= -113 or int((codes << 4).amin()) == -128


def _pack_codes(codes: torch.Tensor, blocks: torch.Tensor, full_range: bool) -> None:
    """Write the codes [R, K/2] int8 of whole tiles, the last of which may lack rows, into their blocks."""
    tiles, groups = blocks.shape[:2]
    shape = (tiles * TILE_ROWS, groups * TILE_INPUTS // 2)
    padded = torch.empty(shape, dtype=torch.int8, device=codes.device)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    padded[codes.shape[0] :] = 0
    padded[:, codes.shape[1] :] = 0
    to_sign_magnitude(padded.view(torch.int64), full_range)
    units = padded.view(torch.int16).view(tiles * 8, 2, 8, -1)  # four codes each; [tile, wg and w; hi; l4; inputs / 4]
    words = units[:, 0].to(torch.int32).bitwise_and_(0xFFFF)
    words.bitwise_or_(units[:, 1].to(torch.int32).bitwise_left_shift_(16))
    join_rows(words)
    source = words.view(tiles, 2, 32, groups, 2, 4, 4)  # tile, wg, w and l4, group, step / 2, word % 4, lm
    source = source.permute(0, 3, 1, 4, 2, 6, 5)
    target = torch.unflatten(blocks.view(torch.int32)[..., : CODE_BYTES // 4], 2, (2, 2, 32, 4, 4))
    for lm in range(4):  # one copy of all would walk in steps of a single word
        target[..., lm, :] = source[..., lm, :]


def scale_ratios(scales: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split scales into a power of two of each row and ratios to it in 16 bits, as said above.

    scales: [N, G] float32, not negative. rows, columns: of the result, at least N and G; the rest is 0.
    Returns: ratios [rows, columns] int16, and the powers of two [rows] float64, 0 for rows of zeros.
    """
    padded = torch.zeros(rows, columns, dtype=torch.float64, device=scales.device)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    peak = padded.amax(dim=1)
    # peak = m * 2^exponent with m in [1/2, 1); float64, because 2^(10 - exponent) can exceed float32.
    unit = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 10)
    bits = (padded / unit[:, None]).to(torch.float32).view(torch.int32)
    rounded = (bits + 0x3FF + ((bits >> 11) & 1)) >> 11  # to nearest even, 12 bits of mantissa left
    ratios = (rounded - ((127 - 6) << 12)).clamp_(1, 0xFFFF).masked_fill_(bits < (127 - 7) << 23, 0)
    return ratios.to(torch.int16), torch.where(peak == 0, 0.0, unit)


def widen_ratios(ratios: torch.Tensor) -> torch.Tensor:
    """Undo the 16 bits: ratios [...] int16 to float32, 0 where all bits are."""
    unsigned = ratios.to(torch.int32) & 0xFFFF
    wide = ((unsigned << 11) + ((127 - 6) << 23)).view(torch.float32)
    return wide.masked_fill(unsigned == 0, 0.0)


def write_ratios(ratios: torch.Tensor, area: torch.Tensor) -> None:
    """Write ratios [N_pad, groups] int16 into the ends of blocks, area [N_pad/128, K_pad/128, bytes] uint8."""
    tiles, blocks = area.shape[:2]
    source = ratios.view(tiles, 2, 4, 2, 8, blocks, -1)  # tile, wg, w, hi, l4, block, group in it
    target = torch.unflatten(area.view(torch.int16), 2, (-1, 2, 4, 8, 2))
    target.copy_(source.permute(0, 5, 6, 1, 2, 4, 3))
