"""The exchange of one rank, which is the others' oracle: against plain loops, and on a GPU inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from moe_forward.exchange.local import LocalExchange
from moe_forward.exchange.rows import add_slots, expert_order, local_ids, take_bytes
from w4afp8 import Quantized, quantize_tokens

from .oracle import contributions, expert_rows, in_slot_order

NUM_EXPERTS = 8


def tokens_of(count: int, seed: int, hidden: int = 256) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    return quantize_tokens(torch.randn(count, hidden, generator=generator) * 10, "token")[0]


def routes_of(kind: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, NUM_EXPERTS, generator=generator).topk(3, dim=1).indices
    if kind == "holes":
        ids = ids.masked_fill(torch.rand(count, 3, generator=generator) < 0.4, -1)
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    elif kind == "repeated":
        ids = ids[:, :1].expand(-1, 3).contiguous()
    return ids, torch.rand(count, 3, generator=generator)


def test_local_groups_rows_by_expert_in_order_of_token_and_slot() -> None:
    tokens = tokens_of(4, seed=0)
    ids = torch.tensor([[2, 0], [0, 2], [2, 2], [3, 0]])
    weights = torch.arange(8.0).view(4, 2)
    received = LocalExchange(5).dispatch(tokens, ids, weights)
    assert received.offsets.tolist() == [0, 3, 3, 7, 8, 8]
    source = [0, 1, 3, 0, 1, 2, 2, 3]
    assert torch.equal(received.rows.values.view(torch.uint8), tokens.values.view(torch.uint8)[source])
    assert torch.equal(received.rows.scales, tokens.scales[source])
    assert received.weights.tolist() == [1.0, 2.0, 7.0, 0.0, 3.0, 4.0, 5.0, 6.0]


def test_local_combine_adds_slots_in_order_not_in_order_of_experts() -> None:
    local = LocalExchange(3)
    received = local.dispatch(tokens_of(1, seed=0), torch.tensor([[2, 1, 0]]), torch.ones(1, 3))
    rows = torch.tensor([[1.0], [-1e8], [1e8]])  # of experts 0, 1, 2: slots 2, 1, 0
    assert local.combine(rows, received.handle).item() == 1.0  # (1e8 - 1e8) + 1, not (1 - 1e8) + 1e8


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("count", [0, 1, 17])
@pytest.mark.parametrize("kind", ["random", "holes", "none", "repeated"])
def test_local_combines_to_the_sum_over_slots(kind: str, count: int, pads: bool) -> None:
    tokens, (ids, weights) = tokens_of(count, seed=1), routes_of(kind, count, seed=2)
    local = LocalExchange(NUM_EXPERTS, pads)
    received = local.dispatch(tokens, ids, weights)
    assert len(received.weights) == (ids.numel() if pads else int((ids >= 0).sum()))
    assert received.expected_rows == max(1, -(-count * 3 // NUM_EXPERTS))
    combined = local.combine(expert_rows(received, 0), received.handle)
    assert torch.equal(combined, in_slot_order(contributions(tokens, ids, weights)))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 64, 1024])
def test_local_follows_new_tokens_and_routes_in_a_cuda_graph(count: int) -> None:
    """Bit for bit the sum over slots of what was computed on CPU, NaN in every row of no expert."""
    device = torch.device("cuda", 0)
    local = LocalExchange(NUM_EXPERTS, pads=True)
    made = [(tokens_of(count, seed), *routes_of(kind, count, seed)) for seed, kind in enumerate(("random", "holes"))]
    static = [tensor.to(device) for tensor in (*made[0][0], *made[0][1:])]

    def step() -> torch.Tensor:
        received = local.dispatch(Quantized(*static[:2]), *static[2:])
        return local.combine(expert_rows(received, 0, torch.bfloat16), received.handle)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for tokens, ids, weights in made:
        for target, source in zip(static, (*tokens, ids, weights), strict=True):
            target.copy_(source)
        graph.replay()
        expected = in_slot_order(contributions(tokens, ids, weights, torch.bfloat16))
        assert torch.equal(result.cpu(), expected)


def test_expert_order_puts_slots_of_other_ranks_last() -> None:
    order, offsets = expert_order(local_ids(torch.tensor([[4, 6], [5, -1], [6, 5], [9, 2]]), 5), 3)
    assert order.tolist()[:4] == [2, 5, 1, 4]
    assert sorted(order.tolist()) == list(range(8))
    assert offsets.tolist() == [0, 2, 4, 4]


def test_slots_are_added_from_first_to_last() -> None:
    rows = torch.tensor([[[1e8], [-1e8], [1.0]], [[1.0], [1e8], [-1e8]]])
    assert add_slots(rows).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("width", "columns"), [(64, 64), (68, 64), (67, 64), (64, 12), (9, 3)])
def test_rows_of_bytes_are_taken_whatever_their_alignment(width: int, columns: int) -> None:
    values = torch.arange(5 * width, dtype=torch.uint8).view(5, width)[:, width - columns :]
    taken = take_bytes(values.view(torch.float8_e4m3fn), torch.tensor([4, 0, 4]))
    assert torch.equal(taken.view(torch.uint8), values[[4, 0, 4]])
