"""Ranks that copy their rows of hidden states to the output: what is left of a step when experts cost nothing.

    python echo_ranks.py ENGINE_SOCKET RANK RANKS NUM_EXPERTS POLL_US

A rank speaks the service's own channel and maps the front ends' slabs, without torch: the copy is the one that a rank
of the service needs too, on the host or by DMA.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path

from moe_forward.channel import BlockingChannel, connect
from moe_forward.errors import ChannelClosed
from moe_forward.messages import AttachSlab, DetachSlab, Message, RankHello
from moe_forward.polling import poll_until
from moe_forward.slab import map_slab
from moe_forward.types import RankInfo, Step, StepResult, token_range

JOIN_SECONDS = 30.0


def main(path: Path, rank: int, ranks: int, num_experts: int, poll_us: int) -> None:
    """Serve steps until the engine hangs up."""
    channel, message, fds = _meet(path, rank, ranks, num_experts)
    slabs: dict[int, tuple[memoryview, mmap.mmap]] = {}
    try:
        while True:
            if isinstance(message, Step):
                channel.send(_copy(message, rank, ranks, slabs))
            elif isinstance(message, AttachSlab):
                memory = map_slab(fds[0], message.slab_bytes)
                slabs[message.front] = (memoryview(memory), memory)
            elif isinstance(message, DetachSlab):
                slabs.pop(message.front, None)
            for fd in fds:
                os.close(fd)
            poll_until(channel.ready, poll_us * 1e-6)
            message, fds = channel.receive()
    except ChannelClosed:
        return


def _meet(path: Path, rank: int, ranks: int, num_experts: int) -> tuple[BlockingChannel, Message, list[int]]:
    """Say hello until the engine expects this rank and sends a first message, as the service's ranks do."""
    mine = (rank * num_experts // ranks, (rank + 1) * num_experts // ranks)
    info = RankInfo(rank, "ready", time.time(), os.getpid(), "bench", "cpu", mine)
    give_up = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            channel = BlockingChannel(connect(path))
            channel.send(RankHello(1, info, "echo", "echo"))
            return channel, *channel.receive()
        except (OSError, ChannelClosed):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def _copy(step: Step, rank: int, ranks: int, slabs: dict[int, tuple[memoryview, mmap.mmap]]) -> StepResult:
    """Copy this rank's rows; tokens are split over ranks as the service splits them."""
    mine = token_range(rank, ranks, step.tokens)
    start = 0
    for request in step.requests:
        first, last = max(mine.start - start, 0), min(mine.stop - start, request.tokens)
        if first < last:
            slab = slabs[request.front][0]
            row = request.hidden.columns * request.hidden.dtype.itemsize
            source, target = request.hidden.offset + first * row, request.output.offset + first * row
            nbytes = (last - first) * row
            slab[target : target + nbytes] = slab[source : source + nbytes]
        start += request.tokens
    return StepResult(step.step, step.generation, rank, (), len(mine))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:6]))
