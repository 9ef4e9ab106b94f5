"""The packer against a slow reader of the layout, one code at a time."""

from __future__ import annotations

import struct

import pytest
import torch

from w4afp8 import Int4Weight, dequantize_int4, pack_int4, quantize_int4, unpack_int4
from w4afp8.packed import PackedWeight, interleave, pack, unpack


def make(n: int, k: int, lowest: int = -7, seed: int = 0, group: int = 128) -> Int4Weight:
    """Random codes from `lowest` to 7, random scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(lowest, 8, (n, k), generator=generator, dtype=torch.int8)
    codes[0, 0] = lowest
    return Int4Weight(pack_int4(codes), torch.rand(n, k // group, generator=generator) * 0.01 + 1e-3)


def read_word(block: bytes, row: int, k: int) -> tuple[int, int, int]:
    """The word that holds the code of (row, k) of a tile and group, its `hi` and its byte."""
    wg, rest = divmod(row, 64)
    w, hi, l4 = rest // 16, rest // 8 % 2, rest % 8
    step, k32 = divmod(k, 32)
    r1, lm, byte = k32 // 16, k32 % 16 // 4, k32 % 4
    word, thread = 2 * step + r1, w * 32 + l4 * 4 + lm
    at = wg * 4096 + word // 4 * 2048 + thread * 16 + word % 4 * 4
    return struct.unpack_from("<I", block, at)[0], hi, byte


def read_code(block: bytes, row: int, k: int, full_range: bool) -> int:
    word, hi, byte = read_word(block, row, k)
    magnitude = word >> (8 * byte + 4 * hi) & 7
    negative = word >> (8 * ((byte + 1) % 4) + 3 if hi else 8 * byte + 7) & 1
    return -(magnitude + full_range) if negative else magnitude


def read_scale(block: bytes, row: int, index: int) -> float:
    wg, rest = divmod(row, 64)
    w, hi, l4 = rest // 16, rest // 8 % 2, rest % 8
    (bits,) = struct.unpack_from("<H", block, 8192 + index * 256 + ((wg * 32 + w * 8 + l4) * 2 + hi) * 2)
    return 2.0 ** (bits // 4096 - 6) * (1 + bits % 4096 / 4096) if bits else 0.0


def slow_unpack(packed: PackedWeight, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes [N_pad, K_pad] and scales [N_pad, K_pad/group] of an expert."""
    tiles, groups = packed.blocks.shape[1:3]
    codes = torch.empty(tiles * 128, groups * 128, dtype=torch.int8)
    parts = 128 // packed.group
    scales = torch.empty(tiles * 128, groups, parts)
    for tile in range(tiles):
        for group in range(groups):
            block = bytes(packed.blocks[expert, tile, group].tolist())
            read = [read_code(block, row, k, packed.full_range) for row in range(128) for k in range(128)]
            at = slice(tile * 128, tile * 128 + 128)
            codes[at, group * 128 : group * 128 + 128] = torch.tensor(read, dtype=torch.int8).view(128, 128)
            for part in range(parts):
                scales[at, group, part] = torch.tensor([read_scale(block, row, part) for row in range(128)])
    return codes, scales.flatten(1) * packed.channel_scales[expert, :, None] / 512


@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("lowest", [-7, -8])
@pytest.mark.parametrize(("n", "k"), [(128, 256), (72, 384), (136, 128)])
def test_slow_reader_finds_every_code_and_scale_and_zeros_in_the_padding(
    n: int, k: int, lowest: int, group: int
) -> None:
    weights = [make(n, k, lowest, seed, group) for seed in (1, 2)]
    packed = pack(weights)
    assert packed.blocks.shape == (2, -(-n // 128), -(-k // 256) * 2, 8192 + 256 * (128 // group))
    assert (packed.n, packed.k, packed.group, packed.full_range) == (n, k, group, lowest == -8 or group == 32)
    for expert, weight in enumerate(weights):
        codes, scales = slow_unpack(packed, expert)
        assert torch.equal(codes[:n, :k], unpack_int4(weight.codes))
        assert not codes[n:].any()
        assert not codes[:, k:].any()
        torch.testing.assert_close(scales[:n, : k // group], weight.scales, rtol=2**-13, atol=0)
        assert not scales[n:].any()
        assert not scales[:, k // group :].any()
        back = unpack(packed, expert)
        assert torch.equal(back.codes, weight.codes)
        torch.testing.assert_close(back.scales, weight.scales, rtol=2**-13, atol=0)


@pytest.mark.parametrize("lowest", [-7, -8])
def test_kernels_conversion_makes_e4m3_bytes_of_value_code_over_512(lowest: int) -> None:
    weight = make(128, 256, lowest)
    packed, codes = pack([weight]), unpack_int4(weight.codes)
    block = bytes(packed.blocks[0, 0, 0].tolist())
    for row, k in [(row, k) for row in range(0, 128, 3) for k in range(0, 128, 4)]:
        word, hi, _ = read_word(block, row, k)
        rotated = word if hi == 0 else (word >> 4 | word << 28) & 0xFFFFFFFF
        value = rotated & 0x87878787
        if packed.full_range:
            value += (value & 0x80808080) >> 7
        e4m3 = torch.tensor(list(value.to_bytes(4, "little")), dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert (e4m3.float() * 512).tolist() == codes[row, k : k + 4].tolist()


@pytest.mark.parametrize(("n", "k"), [(256, 512), (64, 256), (576, 640), (1160, 384)])
@pytest.mark.parametrize("lowest", [-7, -8])
def test_unpack_gives_the_codes_exactly_and_the_scales_to_fp16_rounding(n: int, k: int, lowest: int) -> None:
    weights = [make(n, k, lowest, seed) for seed in range(3)]
    packed = pack(weights)
    for expert, weight in enumerate(weights):
        back = unpack(packed, expert)
        assert torch.equal(back.codes, weight.codes)
        torch.testing.assert_close(back.scales, weight.scales, rtol=2**-13, atol=0)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (700, 254), (700, 255)])
def test_one_code_of_minus_eight_in_the_last_expert_makes_all_full_range(place: tuple[int, int]) -> None:
    codes = torch.randint(-7, 8, (704, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    first = Int4Weight(pack_int4(codes), torch.ones(704, 2))
    codes[place] = -8
    second = Int4Weight(pack_int4(codes), torch.ones(704, 2))
    assert not pack([first]).full_range
    packed = pack([first, second])
    assert packed.full_range
    assert torch.equal(unpack(packed, 0).codes, first.codes)
    assert torch.equal(unpack(packed, 1).codes, second.codes)


def test_channel_scales_are_powers_of_two_that_leave_ratios_up_to_1024() -> None:
    packed = pack([make(128, 256)])
    _, ratios = slow_unpack(packed, 0)
    ratios = ratios / packed.channel_scales[0, :, None] * 512
    assert ((ratios.amax(1) >= 512) & (ratios.amax(1) <= 1024)).all()
    assert (torch.frexp(packed.channel_scales).mantissa == 0.5).all()


def test_group_scales_30000_fold_apart_keep_their_relative_precision() -> None:
    scales = torch.logspace(-4.4, 0, 16).repeat(128, 1) * torch.linspace(0.5, 2, 128)[:, None]
    packed = pack([Int4Weight(torch.ones(128, 1024, dtype=torch.int8), scales)])
    torch.testing.assert_close(unpack(packed, 0).scales, scales, rtol=2**-13, atol=0)


def test_weights_of_group_scales_too_small_to_write_keep_the_precision_of_the_rows_largest() -> None:
    scales = torch.logspace(-12, 0, 16).repeat(128, 1)
    weight = Int4Weight(torch.full((128, 1024), 0x77, dtype=torch.int8), scales)
    error = (dequantize_int4(unpack(pack([weight]), 0)) - dequantize_int4(weight)).abs()
    allowed = torch.maximum(scales * 2**-13, scales.amax(1, keepdim=True) * 2**-16)
    assert (error <= 7 * allowed.repeat_interleave(128, 1)).all()


def test_rows_of_zero_tiny_and_huge_scales_stay_finite() -> None:
    scales = torch.zeros(128, 2)
    scales[1], scales[2] = torch.tensor([1e-45, 0.0]), torch.tensor([3e38, 1e38])
    scales[3], scales[4] = torch.tensor([1.2e-38, 1e-38]), torch.tensor([1.0, 0.25])
    packed = pack([Int4Weight(torch.ones(128, 128, dtype=torch.int8), scales)])
    assert packed.channel_scales.isfinite().all()
    assert packed.channel_scales[0, 0] == 0
    torch.testing.assert_close(unpack(packed, 0).scales, scales, rtol=2**-13, atol=0)


def test_codes_under_a_zero_scale_become_zeros_and_others_stay() -> None:
    scales = torch.tensor([[0.0, 0.5]]).repeat(128, 1)
    back = unpack(pack([Int4Weight(torch.full((128, 128), 0x35, dtype=torch.int8), scales)]), 0)
    assert not back.codes[:, :64].any()
    assert (back.codes[:, 64:] == 0x35).all()
    assert torch.equal(back.scales, scales)


def test_stacked_weights_pack_as_the_sequence_does() -> None:
    weights = [make(128, 256, seed=seed) for seed in range(3)]
    stacked = Int4Weight(torch.stack([w.codes for w in weights]), torch.stack([w.scales for w in weights]))
    one, other = pack(stacked), pack(weights)
    assert torch.equal(one.blocks, other.blocks)
    assert torch.equal(one.channel_scales, other.channel_scales)


def test_codes_at_an_odd_address_are_packed() -> None:
    weight = make(128, 256)
    shifted = torch.empty(weight.codes.numel() + 1, dtype=torch.int8)[1:].view_as(weight.codes).copy_(weight.codes)
    assert torch.equal(pack([Int4Weight(shifted, weight.scales)]).blocks, pack([weight]).blocks)


def test_interleave_takes_eight_gate_and_eight_up_rows_in_turn() -> None:
    gate, up = make(24, 256, seed=1), make(24, 256, seed=2)
    both = interleave(gate, up)
    for c in range(3):
        for i in range(8):
            for source, row in ((gate, 16 * c + i), (up, 16 * c + 8 + i)):
                assert torch.equal(both.codes[row], source.codes[8 * c + i])
                assert torch.equal(both.scales[row], source.scales[8 * c + i])


def test_interleave_of_stacked_weights_works_expert_by_expert() -> None:
    gates, ups = [make(16, 256, seed=s) for s in (1, 2)], [make(16, 256, seed=s) for s in (3, 4)]
    stacked = [Int4Weight(*(torch.stack(part) for part in zip(*side, strict=True))) for side in (gates, ups)]
    both = interleave(*stacked)
    for e in range(2):
        alone = interleave(gates[e], ups[e])
        assert torch.equal(both.codes[e], alone.codes)
        assert torch.equal(both.scales[e], alone.scales)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least one expert"),
        ([quantize_int4(torch.ones(8, 256), 64)], "groups of 128 or 32 inputs, got groups of 64"),
        ([make(8, 256), make(8, 256, group=32)], "groups of 128 inputs for all experts, got 32 at 1"),
        ([Int4Weight(make(8, 128).codes, torch.full((8, 1), -1.0))], "not negative"),
        ([make(128, 256), make(64, 256)], r"\[128, 256\] for all experts, got \[64, 256\] at 1"),
        ([Int4Weight(make(8, 128).codes, torch.full((8, 1), torch.inf))], "finite scales"),
        (make(8, 256), r"codes \[E, N, K/2\]"),
    ],
)
def test_pack_refuses_what_it_cannot_store(weights: list[Int4Weight] | Int4Weight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(weights)


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (make(16, 256), make(24, 256), "expected one shape"),
        (make(12, 256), make(12, 256), "multiples of 8"),
    ],
)
def test_interleave_refuses_what_does_not_fit(gate: Int4Weight, up: Int4Weight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interleave(gate, up)
