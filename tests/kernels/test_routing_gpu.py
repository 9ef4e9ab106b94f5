"""The routing kernels give the bits of `linear` and the gates in torch on a CPU, for every token with finite logits."""

from __future__ import annotations

import random

import pytest
import torch

from moe_forward import gates
from moe_forward.types import GateKind, GateSpec
from w4afp8.linear import linear, slice_weight
from w4afp8.routing import (
    Chosen,
    GateRule,
    choose_experts_cuda,
    route_cuda,
    slice_products,
    slice_rows_cuda,
)

pytestmark = pytest.mark.gpu

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
KINDS: list[GateKind] = ["deepseek_v3", "softmax"]
EXPERTS = [8, 64, 128, 256, 384, 512]
ODD_EXPERTS = [1, 2, 27, 33, 100, 768, 1024]
TOP_K = [1, 2, 6, 8, 16, 32]
BAD = [torch.nan, torch.inf, -torch.inf]
FULL = GateSpec("deepseek_v3", 8, 4, True, 2.5)


def make_gate(choose: random.Random, kind: GateKind, experts: int) -> tuple[GateSpec, int, torch.Tensor | None]:
    """A gate that fits, its K, and a bias or none."""
    top_k = choose.choice([k for k in TOP_K if k <= experts])
    groups = top_groups = 1
    bias = None
    if kind == "deepseek_v3":
        groups = choose.choice([g for g in range(1, 33) if experts % g == 0 and (g == 1 or experts // g >= 2)])
        least = -(-top_k // (experts // groups))
        top_groups = choose.randint(least, groups)
        if choose.random() < 0.6:
            generator = torch.Generator().manual_seed(choose.randrange(1 << 30))
            bias = torch.randn(experts, generator=generator) * choose.choice([0.1, 1.0, 1e3])
            bias = bias.round() if choose.random() < 0.3 else bias  # equals
    scaling = choose.choice([1.0, 2.5, 2.827, 1 / 3])
    return GateSpec(kind, groups, top_groups, choose.random() < 0.5, scaling), top_k, bias


def special_logits(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of very different sizes; many with ties, some that saturate, overflow or underflow."""
    logits = torch.randn(tokens, experts, generator=generator) * 2
    kind = torch.arange(tokens) % 11
    logits[kind == 1] = logits[kind == 1].round()
    logits[kind == 2] = 0.0
    logits[kind == 3] *= 1e30
    logits[kind == 4] *= 1e-40
    logits[kind == 5] = torch.where(logits[kind == 5] < 0, -0.0, 0.0)
    logits[kind == 6] *= 100
    logits[kind == 7] = torch.where(logits[kind == 7] < 0, -3e38, 3e38)
    logits[kind == 8] = (logits[kind == 8] * 2).round() * 40
    logits[kind == 9] = -1e6
    if experts >= 128:  # the two best of a group belong to one lane
        logits[kind == 10] = -3.0
        for column, logit in ((3, 1.0), (35, 0.9), (experts // 2, 0.97), (experts // 2 + 1, 0.8)):
            logits[kind == 10, column] = logit
    return logits


def check(found: Chosen, spec: GateSpec, top_k: int, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Hold a choice against torch's on the CPU; of rows that are not finite, only ids are looked at."""
    ids, weights, non_finite = (tensor.cpu() for tensor in found)
    expected_ids, expected_weights = gates.choose(spec, top_k, logits, bias)
    good = torch.isfinite(logits).all(1)
    assert torch.equal(non_finite, ~good)
    assert torch.equal(ids[good], expected_ids[good])
    assert torch.equal(weights[good].view(torch.int32), expected_weights[good].view(torch.int32))
    assert bool(((ids >= 0) & (ids < logits.shape[1])).all())
    assert all(len({*row}) == top_k for row in ids.tolist())


def rule_of(spec: GateSpec, top_k: int) -> GateRule:
    rule = gates.kernel_rule(spec, top_k)
    assert rule is not None
    return rule


def on_gpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cuda()


def hidden_states(tokens: int, inputs: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Tokens of very different size; some zero, subnormal, huge or with a single large element."""
    x = torch.randn(tokens, inputs, generator=generator)
    x *= torch.exp2(torch.randint(-20, 8, (tokens, 1), generator=generator).float())
    kind = torch.arange(tokens) % 13
    x[kind == 3] = 0.0
    x[kind == 5] *= 1e-38
    x[kind == 7, inputs // 2] = 6e4
    x[kind == 9] = -0.0
    x[kind == 9, 0] = 1e-45
    x[kind == 11] = x[kind == 11].sign() * 6e4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", EXPERTS + ODD_EXPERTS)
def test_experts_chosen_by_logits_have_the_bits_of_torch(experts: int, kind: GateKind, dtype: torch.dtype) -> None:
    choose = random.Random(experts * 10 + FLOATS.index(dtype))
    generator = torch.Generator().manual_seed(experts)
    for tokens in (1, 3, 64, 65, 300):
        for _ in range(4):
            spec, top_k, bias = make_gate(choose, kind, experts)
            logits = special_logits(tokens, experts, generator).to(dtype)
            found = choose_experts_cuda(logits.cuda(), on_gpu(bias), rule_of(spec, top_k))
            check(found, spec, top_k, logits.float(), bias)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (2, 1), (4, 1), (8, 4), (32, 32)])
@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 16])
def test_groups_bias_and_normalization(
    top_k: int, num_groups: int, top_groups: int, biased: bool, normalize: bool
) -> None:
    generator = torch.Generator().manual_seed(top_k)
    spec = GateSpec("deepseek_v3", num_groups, top_groups, normalize, 2.5)
    bias = torch.randn(256, generator=generator) * 0.1 if biased else None
    logits = special_logits(77, 256, generator)
    check(choose_experts_cuda(logits.cuda(), on_gpu(bias), rule_of(spec, top_k)), spec, top_k, logits, bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [2, 24, 128, 2048, 7168, 16512])
@pytest.mark.parametrize("tokens", [1, 13, 300])
def test_slices_have_the_bits_of_linear(tokens: int, inputs: int, dtype: torch.dtype) -> None:
    x = hidden_states(tokens, inputs, dtype, torch.Generator().manual_seed(inputs))
    expected = slice_weight(x.float())
    bits = (53 - (inputs - 1).bit_length()) // 2
    slices, units = slice_rows_cuda(x.cuda(), bits)
    assert torch.equal(slices.cpu().view(-1, inputs).view(torch.int64), expected.slices.view(torch.int64))
    assert torch.equal(units.cpu(), expected.units[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("inputs", [128, 2048, 7168])
def test_routes_by_hidden_states_have_the_bits_of_torch(
    inputs: int, experts: int, dtype: torch.dtype, kind: GateKind
) -> None:
    choose = random.Random(inputs + experts)
    generator = torch.Generator().manual_seed(inputs + experts)
    weight = torch.randn(experts, inputs, generator=generator) * 0.02
    weight[experts // 2 :] = weight[: experts // 2].clone()  # equals
    weight[0] *= 1e-30
    sliced, on_device = slice_weight(weight), slice_weight(weight.cuda())
    for tokens in (1, 3, 64, 65, 130, 300):
        spec, top_k, bias = make_gate(choose, kind, experts)
        x = hidden_states(tokens, inputs, dtype, generator)
        found = route_cuda(x.cuda(), on_device, on_gpu(bias), rule_of(spec, top_k))
        check(found, spec, top_k, linear(x.float(), sliced), bias)


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A router [256, 7168] and its bias, on the CPU."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(256, 7168, generator=generator) * 0.02, torch.randn(256, generator=generator) * 0.1


def same(found: Chosen, expected: Chosen) -> bool:
    return all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_gets_the_same_bits_alone_and_in_company(
    kind: GateKind, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight, bias = slice_weight(layer[0].cuda()), layer[1].cuda() if kind == "deepseek_v3" else None
    rule = rule_of(FULL if kind == "deepseek_v3" else GateSpec("softmax"), 8)
    x = hidden_states(600, 7168, torch.bfloat16, torch.Generator().manual_seed(1)).cuda()
    whole = route_cuda(x, weight, bias, rule)
    for first, last in ((0, 1), (299, 300), (5, 69), (100, 228), (200, 456), (1, 599)):
        part = route_cuda(x[first:last], weight, bias, rule)
        assert same(part, Chosen(*(tensor[first:last] for tensor in whole)))
    order = torch.randperm(600, generator=torch.Generator().manual_seed(2)).cuda()
    assert same(route_cuda(x[order], weight, bias, rule), Chosen(*(tensor[order] for tensor in whole)))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("tokens", [4, 70, 300])
def test_hidden_states_that_are_not_finite_are_flagged_and_touch_no_other_token(
    tokens: int, bad: float, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight, bias, rule = slice_weight(layer[0].cuda()), layer[1].cuda(), rule_of(FULL, 8)
    x = hidden_states(tokens, 7168, torch.bfloat16, torch.Generator().manual_seed(3)).cuda()
    clean = route_cuda(x, weight, bias, rule)
    x[2, 4001] = bad
    found = route_cuda(x, weight, bias, rule)
    others = torch.arange(tokens, device="cuda") != 2
    assert same(Chosen(*(tensor[others] for tensor in found)), Chosen(*(tensor[others] for tensor in clean)))
    assert found.non_finite.tolist() == [token == 2 for token in range(tokens)]
    assert len({*found.ids[2].tolist()} & {*range(256)}) == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("columns", [slice(5, 6), slice(0, 27)])
def test_logits_that_are_not_finite_are_flagged_and_touch_no_other_token(
    columns: slice, bad: float, kind: GateKind
) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(67, 27, generator=generator)
    logits[4, columns] = bad
    for _ in range(5):
        spec, top_k, bias = make_gate(random.Random(6), kind, 27)
        check(choose_experts_cuda(logits.cuda(), on_gpu(bias), rule_of(spec, top_k)), spec, top_k, logits, bias)


def test_no_tokens_give_no_routes(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    rule, bias = rule_of(FULL, 8), layer[1].cuda()
    by_hidden = route_cuda(torch.empty(0, 7168, device="cuda"), slice_weight(layer[0].cuda()), bias, rule)
    by_logits = choose_experts_cuda(torch.empty(0, 256, device="cuda"), bias, rule)
    for found in (by_hidden, by_logits):
        assert [list(tensor.shape) for tensor in found] == [[0, 8], [0, 8], [0]]


def test_more_tokens_than_are_sliced_at_a_time(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, bias, rule = slice_weight(layer[0].cuda()), layer[1].cuda(), rule_of(FULL, 8)
    x = torch.randn(5001, 7168, generator=torch.Generator("cuda").manual_seed(7), device="cuda").bfloat16()
    whole = route_cuda(x, weight, bias, rule)
    for first in (0, 2330, 4670, 4991):
        part = route_cuda(x[first : first + 10], weight, bias, rule)
        assert same(part, Chosen(*(tensor[first : first + 10] for tensor in whole)))


@pytest.mark.parametrize("parts", [1, 4, 8, 16])
def test_products_in_parts_are_made_without_a_copy_of_the_weight(
    parts: int, layer: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight = slice_weight(layer[0].cuda())
    slices, _ = slice_rows_cuda(torch.randn(33, 7168, device="cuda"), 20)
    slice_products(slices, weight.slices, parts)  # the BLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    products = slice_products(slices, weight.slices, parts)
    assert torch.cuda.max_memory_allocated() - before <= products.nbytes + slices.nbytes // 2
    assert torch.equal(products.sum(0), slices.view(66, 7168) @ weight.slices.T)


def test_the_kernel_before_is_waited_for(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    # The launches let kernels start early; what they read is written by copies that take far longer than a start.
    weight, bias, rule = slice_weight(layer[0].cuda()), layer[1].cuda(), rule_of(FULL, 8)
    generator = torch.Generator().manual_seed(8)
    sources = [torch.randn(2048, 7168, generator=generator).cuda() for _ in range(2)]
    logits = [torch.randn(65536, 256, generator=generator).cuda() for _ in range(2)]
    expected = [
        (route_cuda(x, weight, bias, rule), choose_experts_cuda(y, bias, rule))
        for x, y in zip(sources, logits, strict=True)
    ]
    x, y = torch.zeros_like(sources[0]), torch.zeros_like(logits[0])
    for turn in range(40):
        x.copy_(sources[turn % 2])
        by_hidden = route_cuda(x, weight, bias, rule)
        x.zero_()  # the kernel after it must not start before it has read
        y.copy_(logits[turn % 2])
        by_logits = choose_experts_cuda(y, bias, rule)
        y.zero_()
        assert same(by_hidden, expected[turn % 2][0])
        assert same(by_logits, expected[turn % 2][1])


def test_replay_of_a_graph_routes_again(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, bias, rule = slice_weight(layer[0].cuda()), layer[1].cuda(), rule_of(FULL, 8)
    first, second = torch.randn(2, 33, 7168, device="cuda").unbind()
    expected = route_cuda(second, weight, bias, rule)
    x = first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = route_cuda(x, weight, bias, rule)
    x.copy_(second)
    graph.replay()
    assert same(found, expected)


def test_strided_and_misaligned_arguments_are_refused(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, rule = slice_weight(layer[0].cuda()), rule_of(FULL, 8)
    x = torch.zeros(4, 2 * 7168, device="cuda")
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        route_cuda(x[:, :7168], weight, None, rule)
    with pytest.raises(ValueError, match="x: expected an address in multiples of 16"):
        route_cuda(x.view(-1)[1 : 1 + 7168].view(1, 7168), weight, None, rule)
    with pytest.raises(ValueError, match="logits: expected a contiguous tensor"):
        choose_experts_cuda(x[:, :256], None, rule)
    with pytest.raises(ValueError, match="bias: expected a tensor on cuda"):
        route_cuda(x.view(8, 7168), weight, layer[1], rule)
