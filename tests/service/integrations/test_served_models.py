"""Attached models on real services, held against the same quantized experts inside the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from moe_forward.client import RequestRefused
from moe_forward.integrations.transformers import attach
from w4afp8 import dequantize_fp8_block, dequantize_int4

from ..whole.forwards import Forward
from ..whole.local import Local, relative_error
from .conftest import Served
from .tiny_models import CONFIGS, HIDDEN, prompts

# warnings of transformers about itself are not about this package
pytestmark = [pytest.mark.service, pytest.mark.filterwarnings("ignore")]

NEW_TOKENS = 5
MAX_ACTIVATION_ERROR = 0.06
"""Of a layer, by fp8 activations before each of its two GEMMs, the weights being the same; measured 0.044."""


@pytest.fixture(params=list(CONFIGS))
def served(request: pytest.FixtureRequest, services: dict[str, Served]) -> Served:
    return services[request.param]


class LocalBlock(nn.Module):
    """An MoE block with w4afp8's numbers, computed in this process."""

    def __init__(self, local: Local, layer: int) -> None:
        super().__init__()
        self.local, self.layer = local, layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.local.output(Forward(self.layer, rows)).view(hidden_states.shape)


def with_blocks(served: Served, make: Callable[[int, Any], nn.Module]) -> Any:
    """Copy the model, each MoE block replaced by what `make` makes of its layer and the block."""
    changed = copy.deepcopy(served.model)
    for layer in served.local.spec.layers:
        changed.model.layers[layer].mlp = make(layer, changed.model.layers[layer].mlp)
    return changed


def with_local_blocks(served: Served) -> Any:
    """Copy the model, its MoE blocks computed here with the numbers of w4afp8."""
    return with_blocks(served, lambda layer, block: LocalBlock(served.local, layer))


def dequantized(local: Local, layer: int, block: Any) -> Any:
    """Put the quantized weights into transformers' own block, as floats."""
    held = local.layers[layer]
    with torch.no_grad():
        for number, expert in enumerate(held.experts):
            block.experts.gate_up_proj[number] = torch.cat([dequantize_int4(expert.gate), dequantize_int4(expert.up)])
            block.experts.down_proj[number] = dequantize_int4(expert.down)
        if held.shared is not None:
            for name in ("gate", "up", "down"):
                weight = dequantize_fp8_block(getattr(held.shared, name))
                block.shared_experts.get_submodule(f"{name}_proj").weight.copy_(weight)
    return block


def padded(model: Any) -> dict[str, Tensor]:
    """Two prompts, the second shorter and padded on its left."""
    ids, mask = prompts(model, rows=2, tokens=6), torch.ones(2, 6, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_local_quantized_model_to_the_bit(served: Served, dtype: torch.dtype) -> None:
    model = copy.deepcopy(served.model).to(dtype)
    reference = with_local_blocks(served).to(dtype)
    with torch.no_grad():
        expected = reference(**padded(model)).logits
        with attach(model, served.service.url):
            assert torch.equal(model(**padded(model)).logits, expected)


def test_only_fp8_activations_lie_between_the_service_and_transformers_own_block(served: Served) -> None:
    hidden = torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(3))
    reference = with_blocks(served, lambda layer, block: dequantized(served.local, layer, block))
    with torch.no_grad(), attach(served.model, served.service.url):
        for layer in served.local.spec.layers:
            output = served.model.model.layers[layer].mlp(hidden)
            error = relative_error(output, reference.model.layers[layer].mlp(hidden))
            print(f"{type(served.model).__name__} layer {layer}: relative error {error:.4f}")
            assert 1e-3 < error < MAX_ACTIVATION_ERROR


def test_generate_gives_the_tokens_of_the_local_quantized_model(served: Served) -> None:
    reference = with_local_blocks(served)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with attach(served.model, served.service.url):
        tokens = served.model.generate(**padded(served.model), **options)
    assert tokens.shape == (2, 6 + NEW_TOKENS)
    assert torch.equal(tokens, reference.generate(**padded(served.model), **options))


def test_the_local_gate_chooses_as_the_server_s_does(served: Served) -> None:
    with torch.no_grad(), attach(served.model, served.service.url):
        by_server = served.model(**padded(served.model)).logits
    with torch.no_grad(), attach(served.model, served.service.url, gate="local"):
        by_model = served.model(**padded(served.model)).logits
    assert relative_error(by_model, by_server) < 1e-3


def test_inputs_longer_than_a_request_are_refused_or_split(served: Served) -> None:
    ids = prompts(served.model, rows=5, tokens=16)
    reference = with_local_blocks(served)
    with (
        torch.no_grad(),
        attach(served.model, served.service.url),
        pytest.raises(RequestRefused, match="64"),
    ):
        served.model(ids)
    with torch.no_grad(), attach(served.model, served.service.url, max_request_tokens=64):
        logits = served.model(ids).logits
    with torch.no_grad():
        assert torch.equal(logits, reference(ids).logits)


def test_the_service_of_another_family_is_refused(services: dict[str, Served]) -> None:
    with pytest.raises(ValueError, match="another one: shared_experts False in the model, True served; gate "):
        attach(services["Qwen3Moe"].model, services["DeepseekV3"].service.url)
