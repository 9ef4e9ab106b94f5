"""A token's output is the same bits alone, in company, in any order and on any number of ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from .forwards import Forward, as_oip_binary, as_safetensors, oip_parts, post, read_output
from .local import Local, relative_error
from .running import Service

pytestmark = pytest.mark.service

MAX_LAYER_ERROR = 6e-3


async def together(url: str, forwards: list[Forward]) -> list[httpx.Response]:
    async with httpx.AsyncClient(timeout=120.0, limits=httpx.Limits(max_connections=None)) as client:
        sent = [as_oip_binary(forward) for forward in forwards]
        return await asyncio.gather(
            *(client.post(url + item.path, headers=item.headers, content=item.body) for item in sent)
        )


@pytest.fixture(scope="module")
def forwards(random_forward: Callable[..., Forward]) -> list[Forward]:
    """Twelve forwards of layer 2, of 1 to 23 tokens."""
    return [random_forward(seed, 1 + 2 * seed, layer=2) for seed in range(12)]


@pytest.fixture(scope="module")
def alone(service: Service, forwards: list[Forward]) -> list[torch.Tensor]:
    """What each of them gives alone on two ranks."""
    return [read_output(post(service.url, as_safetensors(forward))) for forward in forwards]


def test_served_output_is_that_of_the_local_computation_to_the_bit(
    local: Local, forwards: list[Forward], alone: list[torch.Tensor]
) -> None:
    assert all(torch.equal(mine, served) for mine, served in zip(local.outputs(forwards), alone, strict=True))


@pytest.mark.parametrize("shared", [True, False], ids=["shared experts", "routed only"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_served_output_is_near_the_float64_reference(
    service: Service, local: Local, random_forward: Callable[..., Forward], dtype: torch.dtype, shared: bool
) -> None:
    forward = random_forward(7, 33, layer=3, dtype=dtype, shared=shared)
    served = read_output(post(service.url, as_safetensors(forward)))
    assert served.dtype == dtype
    error = relative_error(served, local.exact(forward))
    print(f"{dtype}, shared experts {shared}: relative error {error:.2e} against float64")
    assert error <= MAX_LAYER_ERROR
    assert error < relative_error(served * 1.01, local.exact(forward))


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
async def test_requests_in_one_step_get_the_bits_they_get_alone(
    service: Service, forwards: list[Forward], alone: list[torch.Tensor], backwards: bool
) -> None:
    order = list(range(len(forwards)))[:: -1 if backwards else 1]
    replies = await together(service.url, [forwards[index] for index in order])
    for index, reply in zip(order, replies, strict=True):
        assert torch.equal(read_output(reply), alone[index])
    tokens = [oip_parts(reply)[0]["parameters"]["batch_tokens"] for reply in replies]
    assert any(count > len(forwards[index].hidden) for index, count in zip(order, tokens, strict=True)), (
        f"no step held more than one request: {tokens}"
    )


def test_rows_of_a_request_get_the_same_bits_in_another_order(
    service: Service, forwards: list[Forward], alone: list[torch.Tensor]
) -> None:
    shuffled = torch.randperm(len(forwards[-1].hidden), generator=torch.Generator().manual_seed(3))
    reply = post(service.url, as_safetensors(Forward(2, forwards[-1].hidden[shuffled])))
    assert torch.equal(read_output(reply), alone[-1][shuffled])


@pytest.mark.parametrize("ranks", [8])  # one and three: tests/service/test_rank.py
async def test_another_number_of_ranks_gives_the_same_bits_and_stands_beside_a_running_service(
    service: Service,
    start: Callable[..., Any],
    tiny: Path,
    forwards: list[Forward],
    alone: list[torch.Tensor],
    ranks: int,
) -> None:
    with start(tiny, ranks=ranks) as other:
        assert len(other.rank_pids()) == ranks
        for forward, expected in zip(forwards, alone, strict=True):
            assert torch.equal(read_output(post(other.url, as_safetensors(forward))), expected)
        both = await asyncio.gather(together(other.url, forwards), together(service.url, forwards))
        for replies in both:
            assert all(torch.equal(read_output(reply), bits) for reply, bits in zip(replies, alone, strict=True))
        assert {other.url, other.metrics_url}.isdisjoint({service.url, service.metrics_url})
