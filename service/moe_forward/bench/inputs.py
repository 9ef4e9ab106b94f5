"""Bodies of requests: random tensors of the model's sizes, encoded once by the client's own functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from moe_forward.bench.load import BenchDType, BenchRouting
from moe_forward.client.tensors import encode_forward

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "fp8": torch.float8_e4m3fn}
E4M3_MAX = 448.0
DISTINCT_INPUTS = 4
"""Different bodies of a size at most: enough to vary the routing, few enough to fit in memory."""
SIZE_BYTES = 64 << 20
"""Bodies of a size together at most, and one at least: each client process holds them."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a service says of its model. num_experts, top_k: only for routing by the client."""

    hidden_size: int
    num_experts: int
    top_k: int


def make_bodies(
    sizes: Collection[int], model: ModelSizes, dtype: BenchDType, routing: BenchRouting, seed: int
) -> dict[int, tuple[bytes, ...]]:
    """Return bodies for requests of every size, the same ones for the same arguments."""
    made: dict[int, tuple[bytes, ...]] = {}
    for tokens in sizes:
        generator = torch.Generator().manual_seed(seed)
        bodies = [_body(tokens, model, dtype, routing, generator)]
        while len(bodies) < DISTINCT_INPUTS and len(bodies[0]) * (len(bodies) + 1) <= SIZE_BYTES:
            bodies.append(_body(tokens, model, dtype, routing, generator))
        made[tokens] = tuple(bodies)
    return made


def reply_bytes(tokens: int, model: ModelSizes, dtype: BenchDType) -> int:
    """Bytes of an output [T, H]: in the type of the input, bf16 for fp8."""
    output = torch.bfloat16 if dtype == "fp8" else DTYPES[dtype]
    return tokens * model.hidden_size * output.itemsize


def _body(
    tokens: int, model: ModelSizes, dtype: BenchDType, routing: BenchRouting, generator: torch.Generator
) -> bytes:
    hidden = torch.randn(tokens, model.hidden_size, generator=generator)
    scales = ids = weights = logits = None
    if dtype == "fp8":
        scales = hidden.abs().amax(dim=1, keepdim=True) / E4M3_MAX
        hidden = hidden / scales
    if routing != "server":
        scores = torch.randn(tokens, model.num_experts, generator=generator)
        if routing == "logits":
            logits = scores
        else:
            best = scores.topk(model.top_k, dim=1)
            ids, weights = best.indices.int(), torch.softmax(best.values, dim=1)
    body, _ = encode_forward(hidden.to(DTYPES[dtype]), scales, ids, weights, logits)
    return body
