"""Load of every kind that a service knows: encodings, layers, sizes, routing, bursts, and requests that are wrong."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import torch
from safetensors.torch import save

SAFETENSORS = {"content-type": "application/vnd.safetensors"}
JSON = {"content-type": "application/json"}
CALLERS = 6
BURST_REQUESTS = 48
BURST_EVERY_SECONDS = 2.0
WRONG_EVERY_SECONDS = 0.1
DISTINCT_REQUESTS = 24
KEEP_ALIVE_SECONDS = 1.0
"""Shorter than the service's own, so that no request goes into a connection that is just being closed."""
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Model:
    """What requests must fit. name: as it is served. layers: ids."""

    name: str
    hidden_size: int
    num_experts: int
    top_k: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """One POST. status: that it should end with when the service has room and time."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 200


def read_model(url: str) -> Model:
    """Ask a service what it serves."""
    document = httpx.get(f"{url}/v1/placement", timeout=TIMEOUT_SECONDS).raise_for_status().json()
    sizes = (document["hidden_size"], document["num_experts"], document["top_k"])
    return Model(document["model"], *sizes, tuple(document["layers"]))


async def put_load(url: str, model: Model, seconds: float, callers: int) -> Counter[int]:
    """Load a service for a while.

    callers: each sends its next right request when it has the answer to the last. Beside them come a burst every two
        seconds and a wrong request every tenth of one.
    Returns: HTTP status -> how often.
    Raises: RuntimeError for a status that no kind of request here can have.
    """
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS)
    right, wrong = list(itertools.islice(right_requests(model), DISTINCT_REQUESTS)), wrong_requests(model)
    burst = [item for item in right if item.headers == SAFETENSORS]
    statuses: Counter[int] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits) as client:
        end = asyncio.get_running_loop().time() + seconds

        async def post(sent: Sent, *others: int) -> None:
            reply = await client.post(sent.path, headers=sent.headers, content=sent.body)
            if reply.status_code not in (sent.status, *others):
                raise RuntimeError(f"{sent.path}: expected {sent.status}, got {reply.status_code} {reply.text}")
            statuses[reply.status_code] += 1

        async def call(requests: Iterator[Sent]) -> None:
            while asyncio.get_running_loop().time() < end:
                await post(next(requests), 429)

        async def send_bursts() -> None:
            while asyncio.get_running_loop().time() < end:
                await asyncio.gather(
                    *(post(sent, 429) for sent in itertools.islice(itertools.cycle(burst), BURST_REQUESTS))
                )
                await asyncio.sleep(BURST_EVERY_SECONDS)

        async def send_wrong() -> None:
            for sent in itertools.cycle(wrong):
                if asyncio.get_running_loop().time() >= end:
                    return
                await post(sent, 429)
                await asyncio.sleep(WRONG_EVERY_SECONDS)

        loads = [call(itertools.cycle(right[start:] + right[:start])) for start in range(callers)]
        await asyncio.gather(*loads, send_bursts(), send_wrong())
    return statuses


def right_requests(model: Model, seed: int = 0) -> Iterator[Sent]:
    """Make requests that are answered: every encoding, layer, float type and way of routing in turn."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    for number in itertools.count():
        layer = model.layers[number % len(model.layers)]
        tokens = choose.choice((1, 2, 4, 8, 16, 32, 64))
        hidden = torch.randn(tokens, model.hidden_size, generator=generator)
        kind = number % 8
        if kind == 5:
            yield _as_json(model, layer, hidden[:4])
        elif kind == 6:
            yield _as_protocol(model, layer, hidden[:4])
        elif kind == 7:
            yield _safetensors(layer, hidden_states=hidden.to(torch.float8_e4m3fn), **_group_scales(hidden))
        elif kind == 4:
            yield _safetensors(layer, hidden_states=hidden.half(), **_chosen_experts(model, tokens, generator))
        else:
            dtype = torch.float32 if kind == 3 else torch.bfloat16
            yield _safetensors(layer, hidden_states=hidden.to(dtype))


def wrong_requests(model: Model) -> list[Sent]:
    """Make one request of each kind that is refused, and one whose deadline cannot be met."""
    layer, hidden = model.layers[0], torch.zeros(3, model.hidden_size)
    good = _safetensors(layer, hidden_states=hidden)
    spoiled = hidden.clone()
    spoiled[1, 0] = torch.nan
    missing = max(model.layers) + 1
    return [
        Sent(good.path, SAFETENSORS, b"no safetensors", 400),
        Sent(good.path, SAFETENSORS, save({"hidden_states": hidden[:, :-1].contiguous()}), 400),
        Sent(f"/v1/moe/forward?layer={missing}", SAFETENSORS, good.body, 404),
        Sent(f"/v2/models/not-{model.name}/infer", JSON, b"{}", 404),
        Sent(good.path, {"content-type": "text/plain"}, good.body, 415),
        Sent(good.path, SAFETENSORS, save({"hidden_states": spoiled}), 422),
        Sent(good.path, JSON, b" " * (1 << 20) + b"{}", 413),
        Sent(f"{good.path}&timeout_ms=0.001", SAFETENSORS, good.body, 504),
    ]


def _safetensors(layer: int, **tensors: torch.Tensor) -> Sent:
    return Sent(f"/v1/moe/forward?layer={layer}", SAFETENSORS, save(tensors))


def _as_json(model: Model, layer: int, hidden: torch.Tensor) -> Sent:
    return Sent(f"/v1/moe/forward?layer={layer}", JSON, json.dumps({"hidden_states": hidden.tolist()}).encode())


def _as_protocol(model: Model, layer: int, hidden: torch.Tensor) -> Sent:
    tensor = {
        "name": "hidden_states",
        "datatype": "FP32",
        "shape": list(hidden.shape),
        "data": hidden.flatten().tolist(),
    }
    body = json.dumps({"inputs": [tensor], "parameters": {"layer": layer}}).encode()
    return Sent(f"/v2/models/{model.name}/infer", JSON, body)


def _group_scales(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales of the granularity that a service with default settings has to make again."""
    tokens, channels = hidden.shape
    return {"hidden_scales": torch.full((tokens, channels // 128), 0.01)}


def _chosen_experts(model: Model, tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.rand(tokens, model.num_experts, generator=generator).argsort(1)[:, : model.top_k]
    return {"topk_ids": ids.contiguous(), "topk_weights": torch.rand(tokens, model.top_k, generator=generator)}
