"""The router as CUDA graphs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moe_forward.cuda_graphs import Record, Work, buckets
from moe_forward.router import Router, RouterWeights, Routes, route_hidden, route_logits
from moe_forward.slab_rows import wait
from w4afp8.linear import SlicedWeight


class GraphedRouter:
    """The router as graphs, one for each bucket and all layers: a layer's weights are copied to where they read them.

    A gate is some hundred small kernels, whose launches would take longer than the layer.

    router: what is captured. max_graph_tokens: beyond it, the router itself is called. record: how work is captured.
    """

    def __init__(self, router: Router, max_graph_tokens: int, record: Record) -> None:
        self._router = router
        self._record = record
        self._buckets = buckets(max_graph_tokens) if max_graph_tokens else ()
        self._graphs: dict[tuple[int, bool], Work] = {}  # by bucket, by hidden
        spec, device = router.spec, router.device
        self._hidden = torch.zeros(max_graph_tokens, spec.hidden_size, device=device)
        self._logits = torch.zeros(max_graph_tokens, spec.num_experts, device=device)
        self._routes = Routes(
            torch.zeros(max_graph_tokens, spec.top_k, dtype=torch.int64, device=device),
            torch.zeros(max_graph_tokens, spec.top_k, device=device),
            torch.zeros(max_graph_tokens, dtype=torch.bool, device=device),
        )
        first = router.weights(spec.layers[0])
        self._weights = RouterWeights(
            SlicedWeight(*(tensor.clone() for tensor in first.projection)),
            None if first.bias is None else first.bias.clone(),
        )
        self._held = spec.layers[0]

    def by_hidden(self, layer: int, hidden: Tensor) -> Routes:
        """Route by hidden states [T, H] in any float type."""
        graph = self._graph(hidden.shape[0], by_hidden=True)
        return self._router.by_hidden(layer, hidden) if graph is None else self._run(graph, layer, self._hidden, hidden)

    def by_logits(self, layer: int, logits: Tensor) -> Routes:
        """Route by the client's own router logits [T, E] in any float type."""
        graph = self._graph(logits.shape[0], by_hidden=False)
        return self._router.by_logits(layer, logits) if graph is None else self._run(graph, layer, self._logits, logits)

    def warm_up(self) -> None:
        """Capture the graphs."""
        self._router.warm_up()
        for bucket in reversed(self._buckets):
            for by_hidden in (True, False):
                self._compute(bucket, by_hidden)
                wait(self._router.device)
                self._graphs[bucket, by_hidden] = self._record(partial(self._compute, bucket, by_hidden))

    def _graph(self, tokens: int, by_hidden: bool) -> Work | None:
        bucket = next((bucket for bucket in self._buckets if bucket >= tokens), None)
        return None if bucket is None else self._graphs[bucket, by_hidden]

    def _run(self, graph: Work, layer: int, target: Tensor, source: Tensor) -> Routes:
        if self._held != layer:
            weights = self._router.weights(layer)
            for held, wanted in zip(self._weights.projection, weights.projection, strict=True):
                held.copy_(wanted)
            if self._weights.bias is not None and weights.bias is not None:
                self._weights.bias.copy_(weights.bias)
            self._held = layer
        tokens = source.shape[0]
        target[:tokens].copy_(source)
        graph()
        return Routes(*(tensor[:tokens].clone() for tensor in self._routes))

    def _compute(self, bucket: int, by_hidden: bool) -> None:
        if by_hidden:
            routes = route_hidden(self._router.spec, self._weights, self._hidden[:bucket])
        else:
            routes = route_logits(self._router.spec, self._weights, self._logits[:bucket])
        for held, made in zip(self._routes, routes, strict=True):
            held[:bucket].copy_(made)
