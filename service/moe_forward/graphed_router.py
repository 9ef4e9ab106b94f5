"""The router as CUDA graphs, one for each layer and bucket: its launches take the host longer than the GPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moe_forward.cuda_graphs import Record, Work, buckets
from moe_forward.router import Router, Routes, no_routes
from moe_forward.slab_rows import wait


class GraphedRouter:
    """The router, with graphs for the tokens of most steps: bfloat16 and up to `max_graph_tokens`.

    router: what is captured, and called for all others. record: how work is captured.
    """

    def __init__(self, router: Router, max_graph_tokens: int, record: Record) -> None:
        self._router = router
        self._record = record
        self._buckets = buckets(max_graph_tokens) if max_graph_tokens else ()
        self._graphs: dict[tuple[int, int], Work] = {}  # by layer and bucket
        spec, device = router.spec, router.device
        self._hidden = torch.zeros(max_graph_tokens, spec.hidden_size, dtype=torch.bfloat16, device=device)
        self._routes = no_routes(max_graph_tokens, spec.top_k, device)

    def by_hidden(self, layer: int, hidden: Tensor) -> Routes:
        """Route by hidden states [T, H] in any float type. Returns: routes, valid until the next call."""
        tokens = hidden.shape[0]
        bucket = next((bucket for bucket in self._buckets if bucket >= tokens), None)
        if bucket is None or hidden.dtype != torch.bfloat16:
            return self._router.by_hidden(layer, hidden)
        self._hidden[:tokens].copy_(hidden)
        self._graphs[layer, bucket]()
        return self._routes.first(tokens)

    def by_logits(self, layer: int, logits: Tensor) -> Routes:
        """Route by the client's own router logits [T, E] in any float type."""
        return self._router.by_logits(layer, logits)

    def warm_up(self) -> None:
        """Capture the graphs."""
        self._router.warm_up()
        for bucket in reversed(self._buckets):
            for layer in self._router.spec.layers:
                self._compute(layer, bucket)
                wait(self._router.device)
                self._graphs[layer, bucket] = self._record(partial(self._compute, layer, bucket))

    def _compute(self, layer: int, bucket: int) -> None:
        self._router.by_hidden(layer, self._hidden[:bucket], out=self._routes.first(bucket))
