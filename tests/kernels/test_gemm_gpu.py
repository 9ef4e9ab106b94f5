"""grouped_gemm on a GPU against float64.

Bounds are relative Frobenius errors (design section 2): a bf16 result rounds by 1.7e-3, a float32 one leaves the
rounding of scale ratios (2^-13 at most) and the tensor core's own adding.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from w4afp8 import Int4Weight, Quantized, dequantize_fp8_block, quantize_fp8_block, quantize_tokens
from w4afp8.gemm import grouped_gemm
from w4afp8.packed import interleave, pack
from w4afp8.packed_fp8 import pack_fp8, pack_fp8_gate_up

from .gemm_cases import Rows, Weights, exact_parts, make_rows, make_weights, relative_error, row_counts, run

pytestmark = pytest.mark.gpu

BF16_ERROR, F32_ERROR = 2.5e-3, 2e-4
# A single block has one scale, whose rounding does not average out.
FP8_F32_ERROR = 2**-13 + 1e-4
# SiLU(gate) * up has the errors of both factors, and of SiLU's slope.
SWIGLU_ERROR = 4e-4

SHAPES = [(4096, 7168), (7168, 2048), (512, 7168), (7168, 256), (256, 128), (384, 384), (576, 640), (64, 256)]
WIDE = {(4096, 7168), (7168, 2048)}  # 256 experts of these are no rank's share
CASES = [(e, *shape) for shape in SHAPES for e in (1, 3, 32, 256) if not (shape in WIDE and e == 256)]
DISTRIBUTIONS = [
    "none",
    "one",
    "1-9",
    "15-17",
    "31-33",
    "41-50",
    "63-65",
    "95-129",
    "127-129",
    "150-178",
    "one_hot",
    "zipf",
    "first_empty",
    "last_empty",
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "x".join(map(str, case)))
def weights(request: pytest.FixtureRequest) -> Iterator[Weights]:
    yield make_weights(*request.param)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def small() -> Weights:
    return make_weights(5, 384, 896)


def assert_right(weights: Weights, rows: Rows, **options: int) -> None:
    expected = exact_parts(weights, rows)
    n = weights.packed.n
    assert relative_error(run(weights, rows, n, torch.bfloat16, **options), expected) <= BF16_ERROR
    assert relative_error(run(weights, rows, n, torch.float32, **options), expected) <= F32_ERROR


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_shape_and_distribution_is_right(weights: Weights, name: str) -> None:
    assert_right(weights, make_rows(row_counts(name, weights.packed.experts), weights.packed.k))


@pytest.mark.parametrize("name", ["none", "1-9", "31-33", "127-129", "one_hot", "first_empty"])
@pytest.mark.parametrize("granularity", ["token", "token_group"])
@pytest.mark.parametrize("masked", [False, True], ids=["offsets", "masked"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("experts", "n", "k"), [(5, 384, 896), (3, 512, 7168), (2, 7168, 256), (4, 64, 128)])
def test_layouts_granularities_and_ranges_are_right(
    experts: int, n: int, k: int, full_range: bool, masked: bool, granularity: str, name: str
) -> None:
    weights = make_weights(experts, n, k, full_range)
    assert weights.packed.full_range == full_range
    rows = make_rows(row_counts(name, experts), k, "token" if granularity == "token" else "token_group", masked)
    for expected_rows in (1, 16, 64, 512):  # each kernel, whatever the rows
        assert_right(weights, rows, expected_rows=expected_rows)


@pytest.mark.parametrize("name", ["1-9", "31-33", "127-129", "one_hot"])
@pytest.mark.parametrize("granularity", ["token", "token_group"])
@pytest.mark.parametrize(("experts", "n", "k"), [(5, 384, 896), (3, 4096, 7168), (2, 7168, 256), (4, 64, 128)])
def test_groups_of_32_inputs_are_right(experts: int, n: int, k: int, granularity: str, name: str) -> None:
    weights = make_weights(experts, n, k, group=32)
    rows = make_rows(row_counts(name, experts), k, "token" if granularity == "token" else "token_group")
    for expected_rows in (1, 16, 64, 512):
        assert_right(weights, rows, expected_rows=expected_rows)


@pytest.mark.parametrize("tokens", [1, 8, 33, 70, 200])
@pytest.mark.parametrize("granularity", ["token", "token_group"])
@pytest.mark.parametrize(("n", "k"), [(384, 896), (2048, 7168), (7168, 2048), (72, 128)])
def test_fp8_weights_with_block_scales_are_right(n: int, k: int, granularity: str, tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(n + k)
    weight = quantize_fp8_block(torch.randn(n, k, generator=generator, device="cuda"))
    packed = pack_fp8(weight)
    rows = make_rows([tokens], k, "token" if granularity == "token" else "token_group")
    x = torch.unflatten(rows.x.values[:tokens].to(torch.float64), 1, (rows.x.scales.shape[1], -1))
    x = (x * rows.x.scales[:tokens].to(torch.float64).unsqueeze(2)).flatten(1)
    expected = [x @ dequantize_fp8_block(weight, torch.float64).T]
    for expected_rows in (1, 16, 64, 512):
        for dtype, bound in ((torch.bfloat16, BF16_ERROR), (torch.float32, FP8_F32_ERROR)):
            y = grouped_gemm(rows.x, packed, **rows.arguments, out_dtype=dtype, expected_rows=expected_rows)
            assert relative_error(y[:tokens], expected) <= bound


@pytest.mark.parametrize("tokens", [3, 130])
def test_swiglu_of_fp8_gate_and_up_is_right(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    gate, up = (quantize_fp8_block(torch.randn(256, 512, generator=generator, device="cuda") / 22) for _ in range(2))
    x, _ = quantize_tokens(torch.randn(tokens, 512, generator=generator, device="cuda"), "token")
    wide = x.values.to(torch.float64) * x.scales.to(torch.float64)
    products = [wide @ dequantize_fp8_block(part, torch.float64).T for part in (gate, up)]
    y = grouped_gemm(x, pack_fp8_gate_up(gate, up), torch.tensor([0, tokens], device="cuda"), epilogue="swiglu")
    assert relative_error(y, [torch.nn.functional.silu(products[0]) * products[1]]) <= SWIGLU_ERROR


@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("lowest", [-7, -8])
@pytest.mark.parametrize("expected_rows", [1, 64, 512])
def test_every_code_comes_through_exactly(lowest: int, expected_rows: int, group: int) -> None:
    """The kernel relies on the tensor core to keep subnormal e4m3 numbers: one-hot tokens must read the codes back."""
    n, k = 256, 512
    codes = (torch.arange(n * k, device="cuda").view(n, k) * 7 // 3 % (8 - lowest) + lowest).to(torch.int8)
    packed_codes = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
    weight = pack([Int4Weight(packed_codes, torch.ones(n, k // group, device="cuda"))])
    x = Quantized(torch.eye(k, device="cuda").to(torch.float8_e4m3fn), torch.ones(k, 1, device="cuda"))
    offsets = torch.tensor([0, k], device="cuda")
    y = grouped_gemm(x, weight, offsets, out_dtype=torch.float32, expected_rows=expected_rows)
    assert torch.equal(y, codes.T.float())


@pytest.mark.parametrize("masked", [False, True], ids=["offsets", "masked"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("name", ["one", "15-17", "127-129", "zipf"])
@pytest.mark.parametrize(("experts", "intermediate", "k"), [(3, 2048, 7168), (32, 256, 512), (4, 24, 384)])
def test_swiglu_epilogue_is_silu_of_gate_times_up(
    experts: int, intermediate: int, k: int, name: str, full_range: bool, masked: bool
) -> None:
    both = make_weights(experts, 2 * intermediate, k, full_range)
    # Scales that leave gates around 1, where SiLU bends.
    plain = Int4Weight(both.plain.codes, both.plain.scales / k**0.5)
    gate = Int4Weight(plain.codes[:, :intermediate], plain.scales[:, :intermediate])
    up = Int4Weight(plain.codes[:, intermediate:], plain.scales[:, intermediate:])
    rows = make_rows(row_counts(name, experts), k, masked=masked)
    products = exact_parts(Weights(plain, both.packed), rows)
    expected = [torch.nn.functional.silu(part[:, :intermediate]) * part[:, intermediate:] for part in products]
    mixed = interleave(gate, up)
    weights = Weights(mixed, pack(mixed))
    for expected_rows in (1, 64, 512):
        y = run(weights, rows, intermediate, torch.float32, epilogue="swiglu", expected_rows=expected_rows)
        assert relative_error(y, expected) <= SWIGLU_ERROR


@pytest.mark.parametrize("name", ["1-9", "63-65", "zipf"])
def test_row_weights_multiply_the_rows(small: Weights, name: str) -> None:
    rows = make_rows(row_counts(name, 5), 896)
    row_weights = torch.full((len(rows.x.values),), torch.nan, device="cuda")
    row_weights[rows.live] = torch.rand(len(rows.live), device="cuda")
    scaled = torch.split(row_weights[rows.live].to(torch.float64)[:, None], rows.counts)
    expected = [part * factor for part, factor in zip(exact_parts(small, rows), scaled, strict=True)]
    for dtype, bound in ((torch.bfloat16, BF16_ERROR), (torch.float32, F32_ERROR)):
        assert relative_error(run(small, rows, 384, dtype, row_weights=row_weights), expected) <= bound


def test_token_without_values_gives_exactly_zero(small: Weights) -> None:
    rows = make_rows([4, 0, 40, 1, 3], 896)
    rows.x.values.view(torch.uint8)[7] = 0
    rows.x.scales[7] = 0
    y = run(small, rows, 384, torch.bfloat16)
    assert not y[7].any()
    assert y[8].any()


def test_nan_in_one_token_stays_in_its_row(small: Weights) -> None:
    rows = make_rows([4, 0, 40, 1, 3], 896)
    clean = run(small, rows, 384, torch.bfloat16)
    rows.x.scales[9] = torch.nan
    rows.x.values.view(torch.uint8)[9] = 0x7F
    y = run(small, rows, 384, torch.bfloat16)
    others = torch.arange(len(y), device="cuda") != 9
    assert y[9].isnan().all()
    assert torch.equal(y[others], clean[others])


def test_replay_of_a_graph_follows_changed_offsets_and_tokens(small: Weights) -> None:
    capacity, n = 256, 384
    x = make_rows([capacity], 896).x
    x = Quantized(x.values[:capacity].contiguous(), x.scales[:capacity].contiguous())
    offsets = torch.tensor([0, 1, 2, 3, 4, 5], device="cuda")
    out = torch.zeros(capacity, n, dtype=torch.bfloat16, device="cuda")
    grouped_gemm(x, small.packed, offsets, out=out, expected_rows=16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_gemm(x, small.packed, offsets, out=out, expected_rows=16)
    for bounds in ([0, 0, 0, 0, 0, 0], [0, 256, 256, 256, 256, 256], [0, 3, 70, 70, 199, 250], [0, 0, 0, 0, 0, 9]):
        offsets.copy_(torch.tensor(bounds))
        x.scales.mul_(1.5)
        out.fill_(7)
        graph.replay()
        eager = torch.full_like(out, 7)
        grouped_gemm(x, small.packed, torch.tensor(bounds, device="cuda"), out=eager, expected_rows=16)
        assert torch.equal(out, eager)
        assert (out[bounds[-1] :] == 7).all()
        assert not (out[: bounds[-1]] == 7).all(dim=1).any()


@pytest.mark.parametrize("expected_rows", [1, 64, 512])
def test_a_thousand_runs_give_the_same_bits(small: Weights, expected_rows: int) -> None:
    rows = make_rows(row_counts("zipf", 5), 896)
    first = run(small, rows, 384, torch.float32, expected_rows=expected_rows)
    for _ in range(1000):
        again = grouped_gemm(
            rows.x, small.packed, **rows.arguments, out_dtype=torch.float32, expected_rows=expected_rows
        )
        assert torch.equal(again[rows.live], first)


@pytest.mark.parametrize("granularity", ["token", "token_group"])
@pytest.mark.parametrize(("n", "k"), [(384, 896), (4096, 7168)])
def test_row_alone_has_the_bits_it_has_in_any_batch(n: int, k: int, granularity: str) -> None:
    weights = make_weights(3, n, k)
    rows = make_rows([9, 130, 40], k, "token" if granularity == "token" else "token_group")
    batches = {hint: run(weights, rows, n, torch.float32, expected_rows=hint) for hint in (1, 9, 16, 32, 64, 300, 4096)}
    batch = batches.popitem()[1]
    for hint, other in batches.items():
        assert torch.equal(other, batch), f"expected_rows {hint} changes the result"
    for row, expert in ((0, 0), (8, 0), (9, 1), (77, 1), (138, 1), (139, 2), (178, 2)):
        alone = Quantized(rows.x.values[row : row + 1], rows.x.scales[row : row + 1])
        offsets = torch.tensor([0] * (expert + 1) + [1] * (3 - expert), device="cuda")
        y = grouped_gemm(alone, weights.packed, offsets, out_dtype=torch.float32)
        assert torch.equal(y[0], batch[row])


def test_strided_and_misaligned_tensors_are_refused(small: Weights) -> None:
    x = make_rows([8] * 5, 896).x
    offsets = torch.tensor([0, 8, 16, 24, 32, 40], device="cuda")
    out = torch.empty(len(x.values), 385, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        grouped_gemm(x, small.packed, offsets, out=out[:, :384])
    shifted = out.view(-1)[1 : 1 + len(x.values) * 384].view(-1, 384)
    with pytest.raises(ValueError, match="out: expected an address in multiples of 16"):
        grouped_gemm(x, small.packed, offsets, out=shifted)
    with pytest.raises(ValueError, match="offsets: expected a tensor on cuda:0, got one on cpu"):
        grouped_gemm(x, small.packed, offsets.cpu())
