"""A service of arithmetic: the description of some model, and layers that only scale and tell what they were asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
from safetensors.torch import load, save

from .tiny_models import EXPERTS, HIDDEN, TOP_K


class FakeService(httpx.MockTransport):
    """Answers what `attach` asks; a forward of layer N gives hidden states times N + 2.

    layers: what it serves. family: of the model it serves. placement: other answers of `/v1/placement`.
    refusal: answers every forward.
    """

    def __init__(
        self,
        layers: Sequence[int] = range(8),
        family: str = "DeepseekV3",
        placement: dict[str, Any] | None = None,
        refusal: tuple[int, str, str] | None = None,
    ) -> None:
        super().__init__(self._answer)
        self.placement: dict[str, Any] = {
            "model": "fake",
            "hidden_size": HIDDEN,
            "num_experts": EXPERTS,
            "top_k": TOP_K,
            "shared_experts": family == "DeepseekV3",
            "gate": "deepseek_v3" if family == "DeepseekV3" else "softmax",
            "layers": list(layers),
            **(placement or {}),
        }
        self.refusal = refusal
        self.forwards: list[dict[str, Any]] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/placement":
            return httpx.Response(200, json=self.placement)
        if request.url.path == "/v2/models/fake":
            columns = {"hidden_states": HIDDEN, "topk_ids": TOP_K, "router_logits": EXPERTS}
            return httpx.Response(200, json={"inputs": [{"name": n, "shape": [-1, c]} for n, c in columns.items()]})
        if request.url.path == "/v2":
            return httpx.Response(200, json={"name": "moe-forward"})
        if request.url.path == "/v1/moe/forward":
            return self._forward(request)
        return httpx.Response(404, json={"error": f"no such path: {request.url.path}", "code": "not_found"})

    def _forward(self, request: httpx.Request) -> httpx.Response:
        if self.refusal is not None:
            status, code, sentence = self.refusal
            body = {"error": sentence, "code": code, "request_id": "r-1"}
            return httpx.Response(status, content=json.dumps(body))
        tensors = load(request.content)
        layer = int(request.url.params["layer"])
        shared = request.url.params["shared_experts"] == "true"
        self.forwards.append({"layer": layer, "shared": shared, **tensors})
        output = save({"output": tensors["hidden_states"] * (layer + 2)})
        return httpx.Response(200, headers={"content-type": "application/vnd.safetensors"}, content=output)

    def rows(self) -> list[int]:
        """Tokens of each forward."""
        return [len(forward["hidden_states"]) for forward in self.forwards]
