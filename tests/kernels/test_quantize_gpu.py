"""The quantization kernel gives the bits of `quantize_tokens` on a CPU, where every division is IEEE's.

On a CUDA tensor torch divides by a Python number as a product with its inverse, so the CPU is the reference. SiLU has
no bits of its own in the specification: what the kernel makes of gate and up is held against float64, and against
itself over layouts, types and the GEMM's epilogue.
"""

from __future__ import annotations

import pytest
import torch

from w4afp8 import Granularity, Quantized, quantize_tokens
from w4afp8.activations import quantize_intermediate
from w4afp8.gemm import grouped_gemm
from w4afp8.quantize import GateUpLayout, quantize_tokens_cuda, silu_mul_quantize
from w4afp8.reference import silu_mul

from .gemm_cases import make_rows, make_weights

pytestmark = pytest.mark.gpu

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
GRANULARITIES: list[Granularity] = ["token", "token_group"]
LAYOUTS: list[GateUpLayout] = ["halves", "interleaved"]
# The kernel's SiLU is within 2^-21 where it is not small; a product, a scale and a quotient round after it.
SILU_ERROR = 2e-6


def special_rows(rows: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Random tokens of very different size; some zero, some subnormal, some huge, some with NaN or Inf."""
    generator = torch.Generator().manual_seed(rows * 7 + channels)
    x = torch.randn(rows, channels, generator=generator)
    x *= torch.exp2(torch.randint(-20, 8, (rows, 1), generator=generator).float())
    kind = torch.arange(rows) % 13
    x[kind == 3] = 0
    x[kind == 5] *= 1e-30  # quotients of subnormals, scale below the smallest normal float
    x[kind == 5, ::3] = 1e-43
    x[kind == 7, channels // 2] = torch.nan
    x[kind == 8, channels - 1] = torch.inf
    x[kind == 9, 0] = -torch.inf
    x[kind == 10] = x[kind == 10].sign() * torch.finfo(dtype).max
    x[kind == 11, : channels // 2] = 0  # whole groups of zeros, and of minus zeros
    x[kind == 11, : channels // 4] = -0.0
    return x.to(dtype)


def assert_same_bits(found: Quantized, expected: Quantized) -> None:
    assert torch.equal(found.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales.cpu().view(torch.int32), expected.scales.view(torch.int32))


def check(x: torch.Tensor, granularity: Granularity) -> None:
    expected, expected_flags = quantize_tokens(x, granularity)
    found, flags = quantize_tokens_cuda(x.cuda(), granularity)
    assert_same_bits(found, expected)
    assert torch.equal(flags.cpu(), expected_flags)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [128, 256, 384, 2048, 7168, 16384])
@pytest.mark.parametrize("rows", [0, 1, 2, 13, 131, 600])
def test_bits_are_those_of_the_specification(
    rows: int, channels: int, dtype: torch.dtype, granularity: Granularity
) -> None:
    check(special_rows(rows, channels, dtype), granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("rows", "channels"), [(4097, 128), (4097, 7168), (4096, 2048), (20000, 256)])
def test_many_rows(rows: int, channels: int, granularity: Granularity) -> None:
    check(special_rows(rows, channels, torch.bfloat16), granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [16512, 40960])
def test_rows_longer_than_the_registers_hold(channels: int, dtype: torch.dtype, granularity: Granularity) -> None:
    check(special_rows(14, channels, dtype), granularity)


@pytest.mark.parametrize("channels", [8, 24, 136, 1000])
def test_channels_that_are_no_multiple_of_a_group(channels: int) -> None:
    check(special_rows(14, channels, torch.bfloat16), "token")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_bfloat16_is_converted_as_specified(granularity: Granularity) -> None:
    every = torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16)
    check(every.view(512, 128), granularity)
    ordinary = every[every.abs() <= 448]
    ordinary = torch.cat([ordinary, torch.zeros(-len(ordinary) % 127, dtype=torch.bfloat16)]).view(-1, 127)
    check(torch.cat([ordinary, torch.full((len(ordinary), 1), 448.0, dtype=torch.bfloat16)], dim=1), granularity)


def test_ties_round_to_even_after_one_division() -> None:
    scales = torch.linspace(0.3, 3.7, 1000)[:, None]
    ties = torch.tensor([17.0, 19.0, 27.0, 1.0625, 2.125, 2**-10, 3 * 2**-10, 431.0, 416.0]).repeat(14)[:126]
    x = torch.cat([ties * scales, -ties * scales, torch.full((1000, 4), 448.0) * scales], dim=1)
    check(x.contiguous(), "token")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("live", [0, 1, 77, 300])
def test_rows_beyond_num_rows_are_not_touched(live: int, granularity: Granularity) -> None:
    x = special_rows(300, 2048, torch.bfloat16)
    expected, expected_flags = quantize_tokens(x, granularity)
    poisoned = x.cuda()
    poisoned[live:] = torch.nan
    columns = expected.scales.shape[1]
    values = torch.full((300, 2048), 0xA5, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    out = Quantized(values, torch.full((300, columns), 123.0, device="cuda"))
    flags = torch.zeros(300, dtype=torch.bool, device="cuda")
    quantize_tokens_cuda(poisoned, granularity, torch.tensor(live, device="cuda"), (out, flags))
    head = Quantized(out.values[:live], out.scales[:live])
    assert_same_bits(head, Quantized(expected.values[:live], expected.scales[:live]))
    assert torch.equal(flags[:live].cpu(), expected_flags[:live])
    assert (out.values[live:].view(torch.uint8) == 0xA5).all()
    assert (out.scales[live:] == 123).all()
    assert not flags[live:].any()


def test_num_rows_may_be_the_last_of_the_offsets() -> None:
    x = special_rows(40, 256, torch.bfloat16)
    offsets = torch.tensor([0, 3, 20, 31], device="cuda")
    found, flags = quantize_tokens_cuda(x.cuda(), "token", offsets[-1:])
    expected, expected_flags = quantize_tokens(x[:31], "token")
    assert_same_bits(Quantized(found.values[:31], found.scales[:31]), expected)
    assert torch.equal(flags[:31].cpu(), expected_flags)
    assert not flags[31:].any()


def test_replay_of_a_graph_reads_tokens_and_num_rows_again() -> None:
    first, second = special_rows(64, 1024, torch.bfloat16), special_rows(65, 1024, torch.bfloat16)[1:]
    x, num_rows = first.cuda(), torch.tensor(64, device="cuda")
    out = quantize_tokens_cuda(x, "token")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize_tokens_cuda(x, "token", num_rows, out)
    x.copy_(second)
    num_rows.fill_(50)
    graph.replay()
    expected, old = quantize_tokens(second, "token")[0], quantize_tokens(first, "token")[0]
    joined = [
        torch.cat([new.view(torch.uint8)[:50], was.view(torch.uint8)[50:]])
        for new, was in zip(expected, old, strict=True)
    ]
    assert_same_bits(out[0], Quantized(joined[0].view(torch.float8_e4m3fn), joined[1].view(torch.float32)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_that_overflowed_get_nan_scales_where_asked(dtype: torch.dtype, granularity: Granularity) -> None:
    x = special_rows(131, 2048, dtype)
    expected, expected_flags = quantize_intermediate(x, granularity), quantize_tokens(x, granularity)[1]
    found, flags = quantize_tokens_cuda(x.cuda(), granularity, overflow="nan")
    assert expected.scales.isnan().any()
    assert_same_bits(found, expected)
    assert torch.equal(flags.cpu(), expected_flags)


def gate_and_up(rows: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates from where SiLU is 0 to where it is the identity, ups of very different size."""
    generator = torch.Generator().manual_seed(rows + channels)
    gate, up = (torch.randn(rows, channels, generator=generator) for _ in range(2))
    return gate * torch.exp2(torch.randint(-3, 8, (rows, 1), generator=generator).float()), up * torch.exp(3 * gate)


def lay_out(gate: torch.Tensor, up: torch.Tensor, layout: GateUpLayout) -> torch.Tensor:
    if layout == "halves":
        return torch.cat([gate, up], dim=1)
    return torch.stack([torch.unflatten(part, 1, (-1, 8)) for part in (gate, up)], dim=2).flatten(1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [128, 256, 768, 2048, 3072, 20480])
@pytest.mark.parametrize("rows", [1, 13, 300])
def test_gate_and_up_become_quantized_swiglu(
    rows: int, channels: int, layout: GateUpLayout, granularity: Granularity
) -> None:
    gate, up = gate_and_up(rows, channels)
    expected, _ = quantize_tokens(silu_mul(gate.double(), up.double()).float(), granularity)
    found, flags = silu_mul_quantize(lay_out(gate, up, layout).cuda(), granularity, layout)
    assert not flags.any()
    torch.testing.assert_close(found.scales.cpu(), expected.scales, rtol=SILU_ERROR, atol=0)
    # Where a value lies on the border of two e4m3 numbers, the error decides; neighbours differ by 1 as integers.
    steps = (found.values.cpu().view(torch.int8).int() - expected.values.view(torch.int8).int()).abs()
    zeros = (found.values.cpu().float() == 0) & (expected.values.float() == 0)
    steps[zeros] = 0  # +0 and -0
    assert int(steps.max()) <= 1
    assert int((steps > 0).sum()) <= max(2, 3e-4 * steps.numel())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layout_and_type_do_not_change_bits(granularity: Granularity) -> None:
    gate, up = (part.bfloat16() for part in gate_and_up(131, 2048))
    found = [
        silu_mul_quantize(lay_out(gate.to(dtype), up.to(dtype), layout).cuda(), granularity, layout)[0]
        for dtype in (torch.bfloat16, torch.float32)
        for layout in LAYOUTS
    ]
    for other in found[1:]:
        assert_same_bits(other, Quantized(*(part.cpu() for part in found[0])))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bits_are_those_of_the_epilogue_and_a_second_kernel(granularity: Granularity) -> None:
    weights, rows = make_weights(3, 1024, 256), make_rows([5, 0, 40], 256, granularity)
    activated = grouped_gemm(rows.x, weights.packed, **rows.arguments, epilogue="swiglu")
    gate_up = grouped_gemm(rows.x, weights.packed, **rows.arguments, out_dtype=torch.float32)
    expected, _ = quantize_tokens_cuda(activated[rows.live].contiguous(), granularity, overflow="nan")
    found, _ = silu_mul_quantize(gate_up[rows.live].contiguous(), granularity, "interleaved")
    assert_same_bits(found, Quantized(*(part.cpu() for part in expected)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_that_overflow_in_swiglu_reach_no_other_row(granularity: Granularity) -> None:
    gate, up = (torch.ones(6, 256) for _ in range(2))
    gate[0, 3], up[1, 200], gate[2, 0], up[3, 255] = torch.nan, torch.inf, -torch.inf, torch.nan
    gate[4, 7] = up[4, 7] = 1e30  # the product exceeds float32
    x = lay_out(gate, up, "halves").cuda()
    found, flags = silu_mul_quantize(x, granularity, "halves")
    zeroed, zeroed_flags = silu_mul_quantize(x, granularity, "halves", overflow="zero")
    assert flags.tolist() == zeroed_flags.tolist() == [True] * 5 + [False]
    assert found.scales[:5].isnan().all()
    assert (zeroed.scales[:5] == 0).all()
    assert (found.values[:5].view(torch.uint8) == 0).all()
    good, _ = silu_mul_quantize(x[5:], granularity, "halves")
    for each in (found, zeroed):
        assert_same_bits(Quantized(each.values[5:], each.scales[5:]), Quantized(*(part.cpu() for part in good)))


@pytest.mark.parametrize("live", [0, 1, 300])
def test_swiglu_of_few_rows_among_room_for_many_leaves_the_rest(live: int) -> None:
    room = 65536
    gate, up = gate_and_up(300, 256)
    x = torch.full((room, 512), torch.nan, device="cuda")
    x[:300] = lay_out(gate, up, "interleaved").cuda()
    expected, _ = silu_mul_quantize(x[:300], "token", "interleaved")
    values = torch.full((room, 256), 0xA5, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    out = Quantized(values, torch.full((room, 1), 123.0, device="cuda"))
    flags = torch.zeros(room, dtype=torch.bool, device="cuda")
    silu_mul_quantize(x, "token", "interleaved", torch.tensor(live, device="cuda"), (out, flags))
    head = Quantized(out.values[:live], out.scales[:live])
    assert_same_bits(head, Quantized(expected.values[:live].cpu(), expected.scales[:live].cpu()))
    assert (out.values[live:].view(torch.uint8) == 0xA5).all()
    assert (out.scales[live:] == 123).all()
    assert not flags.any()


def test_the_kernel_before_is_waited_for() -> None:
    # The launch lets this kernel start early; what it reads is written by a copy that takes far longer than a start.
    sources = [torch.randn(4096, 4096, device="cuda") for _ in range(2)]
    expected = [silu_mul_quantize(source, "token", "halves")[0] for source in sources]
    x, rows = torch.zeros_like(sources[0]), torch.zeros((), dtype=torch.int64, device="cuda")
    out = silu_mul_quantize(x, "token", "halves")
    for turn in range(100):
        out[0].values.view(torch.uint8).zero_()
        x.copy_(sources[turn % 2])
        rows.fill_(4096)
        found, _ = silu_mul_quantize(x, "token", "halves", rows, out)
        x.zero_()  # the kernel after it must not start before it has read
        rows.zero_()
        assert torch.equal(found.values.view(torch.uint8), expected[turn % 2].values.view(torch.uint8))


def test_strided_and_misaligned_tokens_are_refused() -> None:
    x = torch.ones(4, 512, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        quantize_tokens_cuda(x[:, :256], "token")
    with pytest.raises(ValueError, match="x: expected an address in multiples of 16"):
        quantize_tokens_cuda(x.view(-1)[1 : 1 + 512].view(2, 256), "token")
