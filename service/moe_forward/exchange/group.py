"""Joining and leaving the process group that carries an exchange."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moe_forward.exchange.base import Meeting, Place
from moe_forward.exchange.deadline import deadline

MEET_SECONDS = 3600.0
"""How long a rank waits for ranks that still load their weights; `deadline` around it is the real limit."""

LEAVE_SECONDS = 60.0
"""NCCL waits for what is under way, which never ends when a peer is gone."""


def join(place: Place) -> None:
    """Make the process's default group, over NCCL on GPUs and gloo on CPU; returns when every rank is there.

    The ranks meet before they connect: connecting has the timeout of a collective, and loading takes longer.
    """
    timeout = timedelta(seconds=place.timeout_seconds)
    store = _open_store(place)
    store.set(f"here/{place.rank}", "")
    store.wait([f"here/{rank}" for rank in range(place.ranks)], timedelta(seconds=MEET_SECONDS))
    store.set_timeout(timeout)
    on_gpu = place.device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.ranks,
        timeout=timeout,
        # With it NCCL connects now, not in the first collective, and other libraries can use its communicator.
        device_id=place.device if on_gpu else None,
    )


def _open_store(place: Place) -> Any:
    if not isinstance(place.rendezvous, Meeting):
        store, _, _ = next(rendezvous(f"file://{place.rendezvous}", place.rank, place.ranks))
        return store
    meeting = place.rendezvous
    return dist.TCPStore(  # type: ignore[attr-defined]
        meeting.host,
        meeting.port,
        is_master=place.rank == 0,
        timeout=timedelta(seconds=MEET_SECONDS),
        wait_for_workers=False,
        master_listen_fd=meeting.listener if place.rank == 0 else None,
    )


def leave() -> None:
    """Leave the process's default group, or end the process if that does not work."""
    with deadline(LEAVE_SECONDS, "leaving the group of ranks"):
        dist.destroy_process_group()
