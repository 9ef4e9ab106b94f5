"""An attention worker of an engine that splits attention from experts (AFD), with two micro-batches in flight.

The worker holds attention, the service the experts. While the service computes the experts of one micro-batch, the
worker computes the attention of the other, so neither waits for the network as long as both have work:

    attention   A1 B1 A2 B2 A3 B3          A, B: micro-batches; 1, 2, 3: layers
    service        A1 B1 A2 B2 A3 B3

Weights of attention are random here; everything else is what a real worker does. To run it, offline and without GPU:

    make serve                                            # in one terminal: a small model over 2 CPU ranks
    .venv/bin/python deploy/examples/afd_attention_worker.py     # in another

It prints how long each layer's experts were waited for, once with one micro-batch in flight and once with more, and
the overlap: attention and waits summed, against wall time; 1 where everything stands in line, at most the number in
flight. Overlap becomes speed where the service has room: ranks on the worker's own cores, as here, have little.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_forward import AsyncClient
from moe_forward.client import read_api_key

HEAD_SIZE = 64


class Attention(nn.Module):
    """Causal self-attention of one decoder layer, with the norms before and after it. hidden_size: channels."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.heads = hidden_size // HEAD_SIZE
        self.norm = nn.RMSNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.experts_norm = nn.RMSNorm(hidden_size)

    @torch.inference_mode()
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden: [B, S, H] residual stream. Returns: the stream after attention, and what the experts get of it."""
        batch, length, channels = hidden.shape
        query, key, value = self.qkv(self.norm(hidden)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, channels))
        return hidden, self.experts_norm(hidden)


@dataclass
class Timings:
    """Seconds of one run. waits_seconds: layer -> each wait for its experts."""

    wall_seconds: float = 0.0
    attention_seconds: float = 0.0
    waits_seconds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def waited_seconds(self) -> float:
        """Sum of all waits for experts."""
        return sum(itertools.chain.from_iterable(self.waits_seconds.values()))

    @property
    def overlap(self) -> float:
        """Attention and waits summed, against wall time: 1 where everything stood in line."""
        return (self.attention_seconds + self.waited_seconds) / self.wall_seconds


@dataclass(frozen=True)
class Worker:
    """Attention of some layers in front of a service. attention: layer id -> its attention, in the order of layers."""

    client: AsyncClient
    attention: dict[int, Attention]

    async def run(self, micro_batches: Sequence[Tensor], in_flight: int) -> tuple[list[Tensor], Timings]:
        """Take micro-batches through all layers, `in_flight` of them at the same time.

        micro_batches: [B, S, H] each.
        Returns: the residual stream of each after the last layer, and where the time went.
        """
        timings = Timings(waits_seconds={layer: [] for layer in self.attention})
        places, device = asyncio.Semaphore(in_flight), asyncio.Lock()

        async def take_through(hidden: Tensor) -> Tensor:
            async with places:
                for layer in self.attention:
                    hidden = await self._layer(layer, hidden, device, timings)
                return hidden

        started = time.perf_counter()
        outputs = await asyncio.gather(*map(take_through, micro_batches))
        timings.wall_seconds = time.perf_counter() - started
        return outputs, timings

    async def _layer(self, layer: int, hidden: Tensor, device: asyncio.Lock, timings: Timings) -> Tensor:
        async with device:  # one attention at a time: the worker has one device
            started = time.perf_counter()
            hidden, expert_input = await asyncio.to_thread(self.attention[layer], hidden)
            timings.attention_seconds += time.perf_counter() - started
        started = time.perf_counter()
        expert_output = await self.client.forward(expert_input, layer=layer)
        timings.waits_seconds[layer].append(time.perf_counter() - started)
        return hidden + expert_output


def report(name: str, timings: Timings) -> str:
    """Lines that say where the time of one run went."""
    lines = [name, "  layer  forwards  median wait ms  longest ms"]
    for layer, waits in timings.waits_seconds.items():
        lines.append(f"  {layer:5}  {len(waits):8}  {statistics.median(waits) * 1e3:14.1f}  {max(waits) * 1e3:10.1f}")
    lines.append(
        f"  attention {timings.attention_seconds * 1e3:.1f} ms + waits {timings.waited_seconds * 1e3:.1f} ms "
        f"in {timings.wall_seconds * 1e3:.1f} ms of wall time: overlap {timings.overlap:.2f}"
    )
    return "\n".join(lines)


async def main(arguments: argparse.Namespace) -> None:
    """Run the same micro-batches with one and with several in flight, and print both."""
    torch.manual_seed(0)
    api_key = None if arguments.api_key_file is None else read_api_key(arguments.api_key_file)
    async with AsyncClient(arguments.url, api_key=api_key) as client:
        model = await client.placement()
        worker = Worker(client, {layer: Attention(model["hidden_size"]).eval() for layer in model["layers"]})
        shape = (arguments.sequences, arguments.tokens, model["hidden_size"])
        micro_batches = [torch.randn(shape) for _ in range(arguments.micro_batches)]
        await worker.run(micro_batches, arguments.in_flight)  # first calls open connections and warm caches
        alone, one_by_one = await worker.run(micro_batches, 1)
        together, overlapped = await worker.run(micro_batches, arguments.in_flight)
    print(f"{model['model']}: {len(micro_batches)} micro-batches of {shape[0]} x {shape[1]} tokens")
    print(report("one in flight", one_by_one))
    print(report(f"{arguments.in_flight} in flight", overlapped))
    print(f"{one_by_one.wall_seconds / overlapped.wall_seconds:.2f} times as fast as one in flight")
    if not all(torch.equal(first, second) for first, second in zip(alone, together, strict=True)):
        raise SystemExit("the outputs with one and with several in flight must be the same to the bit, and differ")
    print("the outputs are the same to the bit")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service")
    parser.add_argument("--api-key-file", help="file whose first key to send, where the service asks for one")
    parser.add_argument("--micro-batches", type=positive, default=8, help="how many to take through all layers")
    parser.add_argument("--in-flight", type=positive, default=2, help="how many of them at the same time")
    parser.add_argument("--sequences", type=positive, default=4, help="sequences of a micro-batch")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of a sequence")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """Read a number of things, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


if __name__ == "__main__":
    asyncio.run(main(parse()))
