"""Int4 weights as the sm_90a kernel reads them: one contiguous block for each expert, 128 outputs and 128 inputs.

A block has 8192 bytes of codes and 256 bytes of scales, so that one bulk copy fetches both and the K loop of a tile
reads consecutive memory. Inside, everything lies where the tensor core wants it:

Row r = 0..127 of a tile is wg = r / 64 (warpgroup), w = r % 64 / 16 (warp), hi = r / 8 % 2, l4 = r % 8. Input
k = 0..127 of a group is step = k / 32 (one wgmma), r1 = k % 32 / 16 (register pair), lm = k % 16 / 4, byte = k % 4.
Four inputs of the two rows hi = 0 and hi = 1 share a little-endian 32-bit word. Word 2 * step + r1 of thread
w * 32 + l4 * 4 + lm lies at byte wg * 4096 + word / 4 * 2048 + thread * 16 + word % 4 * 4.

In a word a code is a sign and a magnitude of 3 bits. Row hi = 0: magnitude in bits 8 * byte to + 2, sign in bit
8 * byte + 7. Row hi = 1: magnitude in bits 8 * byte + 4 to + 6, sign in bit 8 * ((byte + 1) % 4) + 3. So two ANDs and
one rotation make eight e4m3 bytes of value magnitude * 2^-9: e4m3 is linear from 0 to 15 * 2^-9. Where a code of a
weight is -8, `full_range` is set, and negative codes are stored as |q| - 1.

Scales are fp16 ratios to a power of two c[n] of each row with the largest ratio in [512, 1024), ordered wg, w, l4,
hi. `channel_scales` is c[n] * 512, which undoes the 2^-9. A ratio is rounded by at most 2^-11 of itself where it is at
least 2^-24 of the row's largest, below that by at most 2^-34 of the row's largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from w4afp8.checks import weight_group, weight_shape
from w4afp8.nibbles import from_sign_magnitude, join_rows, split_rows, to_sign_magnitude
from w4afp8.tensors import Int4Weight

TILE_ROWS = 128
"""Outputs of one block."""

GROUP = 128
"""Inputs of one block, which share a scale."""

CODE_BYTES = TILE_ROWS * GROUP // 2
BLOCK_BYTES = CODE_BYTES + 2 * TILE_ROWS

# Rows packed at a time on a CPU: the temporaries of 512 x 7168 codes stay near its caches. A GPU takes all at once.
_CPU_ROWS = 512
_MAGNITUDE_UNIT = 2.0**-9


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The int4 weights of E experts in blocks; see above.

    blocks: [E, N_pad/128, K_pad/128, 8448] uint8, contiguous; N_pad and K_pad are N and K rounded up to multiples
        of 128 and 256, filled with codes 0 and scales 0.
    channel_scales: [E, N_pad] float32, powers of two, or 0 for rows whose scales are all 0.
    n, k: outputs and inputs of an expert. group: inputs that share a scale. full_range: some code is -8.
    """

    blocks: torch.Tensor
    channel_scales: torch.Tensor
    n: int
    k: int
    group: int
    full_range: bool

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.blocks.shape[0]


def pack(weights: Sequence[Int4Weight] | Int4Weight, device: torch.device | str | None = None) -> PackedWeight:
    """Pack the weights of E experts for the kernel, one expert at a time.

    weights: E weights of one shape, codes [N, K/2] and scales [N, K/128]; or one weight of codes [E, N, K/2] and
        scales [E, N, K/128]. Read twice where a code is -8.
    device: where to pack and keep them; by default where they are.
    Returns: the packed weights; codes are exact, scales rounded as said above.
    Raises: ValueError for no experts, differing shapes, a group other than 128, and NaN or Inf among the scales.
    """
    experts = _unstack(weights)
    if not experts:
        raise ValueError("weights: expected at least one expert, got none")
    n, k = weight_shape(experts[0])
    tiles, groups = -(-n // TILE_ROWS), -(-k // (2 * GROUP)) * 2
    where = experts[0].codes.device if device is None else torch.device(device)
    blocks = torch.empty(len(experts), tiles, groups, BLOCK_BYTES, dtype=torch.uint8, device=where)
    channel_scales = torch.empty(len(experts), tiles * TILE_ROWS, dtype=torch.float32, device=where)
    full_range = False
    if not all(_pack_expert(experts, e, blocks[e], channel_scales[e], full_range) for e in range(len(experts))):
        full_range = True
        for e in range(len(experts)):
            _pack_expert(experts, e, blocks[e], channel_scales[e], full_range)
    return PackedWeight(blocks, channel_scales, n, k, GROUP, full_range)


def unpack(packed: PackedWeight, expert: int) -> Int4Weight:
    """Undo `pack` for one expert.

    packed: made by `pack`. expert: 0 to E - 1.
    Returns: codes [N, K/2] as they were, scales [N, K/128] rounded as said above.
    Raises: IndexError for an expert that is not there.
    """
    blocks = packed.blocks[expert]
    tiles, groups = blocks.shape[:2]
    words = torch.unflatten(blocks.view(torch.int32)[..., : CODE_BYTES // 4], 2, (2, 2, 32, 4, 4))
    words = words.permute(0, 2, 4, 1, 3, 6, 5).reshape(tiles * 8, 8, groups * GROUP // 4)
    split_rows(words)
    units = torch.unflatten(words.view(torch.int16), 2, (-1, 2)).permute(0, 3, 1, 2)
    codes = units.reshape(tiles * TILE_ROWS, -1)
    from_sign_magnitude(codes.view(torch.int64), packed.full_range)
    ratios = torch.unflatten(blocks.view(torch.float16)[..., CODE_BYTES // 2 :], 2, (2, 4, 8, 2))
    ratios = ratios.permute(0, 2, 3, 5, 4, 1).reshape(tiles * TILE_ROWS, groups)
    scales = ratios.to(torch.float64) * (packed.channel_scales[expert].to(torch.float64) * _MAGNITUDE_UNIT)[:, None]
    columns = packed.k // GROUP
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
            "weights: expected codes [E, N, K/2] and scales [E, N, K/128], "
            f"got {list(weights.codes.shape)} and {list(weights.scales.shape)}"
        )
    return [Int4Weight(*pair) for pair in zip(weights.codes.unbind(0), weights.scales.unbind(0), strict=True)]


def _pack_expert(
    experts: Sequence[Int4Weight], index: int, blocks: torch.Tensor, channel_scales: torch.Tensor, full_range: bool
) -> bool:
    """Fill the blocks [N_pad/128, K_pad/128, 8448] and channel scales [N_pad] of an expert; False: needs full_range."""
    weight = experts[index]
    shape = weight_shape(experts[0])
    group = weight_group(weight)
    if weight_shape(weight) != shape:
        raise ValueError(
            f"weights: expected {list(shape)} for all experts, got {list(weight_shape(weight))} at {index}"
        )
    if group != GROUP:
        raise ValueError(f"weights: expected groups of {GROUP} inputs, got groups of {group} at expert {index}")
    codes, scales = weight.codes.to(blocks.device), weight.scales.to(blocks.device)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"weights: expected finite scales, got NaN or Inf at expert {index}")
    rows = _CPU_ROWS if blocks.device.type == "cpu" else blocks.shape[0] * TILE_ROWS
    for first in range(0, shape[0], rows):
        part = codes[first : first + rows]
        if not full_range and _has_lowest(part):
            return False
        _pack_codes(part, blocks[first // TILE_ROWS : (first + rows) // TILE_ROWS], full_range)
    _pack_scales(scales, blocks, channel_scales)
    return True


def _has_lowest(codes: torch.Tensor) -> bool:
    """Whether a code is -8: the high nibble of a byte up to -113, the low one where 16 * byte is -128."""
    return int(codes.amin()) <= -113 or int((codes << 4).amin()) == -128


def _pack_codes(codes: torch.Tensor, blocks: torch.Tensor, full_range: bool) -> None:
    """Write the codes [R, K/2] int8 of whole tiles, the last of which may lack rows, into their blocks."""
    tiles, groups = blocks.shape[:2]
    shape = (tiles * TILE_ROWS, groups * GROUP // 2)
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


def _pack_scales(scales: torch.Tensor, blocks: torch.Tensor, channel_scales: torch.Tensor) -> None:
    """Write the ratios of scales [N, K/128] into the blocks and fill channel_scales [N_pad]."""
    tiles, groups = blocks.shape[:2]
    padded = torch.zeros(tiles * TILE_ROWS, groups, dtype=torch.float64, device=scales.device)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    peak = padded.abs().amax(dim=1)
    # peak = m * 2^exponent with m in [1/2, 1); float64, because 2^(10 - exponent) can exceed float32.
    unit = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 10)
    ratios = (padded / unit[:, None]).to(torch.float16).view(tiles, 2, 4, 2, 8, groups)
    target = torch.unflatten(blocks.view(torch.float16)[..., CODE_BYTES // 2 :], 2, (2, 4, 8, 2))
    target.copy_(ratios.permute(0, 5, 1, 2, 4, 3))
    channel_scales.copy_(torch.where(peak == 0, 0.0, unit / _MAGNITUDE_UNIT))
