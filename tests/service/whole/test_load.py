"""Two hundred mixed requests at once: every one answered, every answer right, nothing kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest
import torch

import w4afp8

from .conftest import SLAB_BYTES
from .forwards import (
    SAFETENSORS,
    Forward,
    Sent,
    as_json,
    as_oip_binary,
    as_oip_json,
    as_safetensors,
    post,
    read_output,
)
from .local import Local, relative_error
from .processes import anonymous_bytes, open_files
from .running import Service

pytestmark = pytest.mark.service

REQUESTS = 200
MAX_LAYER_ERROR = 6e-3
GROWTH_BYTES = 4 << 20
GROWTH_FILES = 2
JSON_TOKENS = 48
FORMS: tuple[Callable[[Forward], Sent], ...] = (as_safetensors, as_json, as_oip_json, as_oip_binary)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Mixed:
    """A request and what must come of it. forward: None where it is invalid and must end with `status`."""

    sent: Sent
    status: int
    forward: Forward | None


def valid(number: int, choose: random.Random) -> Mixed:
    form = FORMS[number % 4]
    in_json = form in (as_json, as_oip_json)
    tokens = choose.choice([1, 1, 2, 7, 16, 31, JSON_TOKENS] + ([] if in_json else [128, 255, 512]))
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(tokens, 256, generator=generator) * choose.choice([0.1, 1.0, 30.0])
    dtype = torch.float32 if in_json else DTYPES[number // 4 % 4]
    scales = None
    if dtype == torch.float8_e4m3fn:
        quantized, _ = w4afp8.quantize_tokens(hidden, "token" if number // 16 % 2 else "token_group")
        hidden, scales = quantized.values, quantized.scales
        scales = scales[:, 0] if scales.shape[1] == 1 and choose.random() < 0.5 else scales
    ids = weights = logits = None
    if number % 3 == 1:
        ids = torch.rand(tokens, 32, generator=generator).argsort(1)[:, :4]
        ids = ids.int() if choose.random() < 0.5 else ids
        weights = torch.rand(tokens, 4, generator=generator)
    elif number % 3 == 2:
        logits = torch.randn(tokens, 32, generator=generator)
        logits = logits.to(torch.bfloat16) if choose.random() < 0.5 and not in_json else logits
    layer, shared = choose.choice([1, 2, 3]), choose.random() < 0.7
    forward = Forward(layer, hidden.to(dtype), scales, ids, weights, logits, shared)
    return Mixed(form(forward), 200, forward)


def invalid(number: int) -> Mixed:
    kind = number % 5
    hidden = torch.zeros(3, 256)
    if kind == 0:
        hidden[1, 17] = torch.nan
        return Mixed(as_safetensors(Forward(2, hidden)), 422, None)
    if kind == 1:
        return Mixed(as_oip_binary(Forward(9, hidden)), 404, None)
    if kind == 2:
        return Mixed(as_oip_json(Forward(1, hidden[:, :100])), 400, None)
    if kind == 3:
        ids = torch.tensor([[0, 1, 2, 32]]).expand(3, 4)
        return Mixed(as_safetensors(Forward(1, hidden, ids=ids, weights=torch.ones(3, 4))), 400, None)
    return Mixed(Sent("/v1/moe/forward?layer=1", {"content-type": "text/plain"}, b"hello"), 415, None)


@pytest.fixture(scope="module")
def mixed() -> list[Mixed]:
    choose = random.Random(0)
    requests = [invalid(number // 10) if number % 10 == 9 else valid(number, choose) for number in range(REQUESTS)]
    choose.shuffle(requests)
    return requests


async def wave(url: str, requests: list[Mixed]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=300.0, limits=limits) as client:
        sent = [request.sent for request in requests]
        return await asyncio.gather(
            *(client.post(url + item.path, headers=item.headers, content=item.body) for item in sent)
        )


def memory(service: Service) -> dict[str, tuple[int, int]]:
    """Anonymous bytes and descriptors of front end, engine and ranks."""
    ranks = {f"rank {rank}": pid for rank, pid in enumerate(service.rank_pids())}
    pids = {"front end": service.process.pid, "engine": service.pid_of("ray::EngineProcess"), **ranks}
    return {name: (anonymous_bytes(pid), open_files(pid)) for name, pid in pids.items()}


async def test_two_hundred_mixed_requests_at_once_are_all_answered_right_and_leave_nothing(
    service: Service, local: Local, mixed: list[Mixed]
) -> None:
    forwards = [request.forward for request in mixed if request.forward is not None]
    expected = iter(local.outputs(forwards))
    in_float64 = iter(local.exacts([forward for forward in forwards if forward.scales is None]))
    replies = await wave(service.url, mixed)

    worst = 0.0
    for request, reply in zip(mixed, replies, strict=True):
        assert reply.status_code == request.status, reply.text
        if request.forward is None:
            assert reply.json()["error"]
            assert reply.json()["request_id"] == reply.headers["x-request-id"]
            continue
        output, exact = read_output(reply), next(expected)
        assert output.shape == exact.shape
        assert torch.equal(output, exact.to(output.dtype)), relative_error(output, exact)
        if request.forward.scales is None:
            worst = max(worst, relative_error(output, next(in_float64)))
    print(f"worst relative error of a request against float64: {worst:.2e}")
    assert worst <= MAX_LAYER_ERROR

    for number in range(2):
        if number == 1:  # the first repetition fills what is remembered of headers
            before = memory(service)
        again = await wave(service.url, mixed)
        assert [reply.status_code for reply in again] == [request.status for request in mixed]
        for request, reply, first in zip(mixed, again, replies, strict=True):
            if request.forward is not None:
                assert torch.equal(read_output(reply), read_output(first))
    after = memory(service)
    for name, (held_bytes, files) in after.items():
        grown = held_bytes - before[name][0]
        print(f"{name}: {held_bytes / 2**20:.0f} MiB, grown by {grown / 2**20:.1f} MiB; {files} descriptors")
        assert grown < GROWTH_BYTES, name
        assert files <= before[name][1] + GROWTH_FILES, name

    # A body as large as the whole slab only finds room when every byte of it is free; zeros are no safetensors.
    whole = Sent("/v1/moe/forward?layer=1", {"content-type": SAFETENSORS}, bytes(SLAB_BYTES))
    reply = post(service.url, whole)
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed_body"), reply.text
