"""The packer of fp8 weights against a slow reader of the layout, one value at a time."""

from __future__ import annotations

import struct

import pytest
import torch

from w4afp8 import Fp8BlockWeight, dequantize_fp8_block, quantize_fp8_block
from w4afp8.packed import PackedWeight
from w4afp8.packed_fp8 import pack_fp8, pack_fp8_gate_up


def make(n: int, k: int, seed: int = 0) -> Fp8BlockWeight:
    return quantize_fp8_block(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))


def slow_unpack(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """All values [N_pad, K_pad] as bytes, and scales [N_pad, K_pad/128]."""
    tiles, groups = packed.blocks.shape[1:3]
    values = torch.empty(tiles * 128, groups * 128, dtype=torch.uint8)
    scales = torch.empty(tiles * 128, groups)
    for tile in range(tiles):
        for group in range(groups):
            block = bytes(packed.blocks[0, tile, group].tolist())
            for row in range(128):
                wg, rest = divmod(row, 64)
                w, hi, l4 = rest // 16, rest // 8 % 2, rest % 8
                for k in range(128):
                    step, k32 = divmod(k, 32)
                    r1, lm, byte = k32 // 16, k32 % 16 // 4, k32 % 4
                    thread = w * 32 + l4 * 4 + lm
                    at = wg * 8192 + step * 2048 + thread * 16 + r1 * 8 + hi * 4 + byte
                    values[tile * 128 + row, group * 128 + k] = block[at]
                (bits,) = struct.unpack_from("<H", block, 16384 + ((wg * 32 + w * 8 + l4) * 2 + hi) * 2)
                ratio = 2.0 ** (bits // 4096 - 6) * (1 + bits % 4096 / 4096) if bits else 0.0
                scales[tile * 128 + row, group] = ratio
    return values, scales * packed.channel_scales[0, :, None]


@pytest.mark.parametrize(("n", "k"), [(128, 256), (72, 384), (136, 128)])
def test_slow_reader_finds_every_value_and_scale_and_zeros_in_the_padding(n: int, k: int) -> None:
    weight = make(n, k)
    packed = pack_fp8(weight)
    assert (packed.experts, packed.n, packed.k, packed.group, packed.codes) == (1, n, k, 128, "fp8")
    values, scales = slow_unpack(packed)
    assert torch.equal(values[:n, :k], weight.values.view(torch.uint8))
    assert not values[n:].any()
    assert not values[:, k:].any()
    rows = weight.scales.repeat_interleave(128, 0)[:n]
    torch.testing.assert_close(scales[:n, : k // 128], rows, rtol=2**-13, atol=0)
    assert not scales[n:].any()


def test_gate_and_up_lie_8_rows_in_turn_with_their_own_scales() -> None:
    gate, up = make(136, 128, 1), make(136, 128, 2)
    values, scales = slow_unpack(pack_fp8_gate_up(gate, up))
    wide = values[:272, :128].view(torch.float8_e4m3fn).float() * scales[:272, :1]
    parts = torch.unflatten(wide, 0, (-1, 2, 8))
    torch.testing.assert_close(parts[:, 0].flatten(0, 1), dequantize_fp8_block(gate), rtol=2**-12, atol=0)
    torch.testing.assert_close(parts[:, 1].flatten(0, 1), dequantize_fp8_block(up), rtol=2**-12, atol=0)


def test_sizes_and_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="K in multiples of 128"):
        pack_fp8(make(128, 192))
    with pytest.raises(ValueError, match="gate, up: expected one shape"):
        pack_fp8_gate_up(make(128, 128), make(64, 128))
    weight = make(128, 128)
    weight.scales[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scales: expected finite"):
        pack_fp8(weight)
