"""Packing for the kernel: experts as compressed-tensors stores them become those that were meant."""

from __future__ import annotations

import pytest
import torch

from moe_forward.errors import CheckpointError, StartError
from moe_forward.experts import LayerExperts
from moe_forward.experts.packing import PackedLayer, pack_layers
from w4afp8 import ExpertWeights, Int4Weight, pack_int4, unpack_int4
from w4afp8.packed import unpack

CPU = torch.device("cpu")
LAYER = 4
HIDDEN, INTERMEDIATE = 256, 128
SIGNS = 0x88 - 256  # the upper bit of both nibbles of a byte


def make_codes(seed: int, n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)


def make_scales(seed: int, n: int, groups: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + torch.rand(n, groups, generator=generator)).to(torch.bfloat16)


def make_expert(seed: int, group: int, words: bool) -> ExpertWeights:
    """One expert, as the file has it where `words`, else as it is meant."""

    def weight(number: int, n: int, k: int) -> Int4Weight:
        codes, scales = pack_int4(make_codes(number, n, k)), make_scales(number, n, k // group)
        return Int4Weight((codes ^ SIGNS).view(torch.int32), scales) if words else Int4Weight(codes, scales.float())

    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    return ExpertWeights(*(weight(10 * seed + number, n, k) for number, (n, k) in enumerate(shapes)))


def pack_one(group: int, words: bool) -> PackedLayer:
    return pack_layers({LAYER: LayerExperts([make_expert(seed, group, words) for seed in range(3)], None)}, CPU)[LAYER]


@pytest.mark.parametrize("group", [32, 128])
def test_words_of_compressed_tensors_pack_as_the_codes_they_mean(group: int) -> None:
    words, codes = pack_one(group, words=True).routed, pack_one(group, words=False).routed
    assert words is not None
    assert codes is not None
    for one, other in zip(words, codes, strict=True):
        assert (one.n, one.k, one.group, one.full_range) == (other.n, other.k, group, True)
        assert torch.equal(one.blocks, other.blocks)
        assert torch.equal(one.channel_scales, other.channel_scales)


@pytest.mark.parametrize("group", [32, 128])
def test_packed_words_unpack_to_their_codes(group: int) -> None:
    routed = pack_one(group, words=True).routed
    assert routed is not None
    for seed in range(3):
        down = unpack(routed.down, seed)
        assert torch.equal(unpack_int4(down.codes), make_codes(10 * seed + 2, HIDDEN, INTERMEDIATE))
        expected = make_scales(10 * seed + 2, HIDDEN, INTERMEDIATE // group).float()
        assert torch.equal(down.scales, expected)  # 8 bits of bf16 fit the 11 of a ratio


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_scales_of_words_that_are_no_scales_are_refused_by_name(value: float) -> None:
    expert = make_expert(0, 32, words=True)
    expert.up.scales[3, 1] = value
    with pytest.raises(CheckpointError, match=f"layer {LAYER}, expert 0 of this rank, up: scales must be finite"):
        pack_layers({LAYER: LayerExperts([expert], None)}, CPU)


def test_words_of_another_group_are_refused_before_anything_is_brought() -> None:
    layer = LayerExperts([make_expert(0, 64, words=True)], None)
    with pytest.raises(StartError, match=r"layer 4 has \[.*\] with scales for 64; set experts: reference"):
        pack_layers({LAYER: layer}, CPU, lambda done, total: pytest.fail("something was brought"))


@pytest.mark.gpu
def test_words_pack_on_a_gpu_as_on_a_cpu() -> None:
    layers = {LAYER: LayerExperts([make_expert(seed, 32, words=True) for seed in range(3)], None)}
    on_gpu = pack_layers(layers, torch.device("cuda", 0))[LAYER].routed
    on_cpu = pack_layers(layers, CPU)[LAYER].routed
    assert on_gpu is not None
    assert on_cpu is not None
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(one.blocks.cpu(), other.blocks)
        assert torch.equal(one.channel_scales.cpu(), other.channel_scales)
