"""A stand-in for DeepEP V2 on CPU tensors, over the default group's gloo: what `DeepEPExchange` sees of it, no more.

Rows of an expert come in a random order, rows beyond the last expert's are garbage, and every limit that DeepEP's
kernels would answer with a trap or wrong memory is an assertion.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


class ElasticBuffer:
    """num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, ...: as DeepEP's."""

    def __init__(self, group: Any, **settings: Any) -> None:
        assert settings["explicitly_destroy"]
        assert settings["use_fp8_dispatch"]
        assert settings["num_gpu_timeout_secs"] % 120 == 0
        self.settings, self.ranks, self.rank = settings, group.size(), group.rank()
        self.alive = True

    @staticmethod
    def get_buffer_size_hint(group: Any, num_max_tokens_per_rank: int, hidden: int, num_topk: int, **_: Any) -> int:
        return num_max_tokens_per_rank * hidden * 2 * min(group.size(), num_topk)

    def dispatch(
        self,
        x: tuple[torch.Tensor, torch.Tensor],
        *,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_experts: int,
        num_max_tokens_per_rank: int,
        expert_alignment: int,
        num_sms: int,
        do_cpu_sync: bool,
        do_expand: bool,
    ) -> tuple[Any, None, torch.Tensor, Any, None]:
        values, scales = x
        count, slots = topk_idx.shape
        size = num_max_tokens_per_rank
        assert (expert_alignment, do_cpu_sync, do_expand, num_sms % 2) == (1, False, True, 0)
        assert num_experts % self.ranks == 0
        assert int(topk_idx.max()) < num_experts if count else True
        assert count <= size <= self.settings["num_max_tokens_per_rank"]
        assert values.is_contiguous()
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == torch.int64
        assert topk_weights.is_contiguous()
        everyone = [None] * self.ranks
        dist.all_gather_object(everyone, (size, values.view(torch.uint8), scales, topk_idx, topk_weights))
        assert {part[0] for part in everyone} == {size}, "every rank must use the same size"
        block = num_experts // self.ranks
        parts = [torch.cat(column) for column in list(zip(*everyone, strict=True))[1:]]
        all_values, all_scales, ids, weights = parts
        local = ids.flatten() - self.rank * block
        mine = ((local >= 0) & (local < block) & (ids.flatten() >= 0)).nonzero().flatten()
        mine = mine[torch.randperm(len(mine))]
        mine = mine[torch.argsort(local[mine], stable=True)]
        tokens = mine // slots
        rows = self.ranks * size * min(slots, block)
        assert len(mine) <= rows
        received_values = torch.full((rows, values.shape[1]), 0x7F, dtype=torch.uint8)
        received_scales = torch.full((rows, scales.shape[1]), torch.nan)
        received_weights = torch.full((rows,), torch.nan)
        received_values[: len(mine)] = all_values[tokens]
        received_scales[: len(mine)] = all_scales[tokens]
        received_weights[: len(mine)] = weights.flatten()[mine]
        ends = torch.cumsum(torch.bincount(local[mine], minlength=block), 0).int()
        distinct = torch.cumsum(torch.bincount(tokens.unique() // max(count, 1), minlength=self.ranks), 0).int()
        handle = SimpleNamespace(
            psum_num_recv_tokens_per_expert=ends,
            psum_num_recv_tokens_per_scaleup_rank=distinct,
            positions=mine,
            tokens=count,
            slots=slots,
        )
        return (received_values.view(values.dtype), received_scales), None, received_weights, handle, None

    def combine(self, x: torch.Tensor, *, handle: Any, num_sms: int) -> tuple[torch.Tensor, None, None]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape[1] % 256 == 0
        shape = (self.ranks * handle.tokens, handle.slots, x.shape[1])
        filled = torch.zeros(shape[0] * shape[1], x.shape[1])
        filled[handle.positions] = x[: len(handle.positions)].float()
        sums = filled.view(shape).sum(1).bfloat16()
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, sums)
        home = slice(self.rank * handle.tokens, (self.rank + 1) * handle.tokens)
        return torch.stack([part[home].float() for part in everyone]).sum(0).bfloat16(), None, None

    def destroy(self) -> None:
        assert self.alive
        self.alive = False
