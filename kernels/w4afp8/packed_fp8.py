"""Fp8 weights, those of shared experts, as the sm_90a kernel reads them: like `packed`, but a code is a byte.

A block has 16384 bytes of e4m3 values and 256 bytes of scales. With the names of `packed`, the four inputs of row hi
of thread w * 32 + l4 * 4 + lm, step and r1 lie at byte wg * 8192 + step * 2048 + thread * 16 + r1 * 8 + hi * 4. Scales
are the block scales of every row, stored as there; `channel_scales` is c[n].
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from w4afp8.packed import TILE_INPUTS, TILE_ROWS, PackedWeight, scale_bytes, scale_ratios, write_ratios
from w4afp8.tensors import FP8_BLOCK, Fp8BlockWeight

CODE_BYTES = TILE_ROWS * TILE_INPUTS


def blocks_shape(experts: int, n: int, k: int) -> tuple[int, int, int, int]:
    """Shape of `PackedWeight.blocks` of E fp8 experts [N, K]."""
    return experts, -(-n // TILE_ROWS), -(-k // (2 * TILE_INPUTS)) * 2, CODE_BYTES + scale_bytes(TILE_INPUTS)


def pack_fp8(weight: Fp8BlockWeight) -> PackedWeight:
    """Pack one fp8 weight as one expert, where it lies.

    weight: values [N, K], scales [ceil(N/128), ceil(K/128)]; K a multiple of 128, N of 8.
    Returns: the packed weight, E = 1; values are exact, scales rounded as in `packed`.
    Raises: ValueError for sizes that do not fit, and NaN or Inf among the scales.
    """
    return _pack(weight.values, _row_scales(weight))


def pack_fp8_gate_up(gate: Fp8BlockWeight, up: Fp8BlockWeight) -> PackedWeight:
    """Pack gate and up as one expert for the SwiGLU epilogue: 8 gate rows, 8 up rows, in turn.

    gate, up: [I, K], I a multiple of 8.
    Returns, Raises: as `pack_fp8`; the weight is [2 * I, K].
    """
    if gate.values.shape != up.values.shape or gate.values.shape[0] % 8:
        raise ValueError(
            f"gate, up: expected one shape with rows in multiples of 8, got {list(gate.values.shape)} "
            f"and {list(up.values.shape)}"
        )
    values = _in_turn(gate.values.view(torch.uint8), up.values.view(torch.uint8))
    return _pack(values.view(torch.float8_e4m3fn), _in_turn(_row_scales(gate), _row_scales(up)))


def _in_turn(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Take 8 rows of each [N, ...], in turn."""
    return torch.stack([torch.unflatten(part, 0, (-1, 8)) for part in (first, second)], dim=1).flatten(0, 2)


def _row_scales(weight: Fp8BlockWeight) -> torch.Tensor:
    """Repeat block scales for every row: [N, ceil(K/128)]."""
    rows, inputs = weight.values.shape
    expected = [-(-rows // FP8_BLOCK), -(-inputs // FP8_BLOCK)]
    if list(weight.scales.shape) != expected:
        raise ValueError(f"scales: expected {expected} for values [{rows}, {inputs}], got {list(weight.scales.shape)}")
    if not bool((weight.scales.isfinite() & (weight.scales >= 0)).all()):
        raise ValueError("scales: expected finite scales, not negative")
    return weight.scales.repeat_interleave(FP8_BLOCK, 0)[:rows]


def _pack(values: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """Pack values [N, K] e4m3 with scales [N, K/128]."""
    n, k = values.shape
    if k % TILE_INPUTS or n % 8 or n == 0 or k == 0:
        raise ValueError(f"weight: expected N in multiples of 8 and K in multiples of {TILE_INPUTS}, got [{n}, {k}]")
    shape = blocks_shape(1, n, k)
    tiles, groups = shape[1:3]
    blocks = torch.empty(shape, dtype=torch.uint8, device=values.device)
    ratios, unit = scale_ratios(scales, tiles * TILE_ROWS, groups)
    kept = (ratios[:n, : scales.shape[1]] != 0).unsqueeze(2)  # a scale that cannot be written leaves zeros, as there
    codes = torch.unflatten(values.view(torch.uint8), 1, (-1, TILE_INPUTS)) * kept
    padded = pad(codes.flatten(1), (0, groups * TILE_INPUTS - k, 0, tiles * TILE_ROWS - n))
    # tile, wg, w, hi, l4, block, step, r1, lm
    words = padded.view(torch.int32).view(tiles, 2, 4, 2, 8, groups, 4, 2, 4)
    target = torch.unflatten(blocks[0].view(torch.int32)[..., : CODE_BYTES // 4], 2, (2, 4, 4, 8, 4, 2, 2))
    target.copy_(words.permute(0, 5, 1, 6, 2, 4, 8, 7, 3))  # tile, block, wg, step, w, l4, lm, r1, hi
    write_ratios(ratios, blocks[0, ..., CODE_BYTES:])
    return PackedWeight(blocks, unit[None].to(torch.float32), n, k, TILE_INPUTS, full_range=False, codes="fp8")
