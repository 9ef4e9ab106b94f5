"""A rank that gets no more memory."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from ...service.whole.forwards import Forward, as_safetensors, post
from ..scene import Fault, Scene, in_thread

TOKENS = 8192
"""Of the request that needs more than the rank has left, also of what its allocator has reserved (64 MiB a thread)."""
MARGIN_BYTES = 64 << 20
"""Below what it has now: it may be in the middle of a step, and give some back."""


def no_more_memory(scene: Scene) -> None:
    """Bound a rank's address space (RLIMIT_AS) to less than it has, and ask for a step that needs more."""
    pid = scene.service.rank_pids()[-1]
    sent = as_safetensors(Forward(1, torch.zeros(TOKENS, 256)))
    has_bytes = _address_space_bytes(pid)
    _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    scene.now()
    resource.prlimit(pid, resource.RLIMIT_AS, (has_bytes - MARGIN_BYTES, hard))
    reply = post(scene.service.url, sent)
    assert reply.status_code == 503, f"the large request ended with {reply.status_code}"
    scene.notes.append(f"the large request: {reply.json()['code']}: {reply.json()['error'][:160]}")


def _address_space_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


FAULTS = (
    Fault(
        "rank-memory",
        in_thread(no_more_memory),
        "a rank gets no more memory (RLIMIT_AS)",
        config={"max_request_tokens": TOKENS},
    ),
)
