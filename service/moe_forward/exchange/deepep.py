"""Tokens between GPU ranks by DeepEP V2 (github.com/deepseek-ai/DeepEP, ElasticBuffer): the only file that imports it.

A token travels once to each rank that has one of its experts, and is repeated there for each of them ("expanded").
Without a wait for the host R is the worst case, and the row order inside an expert changes from run to run; combine
adds by (rank, slot) whatever the row order is, in float32 with two roundings to bfloat16, so the bits of a token
depend on its ids and on how many ranks there are, on nothing else.

DeepEP compiles four kernels for each `num_max_tokens_per_rank`. So T is rounded up to one of a few sizes, which costs
memory (R grows) and no time; run each size once before capturing it in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_forward.errors import StartError
from moe_forward.exchange import gpu_checks
from moe_forward.exchange.base import Dispatched, Place, expected_rows, token_bytes
from moe_forward.exchange.deadline import deadline
from moe_forward.exchange.deepep_package import missing_deepep
from moe_forward.exchange.group import LEAVE_SECONDS, join, leave
from moe_forward.types import expert_range
from w4afp8 import Quantized

SMALLEST_SIZE = 128
SIZE_FACTOR = 4

FEW_SMS, MANY_SMS = 24, 48
"""Processors that send: decode is bound by latency, prefill by bandwidth."""
MANY_SMS_FROM_TOKENS = 1024

TIMEOUT_STEP_SECONDS = 120
"""Kernels wait for other ranks this long or a multiple of it: it is compiled into them, so few values are better."""

MAX_EXPERTS, MAX_LOCAL_EXPERTS, MAX_TOP_K, HIDDEN_MULTIPLE = 2048, 256, 32, 256
"""Limits of DeepEP's kernels (layout.cuh, dispatch.cuh, combine.cuh)."""


class _Handle(NamedTuple):
    dispatched: Any  # deep_ep.EPHandle
    sms: int


class DeepEPExchange:
    """An `Exchange` over the process's default group. place: this rank's."""

    name = "deepep"
    pads = True

    def __init__(self, place: Place) -> None:
        check_shape(place)
        deep_ep = _import_deepep(place)
        join(place)
        try:
            self._buffer = _create_buffer(deep_ep, place)
        except (AssertionError, RuntimeError) as error:
            raise StartError(
                f"exchange deepep: DeepEP refused to start on {place.device}: {error} (if it is about GIN, its RDMA: "
                "ranks of one host do without it, set EP_DISABLE_GIN=1); or use exchange nccl"
            ) from error
        self._place = place
        self._mine = expert_range(place.rank, place.ranks, place.num_experts)
        self._block = -(-place.num_experts // place.ranks)
        self._seats = seats(place.num_experts, place.ranks).to(place.device)
        # Its first element stays 0; one buffer, so that a dispatch needs no kernel to set it.
        self._offsets = torch.zeros(len(self._mine) + 1, dtype=torch.int64, device=place.device)
        self._moved = moved_bytes(place).to(place.device)

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Send tokens to the ranks of their experts. See `Exchange.dispatch`."""
        count, slots = topk_ids.shape
        size = padded_size(count, self._place.max_tokens)
        sms = MANY_SMS if size >= MANY_SMS_FROM_TOKENS else FEW_SMS
        even = self._block * self._place.ranks == self._place.num_experts
        (values, scales), _, weights, handle, _ = self._buffer.dispatch(
            (tokens.values.contiguous(), tokens.scales),
            topk_idx=topk_ids.contiguous() if even else self._seats[topk_ids],
            topk_weights=topk_weights.contiguous(),
            num_experts=self._block * self._place.ranks,
            num_max_tokens_per_rank=size,
            expert_alignment=1,
            num_sms=sms,
            do_cpu_sync=False,
            do_expand=True,
        )
        # With alignment 1 the row where an expert ends is the row where the next one starts.
        self._offsets[1:].copy_(handle.psum_num_recv_tokens_per_expert[: len(self._mine)])
        hint = expected_rows(self._place.ranks, count, slots, self._place.num_experts)
        return Dispatched(Quantized(values, scales), self._offsets, weights, hint, _Handle(handle, sms))

    def combine(self, rows: Tensor, handle: _Handle) -> Tensor:
        """Bring rows back to the ranks of their tokens, added there. See `Exchange.combine`."""
        if rows.dtype != torch.bfloat16:
            raise ValueError(f"rows: exchange deepep combines bfloat16, got {rows.dtype}")
        combined: Tensor = self._buffer.combine(rows.contiguous(), handle=handle.dispatched, num_sms=handle.sms)[0]
        return combined

    def count_bytes(self, rows: Tensor, handle: _Handle, out: Tensor) -> None:
        """A token comes once, and its rows go back as one. See `Exchange.count_bytes`."""
        copies = handle.dispatched.psum_num_recv_tokens_per_scaleup_rank
        torch.sum(self._moved * copies.unsqueeze(1), 0, out=out)

    def close(self) -> None:
        """Free DeepEP's memory and leave the process group."""
        with deadline(LEAVE_SECONDS, "leaving DeepEP's group of ranks"):
            self._buffer.destroy()
        leave()


def check_shape(place: Place) -> None:
    """See that DeepEP's kernels can carry the model.

    Raises: StartError.
    """
    block = -(-place.num_experts // place.ranks)
    limits = (
        (place.hidden_size % HIDDEN_MULTIPLE == 0, f"hidden size in multiples of {HIDDEN_MULTIPLE}", place.hidden_size),
        (place.top_k <= MAX_TOP_K, f"at most {MAX_TOP_K} experts a token", place.top_k),
        (block <= MAX_LOCAL_EXPERTS, f"at most {MAX_LOCAL_EXPERTS} experts a rank", block),
        (block * place.ranks <= MAX_EXPERTS, f"at most {MAX_EXPERTS} experts", block * place.ranks),
    )
    for fits, expected, given in limits:
        if not fits:
            raise StartError(f"exchange deepep takes {expected}, got {given}; use exchange nccl")


def padded_size(tokens: int, max_tokens: int) -> int:
    """Return which of DeepEP's sizes T tokens use: 128, 512, 2048 and so on, never above `max_tokens`.

    Raises: ValueError for more tokens than the buffer was made for.
    """
    if tokens > max_tokens:
        raise ValueError(f"tokens: exchange deepep was started for at most {max_tokens} tokens a rank, got {tokens}")
    size = SMALLEST_SIZE
    while size < tokens:
        size *= SIZE_FACTOR
    return min(size, max_tokens)


def seats(num_experts: int, ranks: int) -> Tensor:
    """Number experts as DeepEP does, which gives every rank as many: where E is not a multiple, some seats stay empty.

    Returns: [E + 1] int64, seat of each expert; the last is -1, so that indexing with id -1 gives -1.
    """
    block = -(-num_experts // ranks)
    held = [expert_range(rank, ranks, num_experts) for rank in range(ranks)]
    numbers = [rank * block + offset for rank, mine in enumerate(held) for offset in range(len(mine))]
    return torch.tensor([*numbers, -1])


def moved_bytes(place: Place) -> Tensor:
    """Make bytes of DeepEP's counts: of tokens that came from each rank, added up from the first rank on.

    All ranks share one NVLink domain (`gpu_checks.check_peers`), so that DeepEP counts by rank.
    Returns: [ranks, 2] int64; its product with the counts, added up, is the payload of what came from other ranks and
        of the bfloat16 rows that went back.
    """
    mine = torch.zeros(place.ranks, 1, dtype=torch.int64)
    mine[place.rank] += 1
    if place.rank:
        mine[place.rank - 1] -= 1
    every = torch.zeros_like(mine)
    every[-1] = 1
    payload = token_bytes(place.hidden_size, place.scale_columns, place.top_k)
    return (every - mine) * torch.tensor([payload, 2 * place.hidden_size])


def _import_deepep(place: Place) -> Any:
    gpu_checks.use_device(place.device)
    if unreached := gpu_checks.check_peers(place.device, place.ranks):
        raise StartError(f"exchange deepep: {unreached}; or use exchange nccl")
    gpu_checks.warn_without_nvlink(place.device)
    if missing := missing_deepep():
        raise StartError(f"exchange deepep: {missing}; or use exchange nccl")
    gpu_checks.check_nccl_version()
    gpu_checks.check_compiler()
    gpu_checks.disable_gin_without_nic()
    try:
        import deep_ep
    except (ImportError, AssertionError, OSError) as error:
        raise StartError(f"exchange deepep: importing deep_ep failed: {error}; or use exchange nccl") from error
    return deep_ep


def _create_buffer(deep_ep: Any, place: Place) -> Any:
    sizes = {"num_max_tokens_per_rank": place.max_tokens, "hidden": place.hidden_size, "num_topk": place.top_k}
    group = dist.group.WORLD
    needed_bytes = deep_ep.ElasticBuffer.get_buffer_size_hint(group, **sizes, use_fp8_dispatch=True)
    gpu_checks.check_memory(needed_bytes, place.device, f"DeepEP's buffer for {place.max_tokens} tokens a rank")
    timeout_seconds = math.ceil(place.timeout_seconds / TIMEOUT_STEP_SECONDS) * TIMEOUT_STEP_SECONDS
    return deep_ep.ElasticBuffer(
        group,
        **sizes,
        use_fp8_dispatch=True,
        num_cpu_timeout_secs=timeout_seconds,
        num_gpu_timeout_secs=timeout_seconds,
        # Its destructor would wait for the other ranks whenever Python gets round to it.
        explicitly_destroy=True,
    )
