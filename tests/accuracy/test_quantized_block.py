"""The measuring process computes what the specification says, of every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from measure import block_inputs, relative_error, replaced_blocks
from model import moe_blocks
from quantized_block import BlockWeights, QuantizedBlock, own_weights, served_weights
from tiny import RECIPE, tiny_model, tiny_windows

from moe_forward.checkpoint import LayerWeights
from moe_forward.types import GateSpec, ModelSpec
from w4afp8 import ExpertWeights, Granularity, SharedExpert, quantize_fp8_block, quantize_int4

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

SPEC = ModelSpec(
    name="tiny",
    hidden_size=RECIPE.hidden_size,
    intermediate_size=RECIPE.moe_intermediate_size,
    num_experts=RECIPE.experts,
    top_k=RECIPE.top_k,
    shared_intermediate_size=RECIPE.moe_intermediate_size,
    layers=(1, 2),
    group_size=128,
    gate=GateSpec("deepseek_v3", RECIPE.groups, RECIPE.top_groups, True, RECIPE.routed_scaling_factor),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def rows(model: Any) -> torch.Tensor:
    """Tokens [T, H] bf16 as they enter layer 1."""
    return block_inputs(model, tiny_windows())[1]


def int4_weights(block: Any) -> BlockWeights:
    experts = [
        ExpertWeights(*map(quantize_int4, (*gate_up.chunk(2), down)))
        for gate_up, down in zip(block.experts.gate_up_proj.detach(), block.experts.down_proj.detach(), strict=True)
    ]
    parts = (block.shared_experts.gate_proj, block.shared_experts.up_proj, block.shared_experts.down_proj)
    shared = SharedExpert(*(quantize_fp8_block(part.weight.detach()) for part in parts))
    gate = block.gate
    held = LayerWeights(tuple(experts), shared, gate.weight.detach().float(), gate.e_score_correction_bias)
    return served_weights(SPEC, held, CPU)


def weights_of(block: Any, kind: str) -> BlockWeights:
    return int4_weights(block) if kind == "int4" else own_weights(SPEC, block, fp8=True)


@pytest.mark.parametrize("activations", ["token", "token_group"])
@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_the_block_computes_the_specification(
    model: Any, rows: torch.Tensor, kind: str, activations: Granularity
) -> None:
    block = QuantizedBlock(weights_of(moe_blocks(model)[1], kind), activations)
    routes = block.route(rows)
    assert relative_error(block.output(rows, routes), block.exact(rows, routes)) < 2e-3  # an e4m3 rounding may tip over
    other = QuantizedBlock(block.weights, "token" if activations == "token_group" else "token_group")
    assert relative_error(block.output(rows, routes), other.exact(rows, routes)) > 2e-2


def test_experts_without_a_token_are_no_obstacle(model: Any, rows: torch.Tensor) -> None:
    block = QuantizedBlock(int4_weights(moe_blocks(model)[1]), "token")
    routes = block.route(rows[:1])
    assert relative_error(block.output(rows[:1], routes), block.exact(rows[:1], routes)) < 2e-3


def test_without_quantization_it_is_transformers_own_block(model: Any, rows: torch.Tensor) -> None:
    own = moe_blocks(model)[1]
    block = QuantizedBlock(own_weights(SPEC, own, fp8=False), None)
    with torch.no_grad():
        expected = own(rows.unsqueeze(0))
    output = block(rows.unsqueeze(0))
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype
    assert relative_error(output, expected) < 1e-2  # bf16 in the one, float32 in the other
    with pytest.raises(ValueError, match="expected quantized weights"):
        block.exact(rows, block.route(rows))


def test_quantized_weights_alone_have_their_error(model: Any, rows: torch.Tensor) -> None:
    own = moe_blocks(model)[1]
    exact = QuantizedBlock(own_weights(SPEC, own, fp8=False), None)
    routes = exact.route(rows)
    for kind, low, high in (("fp8", 0.01, 0.06), ("int4", 0.08, 0.25)):
        block = QuantizedBlock(weights_of(own, kind), None)
        assert low < relative_error(block.output(rows, routes), exact.output(rows, routes)) < high


def test_replaced_blocks_are_put_back(model: Any) -> None:
    own = moe_blocks(model)
    blocks = {layer: QuantizedBlock(own_weights(SPEC, block, fp8=True), "token") for layer, block in own.items()}
    with replaced_blocks(model, blocks):
        assert model.model.layers[2].mlp is blocks[2]
    assert moe_blocks(model) == own
